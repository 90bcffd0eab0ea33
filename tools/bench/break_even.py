"""At which shapes the compiled operators beat torch's own: a call of ours costs more, and on a CPU a short row too.

Forward passes without gradients, as in evaluation and generation, and forward with backward; nothing is dropped. For
each operator, pass and type one table of how many times as fast as torch ours is: elements down, width across (keys
of attention weights, for as many queries; words of the head's two passes). A star marks what is left to torch: the
WORTH of each operator in megagpt2/kernels/ is from these tables. On a GPU nothing is left to torch.

torch's is the reference of an operator, which keeps its contract: for layer_norm, bias_gelu and bias_dropout_add the
chain that anyone writes, for attention weights one that gives 0, not NaN, to a query that sees nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

os.environ["MEGAGPT2_OPERATORS"] = "always"  # before they are imported: ours at every shape

import torch  # noqa: E402
from common import Row, arguments, medians, nothing_to_measure, report  # noqa: E402
from torch import Tensor  # noqa: E402

from megagpt2.kernels import (  # noqa: E402
    bias_dropout_add,
    bias_gelu,
    cross_entropy,
    dropout,
    layer_norm,
    residual_layer_norm,
    scale_mask_softmax,
    split_sum,
)
from megagpt2.kernels.extension import Worth  # noqa: E402

WIDTHS = (1, 4, 16, 64, 256, 768, 3072)
FEWEST, MOST = 2**10, 2**22  # elements
EPSILON = 1e-5
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MODULES = {
    "cross_entropy_statistics": cross_entropy, "cross_entropy_gradient_": cross_entropy,
    "split_sum_add_": split_sum, "split_sum_round_": split_sum,
} | {
    module.__name__.rpartition(".")[2]: module
    for module in (layer_norm, bias_gelu, bias_dropout_add, residual_layer_norm, scale_mask_softmax, dropout)
}
WITHOUT_GRADIENTS = frozenset(name for name, module in MODULES.items() if module in (cross_entropy, split_sum))

# Name, what calls its function or its reference, and with which tensors.
Case = tuple[str, Callable[[Callable], Callable], list[Tensor]]


def operators(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """The operators on x [1, rows, width]."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, residual, vectors = tensor(1, rows, width), tensor(1, rows, width), [tensor(width) for _ in range(3)]
    yield "layer_norm", lambda f: lambda *t: f(*t, EPSILON), [x, *vectors[:2]]
    yield "bias_gelu", lambda f: f, [x, vectors[0]]
    yield "bias_dropout_add", lambda f: f, [x, vectors[0], residual]
    yield "residual_layer_norm", lambda f: lambda *t: f(*t, EPSILON)[1], [x, vectors[0], residual, *vectors[1:]]
    heads = max(1, rows // width)
    scores = tensor(1, heads, rows // heads, width)
    yield "scale_mask_softmax", lambda f: lambda s: f(s, 0.125, True), [scores]
    yield "scale_mask_softmax:unmasked", lambda f: lambda s: f(s, 0.125), [scores]
    yield "dropout", lambda f: lambda x: f(x, torch.tensor([7]), (1, 2), 0.1), [x]


def head_passes(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """The two passes over the head's logits [rows, width], which have no gradients."""
    logits, targets = torch.randn(rows, width).to(dtype), torch.randint(width, (rows,))
    maximum, normalizer, _ = cross_entropy.cross_entropy_statistics_reference(logits, targets, 0, width)
    yield "cross_entropy_statistics", lambda f: lambda x: f(x, targets, 0, width), [logits]
    # Over what it wrote, from the second call on: that is as much work.
    yield "cross_entropy_gradient_", lambda f: lambda x: f(x, targets, maximum, normalizer, 0, width), [logits]


def weight_sums(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """The sums that become the head's d weight [rows, width], for 16-bit types."""
    if dtype == torch.float32:
        return
    high, low = torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, width, dtype=torch.int16)
    term, scale = torch.randn(rows, width), torch.tensor(1.0)
    yield "split_sum_add_", lambda f: lambda x: f(high, low, x), [term]
    yield "split_sum_round_", lambda f: lambda x: f(x, low, scale), [high]


def ways_of(name: str, call: Callable) -> dict[str, Callable]:
    """Ours and torch's. The reference of NAME is NAME_reference, that of NAME_ NAME_reference_."""
    name = name.partition(":")[0]
    module, stem = MODULES[name], name.rstrip("_")
    return {"ours": call(getattr(module, name)), "torch": call(getattr(module, f"{stem}_reference{name[len(stem):]}"))}


def worth_of(name: str, what: str) -> Worth:
    """From which shapes on the operator is used on a CPU."""
    name, _, unmasked = name.partition(":")
    worth = getattr(MODULES[name], "WORTH", Worth())
    return worth if isinstance(worth, Worth) else worth[not unmasked, what != "forward"]


@torch.no_grad()
def evaluated(function: Callable, tensors: list[Tensor]) -> None:
    function(*tensors)


def trained(function: Callable, tensors: list[Tensor], upstream: Tensor) -> Callable[[], object]:
    """A call of the function and its gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream, allow_unused=True)


def measured(rows: int, width: int, kind: str, options) -> Iterator[Row]:
    """One row for each operator and pass at one shape."""
    sources = (operators, head_passes, weight_sums)
    for name, call, tensors in chain.from_iterable(source(rows, width, TYPES[kind]) for source in sources):
        if options.only not in name:
            continue
        ways = ways_of(name, call)
        passes = {"forward": {way: partial(evaluated, function, tensors) for way, function in ways.items()}}
        if name not in WITHOUT_GRADIENTS:
            upstream = ways["ours"](*tensors)
            passes["forward and backward"] = {way: trained(f, tensors, upstream) for way, f in ways.items()}
        for what, calls in passes.items():
            seconds = medians(calls, options.repetitions, options.device)
            yield Row(
                "break_even", f"{name} {what} {kind} {rows}x{width}", "speed", 1e-3 / seconds["ours"], "calls/ms",
                peers={"torch": 1e-3 / seconds["torch"]},
            )


def tables(rows: list[Row], device: str) -> str:
    """One table of ratios for each operator, pass and type; "*": left to torch."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for row in rows:
        title, shape = row.case.rsplit(" ", 1)
        name, what, _ = title.replace(" and ", "+").split(" ")
        count, width = map(int, shape.split("x"))
        about = 1 << ((count * width).bit_length() - 1)  # elements: a whole number of rows
        left = device == "cpu" and not worth_of(name, what).covers(torch.empty(count, width, device="meta"))
        found.setdefault(title, {})[about, width] = f"{row.value / row.peers['torch']:.2f}{'*' if left else ' '}"
    lines = []
    for title, cells in found.items():
        sizes, widths = ([*dict.fromkeys(sorted(keys))] for keys in zip(*cells, strict=True))
        lines += ["", title, f"{'elements':>10}" + "".join(f"{width:>7} " for width in widths)]
        lines += [
            f"{size:>10}" + "".join(f"{cells.get((size, width), ''):>8}" for width in widths) for size in sizes
        ]
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    parser = arguments(__doc__, repetitions=9)
    parser.add_argument("--most", type=int, default=MOST, metavar="N", help="elements: 1024, 4096, ... up to this many")
    parser.add_argument("--only", default="", metavar="NAME", help="operators whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if why := nothing_to_measure(options.device):
        print(f"break_even: {why}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    written, elements = [], FEWEST
    while elements <= options.most:
        for width in (width for width in WIDTHS if width <= elements):
            for kind in TYPES:
                written += measured(-(-elements // width), width, kind, options)
        print(f"  {elements} elements: done", file=sys.stderr, flush=True)
        elements *= 4
    written.sort(key=lambda row: row.case.rsplit(" ", 1)[0])  # stable: sizes stay in order
    report(written, options, options.device, partial(tables, device=options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())

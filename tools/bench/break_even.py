"""At which shapes the compiled operators beat torch's own on a CPU: a call of ours costs more, and so does a short row.

Forward passes without gradients, as in evaluation and generation, and forward with backward; nothing is dropped. For
each operator, pass and type one table of how many times as fast as torch ours is: elements down, width across (keys
of attention weights, for as many queries; words of the head's two passes). FEWEST and NARROWEST of each operator in
megagpt2/kernels/ are from these tables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

os.environ["MEGAGPT2_OPERATORS"] = "always"  # before they are imported: ours at every shape

import torch  # noqa: E402
from common import Row, arguments, medians, report  # noqa: E402
from torch import Tensor  # noqa: E402

from megagpt2.kernels import cross_entropy  # noqa: E402
from megagpt2.kernels.bias_dropout_add import bias_dropout_add, bias_dropout_add_reference  # noqa: E402
from megagpt2.kernels.bias_gelu import bias_gelu, bias_gelu_reference  # noqa: E402
from megagpt2.kernels.extension import EXTENSION  # noqa: E402
from megagpt2.kernels.layer_norm import layer_norm, layer_norm_reference  # noqa: E402
from megagpt2.kernels.residual_layer_norm import residual_layer_norm, residual_layer_norm_reference  # noqa: E402
from megagpt2.kernels.scale_mask_softmax import scale_mask_softmax, scale_mask_softmax_reference  # noqa: E402

WIDTHS = (1, 4, 16, 64, 256, 768, 3072)
FEWEST, MOST = 2**10, 2**20  # elements
EPSILON = 1e-5
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Case = tuple[str, Callable, Callable, list[Tensor]]


def operators(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Name, ours, torch's, and their tensors, for x [1, rows, width]."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, residual, vectors = tensor(1, rows, width), tensor(1, rows, width), [tensor(width) for _ in range(3)]
    yield "layer_norm", lambda *t: layer_norm(*t, EPSILON), lambda *t: layer_norm_reference(*t, EPSILON), [
        x, *vectors[:2]]
    yield "bias_gelu", bias_gelu, bias_gelu_reference, [x, vectors[0]]
    yield "bias_dropout_add", bias_dropout_add, bias_dropout_add_reference, [x, vectors[0], residual]
    yield (
        "residual_layer_norm", lambda x, b, r, w, nb: residual_layer_norm(x, b, r, w, nb, EPSILON)[1],
        lambda x, b, r, w, nb: residual_layer_norm_reference(x, b, r, w, nb, EPSILON)[1],
        [x, vectors[0], residual, *vectors[1:]],
    )
    heads = max(1, rows // width)
    yield (
        "scale_mask_softmax", lambda s: scale_mask_softmax(s, 0.125, True),
        lambda s: scale_mask_softmax_reference(s, 0.125, True), [tensor(1, heads, rows // heads, width)],
    )


def head_passes(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """The two passes over the head's logits [rows, width], which have no gradients."""
    logits, targets = torch.randn(rows, width).to(dtype), torch.randint(width, (rows,))
    maximum, normalizer, _ = cross_entropy.cross_entropy_statistics_reference(logits, targets, 0, width)
    yield (
        "cross_entropy_statistics", lambda x: cross_entropy.cross_entropy_statistics(x, targets, 0, width),
        lambda x: cross_entropy.cross_entropy_statistics_reference(x, targets, 0, width), [logits],
    )

    def written(function: Callable) -> Callable[[Tensor], None]:  # over a gradient the second time: as much work
        return lambda x: function(x, targets, maximum, normalizer, 0, width)

    yield (
        "cross_entropy_gradient_", written(cross_entropy.cross_entropy_gradient_),
        written(cross_entropy.cross_entropy_gradient_reference_), [logits],
    )


@torch.no_grad()
def evaluated(function: Callable, tensors: list[Tensor]) -> None:
    function(*tensors)


def trained(function: Callable, tensors: list[Tensor], upstream: Tensor) -> Callable[[], object]:
    """A call of the function and its gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream, allow_unused=True)


def measured(rows: int, width: int, kind: str, only: str, repetitions: int) -> Iterator[Row]:
    """One row for each operator and pass at one shape."""
    for name, ours, torchs, tensors in (*operators(rows, width, TYPES[kind]), *head_passes(rows, width, TYPES[kind])):
        if only not in name:
            continue
        ways = {"ours": ours, "torch": torchs}
        passes = {"forward": {way: partial(evaluated, function, tensors) for way, function in ways.items()}}
        if not name.startswith("cross_entropy"):
            upstream = ours(*tensors)
            passes["forward and backward"] = {way: trained(f, tensors, upstream) for way, f in ways.items()}
        for what, calls in passes.items():
            seconds = medians(calls, repetitions)
            yield Row(
                "break_even", f"{name} {what} {kind} {rows}x{width}", "speed", 1e-3 / seconds["ours"], "calls/ms",
                peers={"torch": 1e-3 / seconds["torch"]},
            )


def tables(rows: list[Row]) -> str:
    """One table of ratios for each operator, pass and type."""
    ratios: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows:
        title, shape = row.case.rsplit(" ", 1)
        count, width = map(int, shape.split("x"))
        ratios.setdefault(title, {})[count * width, width] = row.value / row.peers["torch"]
    lines = []
    for title, cells in ratios.items():
        sizes, widths = map(set, zip(*cells, strict=True))
        lines += ["", title, f"{'elements':>10}" + "".join(f"{width:>7}" for width in sorted(widths))]
        for about in sorted({1 << (size.bit_length() - 1) for size in sizes}):
            found = {w: ratio for (size, w), ratio in cells.items() if 1 << (size.bit_length() - 1) == about}
            lines.append(f"{about:>10}" + "".join(
                f"{found[width]:>7.2f}" if width in found else " " * 7 for width in sorted(widths)
            ))
    return "\n".join(lines)


def main() -> int:
    parser = arguments(__doc__, repetitions=9)
    parser.add_argument("--most", type=int, default=MOST, metavar="N", help="elements: 1024, 4096, ... up to this many")
    parser.add_argument("--only", default="", metavar="NAME", help="operators whose name contains this")
    options = parser.parse_args()
    if not EXTENSION.compiled:
        print(f"break_even: there is nothing to measure, the operators are {EXTENSION.describe('cpu')}",
              file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    written, elements = [], FEWEST
    while elements <= options.most:
        for width in (width for width in WIDTHS if width <= elements):
            for kind in TYPES:
                written += measured(-(-elements // width), width, kind, options.only, options.repetitions)
        elements *= 4
    written.sort(key=lambda row: row.case.rsplit(" ", 1)[0])  # stable: sizes stay in order
    report(written, options.json, text=tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The ways to attend that `kernels.attention` offers, against one another: TFLOP/s of what a causal mask leaves.

    python tools/bench/attention.py --threads 2
    python tools/bench/attention.py --device cuda --json build/bench/attention_cuda.json

Heads of 64, as GPT-2's, with as many sequences as make a few thousand tokens; the limit is a matrix product's rate.
`kernels.attention: auto` takes sdpa where no weights are dropped, except where these figures say otherwise. What does
not fit, or fails, is left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

os.environ["MEGAGPT2_OPERATORS"] = "always"  # before they are imported: ours, however small

import torch  # noqa: E402
from common import Row, arguments, medians, nothing_to_measure, report  # noqa: E402
from torch import Tensor  # noqa: E402

from megagpt2.model.attention import ATTENTION  # noqa: E402
from megagpt2.model.layers import Dropout  # noqa: E402

HEADS, HEAD = 12, 64
LENGTHS = (1, 16, 64, 256, 1024, 4096)
TOKENS = {"cpu": 2048, "cuda": 65536}
MOST_SCORES = {"cpu": 2**28, "cuda": 2**33}  # elements
MOST_SEQUENCES = 2**15  # with 65,536 some of torch's kernels for GPUs can't be launched
WAYS = ("sdpa", "fused_softmax", "reference")


def trained(way: Callable, q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> Callable[[], object]:
    """A call of the way and its gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(way(*leaves), leaves, dy)


@torch.no_grad()
def evaluated(way: Callable, q: Tensor, k: Tensor, v: Tensor) -> None:
    way(q, k, v)


def works(call: Callable[[], object], name: str) -> bool:
    """Whether a way can be called at all here; says so where it can't."""
    try:
        call()
    except RuntimeError as error:
        print(f"  {name} is left out: {error}", file=sys.stderr, flush=True)
        return False
    return True


def rows_of(length: int, kind: str, options) -> list[Row]:
    """Both passes at one length."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    batch = min(max(1, options.tokens // length), MOST_SEQUENCES)
    samples, drop = torch.arange(batch, device=options.device), Dropout(0.0, (0, 0))
    shape = (batch, length, HEADS, HEAD)  # as a projection leaves them
    q, k, v, dy = (torch.randn(shape, device=options.device).to(dtype).transpose(1, 2) for _ in range(4))
    named = {
        name: partial(ATTENTION[name], samples=samples, drop=drop) for name in WAYS
        if name == "sdpa" or batch * HEADS * length**2 <= MOST_SCORES[options.device]
    }
    passes = {
        "forward": {name: partial(evaluated, way, q, k, v) for name, way in named.items()},
        "forward and backward": {name: trained(way, q, k, v, dy) for name, way in named.items()},
    }
    size, rows = 1024 if options.device == "cpu" else 8192, []
    a, b = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
    for what, calls in passes.items():
        calls = {name: call for name, call in calls.items() if works(call, f"{what} {length} {kind}: {name}")}
        if "sdpa" not in calls:
            continue
        products = 2 if what == "forward" else 7  # flash attention makes the scores again
        work = products * 2 * batch * HEADS * HEAD * length * (length + 1) / 2 / 1e12
        seconds = medians({**calls, "limit": lambda: a @ b}, options.repetitions, options.device)
        limit = 2 * size**3 / 1e12 / seconds.pop("limit")
        rates = {name: work / value for name, value in seconds.items()}
        case = f"attention {what} {batch}x{HEADS}x{length}x{HEAD} {kind}"
        rows.append(Row("attention", case, "rate", rates.pop("sdpa"), "TFLOP/s", peers=rates, limit=limit))
    return rows


def main() -> int:
    parser = arguments(__doc__, repetitions=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, metavar="N", help="in a batch (2048 on a CPU, 65536 on a GPU)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="of sequences")
    options = parser.parse_args()
    if why := nothing_to_measure(options.device):
        print(f"attention: {why}", file=sys.stderr)
        return 2
    options.tokens = options.tokens or TOKENS[options.device]
    torch.set_num_threads(options.threads)
    rows = [row for kind in ("fp32", "bf16") for length in options.lengths for row in rows_of(length, kind, options)]
    report(rows, options, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())

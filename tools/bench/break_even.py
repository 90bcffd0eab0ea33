"""From how many elements on the compiled operators beat torch's own on a CPU: a call of ours costs more.

Forward passes without gradients, as in evaluation and generation, and forward with backward; nothing is dropped. The
`fewest` of each operator in megagpt2/kernels/ are from this table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

os.environ["MEGAGPT2_OPERATORS"] = "always"  # before they are imported: ours, however small

import torch  # noqa: E402
from common import Row, arguments, medians, report  # noqa: E402
from torch import Tensor  # noqa: E402

from megagpt2.kernels.bias_dropout_add import bias_dropout_add, bias_dropout_add_reference  # noqa: E402
from megagpt2.kernels.bias_gelu import bias_gelu, bias_gelu_reference  # noqa: E402
from megagpt2.kernels.extension import EXTENSION  # noqa: E402
from megagpt2.kernels.layer_norm import layer_norm, layer_norm_reference  # noqa: E402
from megagpt2.kernels.residual_layer_norm import residual_layer_norm, residual_layer_norm_reference  # noqa: E402
from megagpt2.kernels.scale_mask_softmax import scale_mask_softmax, scale_mask_softmax_reference  # noqa: E402

WIDTH = 768
EPSILON = 1e-5


def operators(rows: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """Name, ours, torch's, and their tensors; `rows` tokens of the 117M model, or as many queries and keys."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, residual, vectors = tensor(1, rows, WIDTH), tensor(1, rows, WIDTH), [tensor(WIDTH) for _ in range(3)]
    yield "layer_norm", lambda *t: layer_norm(*t, EPSILON), lambda *t: layer_norm_reference(*t, EPSILON), [
        x, *vectors[:2]]
    yield "bias_gelu", bias_gelu, bias_gelu_reference, [tensor(1, rows, 4 * WIDTH), tensor(4 * WIDTH)]
    yield "bias_dropout_add", bias_dropout_add, bias_dropout_add_reference, [x, vectors[0], residual]
    yield (
        "residual_layer_norm", lambda x, b, r, w, nb: residual_layer_norm(x, b, r, w, nb, EPSILON)[1],
        lambda x, b, r, w, nb: residual_layer_norm_reference(x, b, r, w, nb, EPSILON)[1],
        [x, vectors[0], residual, *vectors[1:]],
    )
    yield (
        "scale_mask_softmax", lambda s: scale_mask_softmax(s, 0.125, True),
        lambda s: scale_mask_softmax_reference(s, 0.125, True), [tensor(1, 12, rows, rows)],
    )


@torch.no_grad()
def evaluated(function: Callable, tensors: list[Tensor]) -> None:
    function(*tensors)


def trained(function: Callable, tensors: list[Tensor], upstream: Tensor) -> Callable[[], object]:
    """A call of the function and its gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream, allow_unused=True)


def main() -> int:
    parser = arguments(__doc__, repetitions=15)
    parser.add_argument("--most", type=int, default=1024, metavar="ROWS", help="1, 4, 16, ... up to this many")
    options = parser.parse_args()
    if not EXTENSION.compiled:
        print(f"break_even: there is nothing to measure, the operators are {EXTENSION.describe('cpu')}",
              file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    rows, written = 1, []
    while rows <= options.most:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for operator, ours, torchs, tensors in operators(rows, dtype):
                y = ours(*tensors)
                ways = {"ours": ours, "torch": torchs}
                calls = {
                    "forward": {way: partial(evaluated, f, tensors) for way, f in ways.items()},
                    "forward and backward": {way: trained(f, tensors, y) for way, f in ways.items()},
                }
                for what, callers in calls.items():
                    seconds = medians(callers, options.repetitions)
                    written.append(Row(
                        "break_even", f"{operator} {what} {name} {tensors[0].numel()} elements", "speed",
                        1e-3 / seconds["ours"], "calls/ms", peers={"torch": 1e-3 / seconds["torch"]},
                    ))
        rows *= 4
    written.sort(key=lambda row: row.case.rsplit(" ", 2)[0])  # stable: sizes stay in order
    report(written, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

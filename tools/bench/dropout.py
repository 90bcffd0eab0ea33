"""Dropout: the compiled operator against its reference in plain torch and torch's own F.dropout.

GB/s of the tensors that any implementation has to read and write: forward x and y, forward and backward also dy
and dx. The limit is what y.copy_(x) reaches. F.dropout draws from a generator, writes a mask and reads it again;
its masks depend on the layout and on what was drawn before.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from common import Row, arguments, medians, report

from megagpt2.kernels.dropout import dropout, dropout_reference
from megagpt2.kernels.extension import EXTENSION
from megagpt2.kernels.philox import key_of

PROBABILITY = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(name: str, elements: int, repetitions: int) -> list[Row]:
    """Forward, and forward with backward, of a [8, elements / 8] tensor."""
    x = torch.randn(8, elements // 8).to(DTYPES[name]).requires_grad_()
    y, dy = torch.empty_like(x), torch.randn(x.shape).to(x.dtype)
    samples, key = torch.arange(8), key_of(0, "bench")
    ways = {
        "C++": lambda: dropout(x, samples, key, PROBABILITY),
        "reference": lambda: dropout_reference(x, samples, key, PROBABILITY),
        "F.dropout": lambda: F.dropout(x, PROBABILITY),
    }

    def forward(way):
        with torch.no_grad():
            way()

    cases = {"copy": lambda: y.copy_(x.detach())}
    for way, function in ways.items():
        cases[f"{way} forward"] = lambda f=function: forward(f)
        cases[f"{way} forward+backward"] = lambda f=function: torch.autograd.grad(f(), x, dy)
    seconds = medians(cases, repetitions)
    rows = []
    gigabytes = x.numel() * x.element_size() / 1e9
    for passes, tensors in (("forward", 2), ("forward+backward", 4)):
        speed = {way: tensors * gigabytes / seconds[f"{way} {passes}"] for way in ways}
        peers = {"reference": speed["reference"], "F.dropout": speed["F.dropout"]}
        rows.append(Row("dropout", f"{name} {passes}", "bandwidth", speed["C++"], "GB/s", peers=peers,
                        limit=2 * gigabytes / seconds["copy"]))
    return rows


def main() -> int:
    parser = arguments(__doc__, repetitions=11)
    parser.add_argument("--elements", type=int, default=8 * 1024 * 768, metavar="N", help="of the tensor")
    options = parser.parse_args()
    if not EXTENSION.compiled:
        print(f"dropout: there is nothing to measure, the operators are {EXTENSION.describe('cpu')}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    report([row for name in DTYPES for row in measure(name, options.elements, options.repetitions)], options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

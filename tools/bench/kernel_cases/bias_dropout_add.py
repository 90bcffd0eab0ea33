"""residual + dropout(x + bias): x and the residual are read and z written once; backward reads dz and writes dx.

Where nothing is dropped dx is dz, and backward reads dz for d bias alone. Torch's dropout draws other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from megagpt2.kernels import bias_dropout_add as kernel
from tools.bench.kernel_cases import Case, backward, forward

BATCH, WIDTH, KEY = 8, 1600, (1, 2)


def cases(device: str, small: bool) -> Iterator[Case]:
    """GPT-2's widest stream; on a GPU enough rows to fill it."""
    rows = 64 if small else 8192 if device == "cpu" else 65536
    for probability in (0.1, 0.0):
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield from _of(rows, probability, name, dtype, device)


def _of(rows: int, probability: float, name: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    x, residual, dz = (torch.randn(BATCH, rows // BATCH, WIDTH, device=device).to(dtype) for _ in range(3))
    bias = torch.randn(WIDTH, device=device).to(dtype)
    samples = torch.arange(BATCH, device=device) if probability else None
    moved, case = x.numel() * x.element_size(), f"{rows}x{WIDTH} {name} p={probability:g}"

    def ours(x, bias, residual):
        return kernel.bias_dropout_add(x, bias, residual, samples, KEY, probability)

    def eager(x, bias, residual):
        return residual + F.dropout(x + bias, probability, training=probability > 0)

    yield Case(
        f"bias_dropout_add forward {case}", 3 * moved,
        forward(x, bias, residual)(ours), forward(x, bias, residual), {"eager": eager},
    )
    leaves = [t.clone().requires_grad_() for t in (x, bias, residual)]
    yield Case(
        f"bias_dropout_add backward {case}", (2 if probability else 1) * moved,
        backward(leaves, dz)(ours), backward(leaves, dz), {"eager": eager},
    )

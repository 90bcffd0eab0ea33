"""The residual stream's sum and its normalization: x and the residual are read, z and y written once; backward reads
dy, dz and z and writes d residual, and dx where something is dropped. Torch's dropout draws other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from megagpt2.kernels import residual_layer_norm as kernel
from tools.bench.kernel_cases import Case, backward, forward

BATCH, WIDTH, KEY, EPSILON = 8, 1600, (1, 2), 1e-5


def cases(device: str, small: bool) -> Iterator[Case]:
    """GPT-2's widest stream; on a GPU enough rows to fill it."""
    rows = 64 if small else 8192 if device == "cpu" else 65536
    for probability in (0.1, 0.0):
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield from _of(rows, probability, name, dtype, device)


def _of(rows: int, probability: float, name: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    x, residual, dz, dy = (torch.randn(BATCH, rows // BATCH, WIDTH, device=device).to(dtype) for _ in range(4))
    bias, weight, norm_bias = (torch.randn(WIDTH, device=device).to(dtype) for _ in range(3))
    samples = torch.arange(BATCH, device=device) if probability else None
    moved, case = x.numel() * x.element_size(), f"{rows}x{WIDTH} {name} p={probability:g}"
    tensors = (x, bias, residual, weight, norm_bias)

    def ours(x, bias, residual, weight, norm_bias):
        return kernel.residual_layer_norm(
            x, bias, residual, weight, norm_bias, EPSILON, samples, KEY, probability
        )

    def eager(x, bias, residual, weight, norm_bias):
        z = residual + F.dropout(x + bias, probability, training=probability > 0)
        return z, F.layer_norm(z, (WIDTH,), weight, norm_bias, EPSILON)

    yield Case(
        f"residual_layer_norm forward {case}", 4 * moved,
        forward(*tensors)(ours), forward(*tensors), {"eager": eager},
    )
    leaves = [t.clone().requires_grad_() for t in tensors]
    yield Case(
        f"residual_layer_norm backward {case}", (5 if probability else 4) * moved,
        backward(leaves, [dz, dy])(ours), backward(leaves, [dz, dy]), {"eager": eager},
    )

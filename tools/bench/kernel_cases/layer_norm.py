"""Layer normalization: x is read and y written once; backward reads x and dy and writes dx."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from megagpt2.kernels import layer_norm as kernel
from tools.bench.kernel_cases import Case, backward, forward, library

EPSILON = 1e-5


def cases(device: str, small: bool) -> Iterator[Case]:
    """GPT-2's widths; on a GPU enough rows to fill it."""
    rows = 64 if small else 8192 if device == "cpu" else 65536
    shapes = [(rows, 1600), (rows, 768)]
    for rows, width in shapes:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield from _of(rows, width, name, dtype, device)


def _of(rows: int, width: int, name: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    x, dy = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    moved = x.numel() * x.element_size()

    def eager(x, weight, bias):
        return F.layer_norm(x, (width,), weight, bias, EPSILON)

    def ours(x, weight, bias):
        return kernel.layer_norm(x, weight, bias, EPSILON)

    peers = {"eager": eager}
    if apex := library("apex.normalization.fused_layer_norm:fused_layer_norm_affine", device):
        peers["apex"] = lambda x, weight, bias: apex(x, weight, bias, (width,), EPSILON)
    if liger := library("liger_kernel.transformers.functional:liger_layer_norm", device):
        peers["liger"] = lambda x, weight, bias: liger(x, weight, bias, EPSILON)
    yield Case(
        f"layer_norm forward {rows}x{width} {name}", 2 * moved,
        forward(x, weight, bias)(ours), forward(x, weight, bias), peers,
    )
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    yield Case(
        f"layer_norm backward {rows}x{width} {name}", 3 * moved,
        backward(leaves, dy)(ours), backward(leaves, dy), peers,
    )

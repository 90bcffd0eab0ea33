"""GELU with a bias: x is read and y written once; backward reads x and dy and writes dx."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megagpt2.kernels import bias_gelu as kernel
from tools.bench.kernel_cases import Case, backward, forward


def cases(device: str, small: bool) -> Iterator[Case]:
    """The inner width of GPT-2's largest model; on a GPU enough rows to fill it."""
    rows = 64 if small else 8192 if device == "cpu" else 65536
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        yield from _of(rows, 6400, name, dtype, device)


def _of(rows: int, width: int, name: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    x, dy = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    bias = torch.randn(width, device=device).to(dtype)
    moved = x.numel() * x.element_size()

    peers = {"eager": kernel.bias_gelu_reference}
    yield Case(
        f"bias_gelu forward {rows}x{width} {name}", 2 * moved,
        forward(x, bias)(kernel.bias_gelu), forward(x, bias), peers,
    )
    leaves = [t.clone().requires_grad_() for t in (x, bias)]
    yield Case(
        f"bias_gelu backward {rows}x{width} {name}", 3 * moved,
        backward(leaves, dy)(kernel.bias_gelu), backward(leaves, dy), peers,
    )

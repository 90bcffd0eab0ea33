"""Attention weights under a causal mask: the visible half is read, the whole is written with its zeros.

Backward reads the visible half of two tensors and writes the whole of one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megagpt2.kernels import scale_mask_softmax as kernel
from megagpt2.kernels.dropout import dropout
from tools.bench.kernel_cases import Case, backward, forward, library

SCALE = 0.125


def cases(device: str, small: bool) -> Iterator[Case]:
    """GPT-2 117M's heads on a CPU, 1542M's on a GPU; and a new token's query beside keys that no vector divides."""
    shapes = [(1, 12, 1024, 1024), (8, 12, 1, 1001)] if device == "cpu" else [(8, 25, 1024, 1024), (64, 25, 1, 1001)]
    for shape in [(1, 2, 16, 16), (2, 2, 1, 17)] if small else shapes:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield from _of(shape, name, dtype, device)


def _of(shape: tuple[int, ...], name: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    batch, heads, query, key = shape
    scores, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    future = torch.ones(query, key, dtype=torch.bool, device=device).triu(1 + key - query)
    whole = scores.numel() * scores.element_size()
    visible = batch * heads * (query * key - query * (query - 1) // 2) * scores.element_size()
    named = f"causal {'' if batch == 1 else f'{batch}x'}{heads}x{query}x{key} {name}"

    def eager(scores):
        return (scores * SCALE).masked_fill(future, float("-inf")).softmax(-1)

    def ours(scores):
        return kernel.scale_mask_softmax(scores, SCALE, causal=True)

    peers = {"eager": eager}
    apex = library("apex.transformer.functional.fused_softmax:scaled_upper_triang_masked_softmax", device)
    if apex and dtype != torch.float32 and query == key:
        peers["apex"] = lambda scores: apex(scores, None, SCALE)
    yield Case(
        f"scale_mask_softmax forward {named}", visible + whole,
        forward(scores)(ours), forward(scores), peers,
    )
    leaves = [scores.clone().requires_grad_()]
    yield Case(
        f"scale_mask_softmax backward {named}", 2 * visible + whole,
        backward(leaves, dy)(ours), backward(leaves, dy), peers,
    )
    drawn = kernel.WeightDropout(torch.arange(batch, device=device), (1, 2), 0.1)
    yield Case(  # both the weights and what is left of them are written
        f"scale_mask_softmax dropout forward {named}", visible + 2 * whole,
        lambda: kernel.scale_mask_softmax(scores, SCALE, causal=True, dropout=drawn),
        forward(scores), {"eager": lambda scores: dropout(eager(scores), *drawn)},
    )

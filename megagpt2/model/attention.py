"""Multi-head causal self-attention (Vaswani et al. 2017, section 3.2.2; GPT-2's order of q, k, v)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt2.kernels.scale_mask_softmax import WeightDropout, scale_mask_softmax
from megagpt2.model.layers import Builder, Dropout


def sdpa(q: Tensor, k: Tensor, v: Tensor, samples: Tensor, drop: Dropout) -> Tensor:
    """By torch's fused kernels, which never write the weights out. Their dropout draws from a generator, not from
    (sample, coordinate): the configuration does not choose them with attention dropout, and it is refused here."""
    if drop.active:
        raise ValueError("sdpa can't draw the masks of attention dropout: build the model with fused_softmax attention")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def reference(q: Tensor, k: Tensor, v: Tensor, samples: Tensor, drop: Dropout) -> Tensor:
    """In plain torch, as the formula stands."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [batch, heads, query, key]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return drop(weights, samples) @ v


def fused_softmax(q: Tensor, k: Tensor, v: Tensor, samples: Tensor, drop: Dropout) -> Tensor:
    """Megatron's way: two matrix products around one operator that scales, masks, normalizes and drops."""
    scores = q @ k.transpose(-1, -2)  # [batch, heads, query, key]
    dropout = WeightDropout(*drop.arguments(scores, samples)) if drop.active else None
    return scale_mask_softmax(scores, 1.0 / math.sqrt(q.shape[-1]), causal=True, dropout=dropout) @ v


# On a CPU in 16 bits torch's backward pass of sdpa is slow for short sequences. Forward and backward in bf16 it is
# 0.15 times as fast as fused_softmax at 16, 0.49 at 64, 0.83 at 256, 1.75 at 1024 and 2.2 at 4096
# (tools/bench/attention.py, two threads, no bf16 instructions). From 16 tokens on it is 0.98 to 3.1 times
# as fast in fp32 with gradients, and 1.15 to 5.8 times forward alone; a sequence of one loses a fifth.
_SHORT = 512


def automatic(device: str, size: int, length: int, training: bool, dropped: bool) -> str:
    """The faster one of sdpa and fused_softmax; fused_softmax where weights are dropped.

    device: "cpu" or "cuda"; size: bytes of an element; length: of the queries.
    """
    slow = device == "cpu" and size == 2 and training and length < _SHORT
    return "fused_softmax" if dropped or slow else "sdpa"


def auto(q: Tensor, k: Tensor, v: Tensor, samples: Tensor, drop: Dropout) -> Tensor:
    """By `automatic`."""
    chosen = automatic(q.device.type, q.element_size(), q.shape[-2], drop.training, drop.active)
    return ATTENTION[chosen](q, k, v, samples, drop)


ATTENTION = {"auto": auto, "sdpa": sdpa, "fused_softmax": fused_softmax, "reference": reference}
"""softmax(q k^T / sqrt(d), causal) v for q, k, v [batch, heads, sequence, d], with dropout on the weights."""


class Attention(nn.Module):
    """How many heads are here follows from the projection's width: a rank may hold any share of them."""

    def __init__(
        self, build: Builder, name: str, layer: int, *, width: int, heads: int, dropout: float,
        std: float, residual_std: float, recompute: bool,
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.c_attn = build.column_linear(f"{name}.c_attn", width, parts=3, units=heads, unit=self.head_width, std=std)
        self.c_proj = build.row_linear(f"{name}.c_proj", width, units=heads, unit=self.head_width, std=residual_std)
        self.dropout = build.dropout(dropout, layer, "attention", heads=heads)
        self.attend = ATTENTION[build.kernels.attention]
        self.recompute = recompute  # "selective" (Korthikanti et al. 2022, section 5): scores are made again

    def forward(self, x: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, sequence, width] -> (what to add to the residual stream, a bias to add to it)."""
        qkv = self.c_attn(x)  # [batch, sequence, 3 * local heads * head width]
        batch, sequence, _ = qkv.shape
        qkv = qkv.view(batch, sequence, 3, -1, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, local heads, sequence, head width]
        if self.recompute and torch.is_grad_enabled():
            y = checkpoint(
                self.attend, q, k, v, samples, self.dropout, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y = self.attend(q, k, v, samples, self.dropout)
        y = y.transpose(1, 2).reshape(batch, sequence, -1)  # [batch, sequence, local heads * head width]
        return self.c_proj(y)

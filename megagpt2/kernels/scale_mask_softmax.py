"""Attention weights: the softmax of scaled scores over the keys that a query sees, and dropout on them.

Contract (Vaswani et al. 2017, "Attention is all you need", section 3.2.1): scores [batch, heads, query, key],

    p = softmax(scale scores) over the visible keys, 0 elsewhere        y = p keep / (1 - probability), or p

A query sees the keys that neither `causal` nor `mask` hides: `causal` leaves query i keys 0 .. i + key - query, as the
last query sees all of them and the first key - query are a cache. Hidden scores are not used, whatever they are, and
those that `causal` hides are not read. A query that sees nothing has weights 0 and gradients 0, never NaN. A visible
infinity or NaN does to its row's visible weights what torch.softmax makes of it. All of it is computed in fp32 (float64
for float64) and rounded once.

    d scores = scale p (g - sum_keys(g p))      g = dy keep / (1 - probability), or dy

The mask of dropout is that of kernels/dropout.py: an element's number is its place in the sample's [heads, query, key],
plus `start`. It is drawn again in the backward pass, which needs p beside it: of its 16-bit rounding, where scores are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megagpt2.kernels.checks import check_dropout
from megagpt2.kernels.derivatives import last_derivative
from megagpt2.kernels.dropout import dropout_reference
from megagpt2.kernels.extension import EXTENSION, Worth
from megagpt2.kernels.fakes import contiguous_like

# The compiled operator cuts scores off at -126 / scale, which is no number in fp32 where the scale is smaller.
_LEAST_SCALE = 1e-36


# Where nothing is dropped (else the reference is slower everywhere). Times as fast as the reference on a CPU, two
# threads (tools/bench/break_even.py). Some keys hidden: forward 1.8 to 2.9 at 16,384 elements of rows of 64 and more,
# 3.3 to 17 at 1,048,576, with backward 1.1 to 1.7 and 2.7 to 6.8; rows of 16 0.8 to 1.7 at any size. None hidden:
# forward 0.8 to 1.1 at 16,384, 1.0 to 2.2 at 65,536, with backward 0.7 to 1.7 at 262,144 and 1.1 to 2.5 at 1,048,576 of
# rows of 256 and more; rows of 64 0.9 to 1.4 there, rows of 16 lose at any size.
WORTH = {  # (whether some keys are hidden, whether there are gradients)
    (True, False): Worth(narrowest=32), (True, True): Worth(fewest=2**14, narrowest=32),
    (False, False): Worth(fewest=2**16, narrowest=128), (False, True): Worth(fewest=2**19, narrowest=128),
}


class WeightDropout(NamedTuple):
    """Which weights are dropped: the arguments of kernels/dropout.py.

    samples: int64 [batch], the number of each sample in the run. probability: in [0, 1). start: number of the element
    [0, 0, 0] of each sample, where these heads are not the first.
    """

    samples: Tensor
    key: tuple[int, int]
    probability: float
    start: int = 0


def hidden_keys(scores: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """What a query doesn't see: bool, broadcastable to scores [batch, heads, query, key]."""
    query, key = scores.shape[-2:]
    hidden = torch.ones(query, key, dtype=torch.bool, device=scores.device).triu(1 + key - query)
    if not causal:
        hidden = torch.zeros_like(hidden)
    return hidden if mask is None else hidden | mask


def _sees_all(scores: Tensor, causal: bool, mask: Tensor | None) -> bool:
    """Whether nothing is hidden: under `causal` the last query sees all keys, and may be the only one."""
    return mask is None and (not causal or scores.shape[-2] == 1)


def scale_mask_softmax_reference(
    scores: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None,
    dropout: WeightDropout | None = None,
) -> Tensor:
    """`scale_mask_softmax` in plain torch, on any device and in any floating-point type."""
    x = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if _sees_all(scores, causal, mask):
        weights = x.softmax(dim=-1)
    else:
        hidden = hidden_keys(scores, causal, mask)
        weights = x.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        weights = weights.masked_fill(hidden, 0.0)  # a row that sees nothing is NaN before
    if dropout is not None:
        weights = dropout_reference(weights, *dropout)
    return weights.to(scores.dtype)


def scale_mask_softmax(
    scores: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None,
    dropout: WeightDropout | None = None,
) -> Tensor:
    """Attention weights of scores [batch, heads, query, key], of their type.

    mask: bool, broadcastable to scores' shape, true where a key is hidden from a query. Raises ValueError where the
    shapes don't fit.
    """
    _check(scores, mask, dropout)
    samples, key, probability, start = dropout or (None, (0, 0), 0.0, 0)
    tiny = 0.0 < abs(scale) < _LEAST_SCALE
    case = not _sees_all(scores, causal, mask), torch.is_grad_enabled() and scores.requires_grad
    if EXTENSION.serves(scores, mask, samples, worth=None if probability else WORTH[case]) and not tiny:
        mask = None if mask is None else mask.expand(scores.shape)
        return torch.ops.megagpt2.scale_mask_softmax(
            scores, scale, causal, mask, samples, *key, probability, start
        )[0]
    return scale_mask_softmax_reference(scores, scale, causal, mask, dropout)


def _check(scores: Tensor, mask: Tensor | None, dropout: WeightDropout | None) -> None:
    shape = tuple(scores.shape)
    if len(shape) != 4:
        raise ValueError(f"scores are {shape}: give [batch, heads, query, key]")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask is {mask.dtype}: give bool, true where a key is hidden")
        sizes = (*(1,) * (4 - mask.dim()), *mask.shape)
        if len(sizes) > 4 or any(size not in (1, whole) for size, whole in zip(sizes, shape, strict=True)):
            raise ValueError(f"the mask is {tuple(mask.shape)}: give a shape that broadcasts to the scores' {shape}")
    if dropout is not None:
        check_dropout(scores, *dropout)


def _fake(scores, scale, causal, mask, samples, key0, key1, probability, start):
    y = contiguous_like(scores)
    return y, scores.new_empty(0) if samples is None else torch.empty_like(y)


def _fake_backward(dy, weights, scale, causal, samples, key0, key1, probability, start):
    return contiguous_like(weights)


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.scale, ctx.causal, _, samples, *ctx.dropout = inputs
    y, weights = output
    ctx.mark_non_differentiable(weights)
    ctx.save_for_backward(y if samples is None else weights, samples)


@last_derivative
def _backward(ctx, dy, d_weights):
    weights, samples = ctx.saved_tensors
    d_scores = torch.ops.megagpt2.scale_mask_softmax_backward(
        dy, weights, ctx.scale, ctx.causal, samples, *ctx.dropout
    )
    return d_scores, *[None] * 8


if EXTENSION.compiled:
    torch.library.register_fake("megagpt2::scale_mask_softmax", _fake)
    torch.library.register_fake("megagpt2::scale_mask_softmax_backward", _fake_backward)
    torch.library.register_autograd("megagpt2::scale_mask_softmax", _backward, setup_context=_setup_context)

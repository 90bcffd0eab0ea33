"""The tied head and its cross-entropy in one operator, in chunks: the logits never exist as a whole.

Contract: hidden [tokens, width], weight [rows, width] (this rank's rows of the vocabulary, as many on every rank,
since they decide the chunks), targets int64 [tokens] in the whole vocabulary. Returns the mean over tokens of

    logsumexp_v(h . w_v) - h . w_target

The gradients are made in the forward pass, chunk by chunk, while the logits are there (the forward's GEMM
is not repeated):

    d logits = softmax(logits) - onehot(target)      d hidden = d logits W      d W = d logits^T hidden

They are kept unscaled, in [-1, 1] per token, and multiplied by grad_output / tokens in the backward pass, so
that fp16 does not lose them. With the vocabulary split over ranks, `maximum` and `total` reduce over them:
three numbers a token cross the network, never a logit; d hidden is then a partial sum, completed by
whoever split the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
_CHUNK_ELEMENTS = 1 << 22  # logits at a time: 16 MiB in fp32


def identity(x: Tensor) -> Tensor:
    return x


def _chunk_losses(
    logits: Tensor, targets: Tensor, first: int, rows: int, maximum: Reduce, total: Reduce
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [n] of one chunk; also softmax [n, rows] (in place of logits), local targets [n], whose they are.

    logits: fp32 [n, padded rows] of the words first, first + 1, ...; only the first `rows` of them exist,
    the rest pads the GEMM and takes no part.
    """
    logits[:, rows:] = float("-inf")
    peak = maximum(logits.amax(dim=1))  # finite: some rank has a word
    logits.sub_(peak[:, None])
    local = targets - first
    mine = (local >= 0) & (local < rows)
    local = local.clamp(0, max(rows - 1, 0))
    target_logit = total(torch.where(mine, logits.gather(1, local[:, None])[:, 0], 0.0))
    probability = logits.exp_()
    normalizer = total(probability.sum(dim=1))
    probability.div_(normalizer[:, None])
    return normalizer.log() - target_logit, probability, local, mine


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, rows: int,
    maximum: Reduce = identity, total: Reduce = identity,
) -> Tensor:
    """Loss of every token, fp32 [tokens], without gradients: for evaluation."""
    step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    with torch.no_grad():
        return torch.cat([
            _chunk_losses((h @ weight.T).float(), t, first, rows, maximum, total)[0]
            for h, t in zip(hidden.split(step), targets.split(step), strict=True)
        ])


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, first, rows, maximum, total):
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        loss = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
                           device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=loss.dtype, device=weight.device)
        for begin in range(0, len(hidden), step):
            h = hidden[begin : begin + step]  # [n, width]
            logits = (h @ weight.T).to(loss.dtype)  # [n, rows]
            losses, d_logits, local, mine = _chunk_losses(
                logits, targets[begin : begin + step], first, rows, maximum, total
            )
            loss += losses.sum()
            d_logits.scatter_add_(1, local[:, None], -mine[:, None].to(d_logits.dtype))
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[begin : begin + step] = d_logits @ weight
            if d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.T, h)
            else:
                d_weight += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad_output):
        d_hidden, d_weight = ctx.saved_tensors
        scale = grad_output / len(d_hidden)
        # Multiplied in the loss's precision: a factor rounded to bf16 would scale the whole network's gradient.
        d_hidden = (d_hidden.to(scale.dtype) * scale).to(d_hidden.dtype)
        return d_hidden, (d_weight * scale).to(ctx.weight_dtype), *[None] * 5


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, rows: int,
    maximum: Reduce = identity, total: Reduce = identity,
) -> Tensor:
    """Mean cross-entropy of targets under softmax(hidden weight^T): a scalar, fp32, with gradients.

    first: number of the word in this rank's row 0; rows: how many of its rows are words (the rest is padding,
    whose gradient is zero).
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return token_losses(hidden, weight, targets, first, rows, maximum, total).mean()
    return _HeadCrossEntropy.apply(hidden, weight, targets, first, rows, maximum, total)

"""The tied head and its cross-entropy in one operator, in chunks: the logits never exist as a whole.

Contract: hidden [tokens, width], weight [rows, width] (this rank's rows of the vocabulary, as many on every rank,
since they decide the chunks), targets int64 [tokens] in the whole vocabulary. Returns the mean over tokens of

    logsumexp_v(h . w_v) - h . w_target

The gradients are made in the forward pass, chunk by chunk, while the logits are there (the forward's GEMM
is not repeated):

    d logits = softmax(logits) - onehot(target)      d hidden = d logits W      d W = d logits^T hidden

They are kept unscaled, in [-1, 1] per token, and multiplied by grad_output / tokens in the backward pass, in place, so
that fp16 does not lose them: there is one backward pass. With the vocabulary split over ranks, `maximum` and `total`
reduce over them: three numbers a token cross the network, never a logit; d hidden is then a partial sum, completed by
whoever split the vocabulary.

The matrix products are torch's. Between them csrc/cross_entropy passes twice over a chunk of logits, in their type:

    cross_entropy_statistics    reads them: every row's maximum, sum of exponentials, target's logit
    cross_entropy_gradient_     reads them and writes d logits in their place

Beside the gradients that it returns it holds one chunk of logits and, for 16-bit weights, the lower halves of the fp32
sum that becomes d W (see split_sum): 38 MB + 161 MB for GPT-2 1542M in bf16, 75 MB in fp32, for any number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megagpt2.kernels.extension import EXTENSION
from megagpt2.kernels.split_sum import split_sum_add_, split_sum_round_

Reduce = Callable[[Tensor], Tensor]

# Logits at a time: 375 tokens of 50,304 words, 38 MB in 16 bits. A chunk reads W twice and reads and writes d W: with
# more tokens that matters less beside its matrix products.
_CHUNK_ELEMENTS = 18 << 20
# Elements at a time of a matrix product in 16 bits that is on its way into d W, or of which torch makes an fp32 copy on
# a CPU: 6 MB there. A GPU gets a product worth starting, 17 MB in fp32: its L2 cache still has it when it is added.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 22


def identity(x: Tensor) -> Tensor:
    return x


def cross_entropy_statistics_reference(logits: Tensor, targets: Tensor, first: int, words: int) -> Tensor:
    """`cross_entropy_statistics` in plain torch: on any device, and in float64 for float64."""
    x = _exact(logits[:, :words])
    local, mine = _local(targets, first, words)
    peak = x.amax(dim=1) if words else x.new_full((len(x),), float("-inf"))
    total = (x - torch.where(peak == float("-inf"), 0.0, peak)[:, None]).exp_().sum(dim=1)
    target = torch.where(mine, _exact(logits.gather(1, local[:, None])[:, 0]), 0.0)
    return torch.stack((peak, total, target))


def cross_entropy_statistics(logits: Tensor, targets: Tensor, first: int, words: int) -> Tensor:
    """Of each row of logits [n, rows]: maximum, sum of exp(logit - maximum), the target's logit: fp32 [3, n].

    Columns are the words first, first + 1, ... of which there are `words`, the rest is padding and takes no part. The
    target's logit is 0 where the target is not among them; without a word the maximum is -inf.
    """
    if EXTENSION.serves(logits, targets):
        return torch.ops.megagpt2.cross_entropy_statistics(logits, targets, first, words)
    return cross_entropy_statistics_reference(logits, targets, first, words)


def cross_entropy_gradient_reference_(
    logits: Tensor, targets: Tensor, maximum: Tensor, normalizer: Tensor, first: int, words: int
) -> None:
    """`cross_entropy_gradient_` in plain torch: on any device, and in float64 for float64."""
    local, mine = _local(targets, first, words)
    gradient = (_exact(logits) - maximum[:, None]).exp_() / normalizer[:, None]
    gradient.scatter_add_(1, local[:, None], -mine[:, None].to(gradient.dtype))
    gradient[:, words:] = 0.0
    logits.copy_(gradient)


def cross_entropy_gradient_(
    logits: Tensor, targets: Tensor, maximum: Tensor, normalizer: Tensor, first: int, words: int
) -> None:
    """Replace logits [n, rows], contiguous, by softmax - onehot(target), in their type; 0 in the padding.

    maximum and normalizer: fp32 [n], the largest logit and the sum of exp(logit - maximum) over the whole vocabulary.
    """
    if EXTENSION.serves(logits, targets, maximum, normalizer):
        torch.ops.megagpt2.cross_entropy_gradient_(logits, targets, maximum, normalizer, first, words)
    else:
        cross_entropy_gradient_reference_(logits, targets, maximum, normalizer, first, words)


def _exact(x: Tensor) -> Tensor:
    """In the precision of sums: fp32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def _local(targets: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """Column of every target (of another rank's targets: any column), and whether it is among these words."""
    local = targets - first
    return local.clamp(0, max(words - 1, 0)), (local >= 0) & (local < words)


def _tokens_at_a_time(tokens: int, rows: int) -> int:
    """Tokens of a chunk: all chunks are about as large, the same on every rank."""
    most = max(1, _CHUNK_ELEMENTS // rows)
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Rows of a 16-bit matrix product [rows, columns], a block at a time."""
    step = max(1, (_CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK) // max(1, columns))
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _logits(hidden: Tensor, weight: Tensor, space: Tensor) -> Tensor:
    """hidden weight^T, [n, rows], in the space of a chunk."""
    logits = space[: len(hidden)]
    if hidden.device.type != "cpu" or hidden.element_size() > 2:
        return torch.mm(hidden, weight.T, out=logits)
    for block in _blocks(len(weight), len(hidden), hidden.device):
        logits[:, block] = hidden @ weight[block].T
    return logits


def _losses(
    logits: Tensor, targets: Tensor, first: int, words: int, maximum: Reduce, total: Reduce
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of a chunk: loss, maximum and normalizer over the whole vocabulary."""
    peak, sums, target = cross_entropy_statistics(logits, targets, first, words)
    largest = maximum(peak)  # finite: some rank has a word
    _, mine = _local(targets, first, words)
    normalizer, target = total(torch.stack((sums * (peak - largest).exp(), torch.where(mine, target - largest, 0.0))))
    return normalizer.log() - target, largest, normalizer


def _add_product(d_weight: Tensor, low: Tensor | None, d_logits: Tensor, hidden: Tensor) -> None:
    """d weight += d logits^T hidden, in fp32: d weight's own, or that of split_sum's halves."""
    if low is None:
        d_weight.addmm_(d_logits.T, hidden)
        return
    wide = {"out_dtype": torch.float32} if hidden.is_cuda else {}  # a CPU's product is rounded to 16 bits
    for block in _blocks(*d_weight.shape, hidden.device):
        split_sum_add_(d_weight[block], low[block], torch.mm(d_logits[:, block].T, hidden, **wide))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, words: int) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {list(hidden.shape)} {hidden.dtype} and weight {list(weight.shape)} {weight.dtype}: "
            "give [tokens, width] and [rows, width] of one type"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {list(targets.shape)} {targets.dtype}: give int64 [{len(hidden)}]")
    if not 0 <= words <= len(weight):
        raise ValueError(f"rows is {words}: it must be in [0, {len(weight)}], the rows of weight")


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, rows: int,
    maximum: Reduce = identity, total: Reduce = identity,
) -> Tensor:
    """Loss of every token, fp32 [tokens], without gradients: for evaluation."""
    _check(hidden, weight, targets, rows)
    step = _tokens_at_a_time(len(hidden), len(weight))
    with torch.no_grad():
        space = hidden.new_empty(step, len(weight))
        return torch.cat([
            _losses(_logits(h, weight, space), t, first, rows, maximum, total)[0]
            for h, t in zip(hidden.split(step), targets.split(step), strict=True)
        ])


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, first, rows, maximum, total):
        step = _tokens_at_a_time(len(hidden), len(weight))
        d_hidden, d_weight = hidden.new_empty(hidden.shape), weight.new_zeros(weight.shape)
        low = weight.new_zeros(weight.shape, dtype=torch.int16) if weight.element_size() == 2 else None
        loss = _exact(hidden.new_zeros(()))
        space = hidden.new_empty(step, len(weight))
        for h, d_h, t in zip(hidden.split(step), d_hidden.split(step), targets.split(step), strict=True):
            logits = _logits(h, weight, space)  # [n, rows]
            losses, largest, normalizer = _losses(logits, t, first, rows, maximum, total)
            loss += losses.sum()
            cross_entropy_gradient_(logits, t, largest, normalizer, first, rows)
            torch.mm(logits, weight, out=d_h)
            _add_product(d_weight, low, logits, h)
        ctx.save_for_backward(d_hidden, d_weight, low)
        ctx.step = step
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad_output):
        d_hidden, d_weight, low = ctx.saved_tensors  # once they are scaled, autograd refuses to give them again
        scale = grad_output / len(d_hidden)
        if d_hidden.dtype == torch.float64:  # of gradcheck, which goes backward more than once
            return d_hidden * scale, d_weight * scale, *[None] * 5
        if low is None:
            return d_hidden.mul_(scale), d_weight.mul_(scale), *[None] * 5
        # Multiplied in the loss's precision: a factor rounded to bf16 would scale the whole network's gradient.
        for piece in d_hidden.split(ctx.step):
            piece.copy_(piece.float() * scale)
        split_sum_round_(d_weight, low, scale)
        return d_hidden, d_weight, *[None] * 5


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, rows: int,
    maximum: Reduce = identity, total: Reduce = identity,
) -> Tensor:
    """Mean cross-entropy of targets under softmax(hidden weight^T): a scalar, fp32, with gradients.

    first: number of the word in this rank's row 0; rows: how many of its rows are words (the rest is padding,
    whose gradient is zero). Raises ValueError for shapes and types that don't fit.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return token_losses(hidden, weight, targets, first, rows, maximum, total).mean()
    _check(hidden, weight, targets, rows)
    return _HeadCrossEntropy.apply(hidden, weight, targets, first, rows, maximum, total)


def _fake_statistics(logits, targets, first, words):
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


def _fake_gradient(logits, targets, maximum, normalizer, first, words) -> None:
    pass


if EXTENSION.compiled:  # they have no gradients: the head's are made of them
    torch.library.register_fake("megagpt2::cross_entropy_statistics", _fake_statistics)
    torch.library.register_fake("megagpt2::cross_entropy_gradient_", _fake_gradient)

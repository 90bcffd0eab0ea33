"""The tied head and its cross-entropy in one operator, in chunks: the logits never exist as a whole.

Contract: hidden [tokens, width], weight [rows, width] (this rank's rows of the vocabulary, as many on every rank,
since they decide the chunks), targets int64 [tokens] in the whole vocabulary. Returns the mean over tokens of

    logsumexp_v(h . w_v) - h . w_target

A target that is no word of any rank makes it NaN, and the gradients with it, rather than a plausible number; torch's
-100 for tokens that don't count is such a target.

The gradients are made in the forward pass, chunk by chunk, while the logits are there (the forward's GEMM
is not repeated):

    d logits = softmax(logits) - onehot(target)      d hidden = d logits W      d W = d logits^T hidden

They are multiplied by grad_output / tokens in the backward pass, in place: there is one backward pass, and no second
derivative. Until then a loss scale can't help fp16, which has no number between 0 and 6e-8 and few digits below 6e-5,
where most words' probabilities lie: in fp16 d logits are therefore multiplied by a power of two, which is divided out
together with the tokens, in fp32. What needs no gradient (`requires_grad` false) is neither computed nor kept.

With the vocabulary split over ranks, `maximum` and `total` reduce over them: four numbers a token cross the network,
never a logit; d hidden is then a partial sum, completed by whoever split the vocabulary.

The matrix products are torch's. Between them csrc/cross_entropy passes twice over a chunk of logits, in their type:

    cross_entropy_statistics    reads them: every row's maximum, sum of exponentials, target's logit
    cross_entropy_gradient_     reads them and writes d logits in their place

Beside the gradients that it returns it holds one chunk of logits and, for 16-bit weights, the lower halves of the fp32
sum that becomes d W (see split_sum): 50 MB + 161 MB for GPT-2 1542M in bf16, 100 MB in fp32, for any number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megagpt2.kernels.extension import EXTENSION, Worth
from megagpt2.kernels.in_place import check_no_gradient, written
from megagpt2.kernels.split_sum import split_sum_add_, split_sum_round_

Reduce = Callable[[Tensor], Tensor]

# Both passes over logits. Times as fast as the references on a CPU, which keep the same contract (tools/bench/
# break_even.py), two threads: 1.1 to 13 with 16 words or more, 0.7 to 3.1 with 4, 0.3 to 1.9 with one.
WORTH = Worth(narrowest=16)

# Logits at a time: 496 tokens of 50,304 words, 50 MB in 16 bits. A chunk reads W twice and reads and writes d W: with
# more tokens that matters less beside its matrix products. Whole blocks of tokens are what these are made of.
_CHUNK_ELEMENTS, _TOKENS_OF_A_BLOCK = 24 << 20, 16
# Elements at a time of a matrix product in 16 bits that is on its way into d W, or of which torch makes an fp32 copy on
# a CPU: 6 MB there. A GPU gets a product worth starting, 17 MB in fp32: its L2 cache still has it when it is added.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 22
# What d logits are multiplied by in fp16: its normal numbers then begin at a probability of 6e-8, its least at 6e-11. A
# loss scale S over T tokens multiplies plain torch's by S / T, 64 for 2**16 over 1024. d hidden is d logits W in fp16:
# the absolute values of a token's d logits add up to at most 2 x 2**10, so that no order of adding passes fp16's
# largest number, 65504, while every |weight| is below 31. Words' vectors begin at 0.02 and stay far from that.
_HALF_FACTOR = 2.0**10


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
    if EXTENSION.serves(logits, targets, worth=WORTH):
        return torch.ops.megagpt2.cross_entropy_statistics(logits, targets, first, words)
    return cross_entropy_statistics_reference(logits, targets, first, words)


def cross_entropy_gradient_reference_(
    logits: Tensor, targets: Tensor, maximum: Tensor, normalizer: Tensor, first: int, words: int, factor: float = 1.0
) -> None:
    """`cross_entropy_gradient_` in plain torch: on any device, and in float64 for float64."""
    local, mine = _local(targets, first, words)
    gradient = (_exact(logits) - maximum[:, None]).exp_() / normalizer[:, None]
    gradient.scatter_add_(1, local[:, None], -mine[:, None].to(gradient.dtype))
    gradient[:, words:] = 0.0
    logits.copy_(gradient.mul_(factor))


def cross_entropy_gradient_(
    logits: Tensor, targets: Tensor, maximum: Tensor, normalizer: Tensor, first: int, words: int, factor: float = 1.0
) -> None:
    """Replace logits [n, rows], contiguous, by factor * (softmax - onehot(target)), in their type; 0 in the padding.

    maximum and normalizer: fp32 [n], the largest logit and the sum of exp(logit - maximum) over the whole vocabulary.
    Raises ValueError for tensors that require a gradient: there is none; and for logits that aren't contiguous.
    """
    if not logits.is_contiguous():
        raise ValueError(f"logits have strides {logits.stride()}: give a contiguous tensor, its values are replaced")
    check_no_gradient(logits=logits, maximum=maximum, normalizer=normalizer)
    if EXTENSION.serves(logits, targets, maximum, normalizer, worth=WORTH):
        torch.ops.megagpt2.cross_entropy_gradient_(logits, targets, maximum, normalizer, first, words, factor)
        written(logits)
    else:
        cross_entropy_gradient_reference_(logits, targets, maximum, normalizer, first, words, factor)


def _exact(x: Tensor) -> Tensor:
    """In the precision of sums: fp32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def _local(targets: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """Column of every target (of another rank's targets: any column), and whether it is among these words."""
    local = targets - first
    return local.clamp(0, max(words - 1, 0)), (local >= 0) & (local < words)


def _tokens_at_a_time(tokens: int, rows: int) -> int:
    """Tokens of a chunk but the last: few chunks, as even as blocks of tokens allow, the same on every rank."""
    most = max(1, _CHUNK_ELEMENTS // rows)
    block = _TOKENS_OF_A_BLOCK if most >= _TOKENS_OF_A_BLOCK else 1
    chunks = max(1, -(-tokens // (most // block * block)))
    return max(1, -(-tokens // (chunks * block)) * block)


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
    normalizer, target, owners = total(torch.stack(
        (sums * (peak - largest).exp(), torch.where(mine, target - largest, 0.0), mine.to(sums.dtype))
    ))
    # A target that nobody owns would look like the likeliest word, at a distance of 0 from the maximum.
    normalizer = torch.where(owners == 1, normalizer, math.nan)
    return normalizer.log() - target, largest, normalizer


def _add_product(d_weight: Tensor, low: Tensor | None, d_logits: Tensor, hidden: Tensor, first: bool) -> None:
    """d weight += d logits^T hidden, in fp32: d weight's own, or that of split_sum's halves, zeros at first."""
    if low is None:
        torch.addmm(d_weight, d_logits.T, hidden, beta=0.0 if first else 1.0, out=d_weight)
        return
    for block in _blocks(*d_weight.shape, hidden.device):
        split_sum_add_(d_weight[block], low[block], _product(d_logits[:, block], hidden))


def _product(d_logits: Tensor, hidden: Tensor) -> Tensor:
    """d logits^T hidden, [rows, width], of a block in 16 bits: in fp32, except that of bf16 on a CPU, in bf16."""
    if hidden.is_cuda:
        return torch.mm(d_logits.T, hidden, out_dtype=torch.float32)
    if hidden.dtype == torch.bfloat16:  # which has fp32's range, and processors with instructions for it
        return torch.mm(d_logits.T, hidden)
    # fp16 has no room for a sum over thousands of tokens: a frequent word's passes 65504. So many tokens at a time that
    # the fp32 copies are no larger than a block.
    step = max(1, _CPU_BLOCK // max(1, d_logits.shape[1], hidden.shape[1]))
    product = hidden.new_zeros((d_logits.shape[1], hidden.shape[1]), dtype=torch.float32)
    for d, h in zip(d_logits.split(step), hidden.split(step), strict=True):
        product.addmm_(d.float().T, h.float())
    return product


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, words: int) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {list(hidden.shape)} {hidden.dtype} and weight {list(weight.shape)} {weight.dtype}: "
            "give [tokens, width] and [rows, width] of one type"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {list(targets.shape)} {targets.dtype}: give int64 [{len(hidden)}]")
    if not len(weight):
        raise ValueError(f"weight is {list(weight.shape)}: give at least one row, of padding where a rank has no word")
    if not 0 <= words <= len(weight):
        raise ValueError(f"rows is {words}: it must be in [0, {len(weight)}], the rows of weight")


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, rows: int,
    maximum: Reduce = identity, total: Reduce = identity,
) -> Tensor:
    """Loss of every token, fp32 [tokens], without gradients: for evaluation. NaN where no rank has the target."""
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
        ctx.step, ctx.tokens, ctx.spent = _tokens_at_a_time(len(hidden), len(weight)), len(hidden), False
        ctx.factor = _HALF_FACTOR if hidden.dtype == torch.float16 else 1.0
        d_hidden, d_weight, low = _gradients(hidden, weight, *ctx.needs_input_grad[:2])
        loss = _exact(hidden.new_zeros(()))
        space = hidden.new_empty(ctx.step, len(weight))
        parts = hidden.split(ctx.step)
        d_parts = [None] * len(parts) if d_hidden is None else d_hidden.split(ctx.step)
        for number, (h, d_h, t) in enumerate(zip(parts, d_parts, targets.split(ctx.step), strict=True)):
            logits = _logits(h, weight, space)  # [n, rows]
            losses, largest, normalizer = _losses(logits, t, first, rows, maximum, total)
            loss += losses.sum()
            cross_entropy_gradient_(logits, t, largest, normalizer, first, rows, ctx.factor)
            if d_h is not None:
                torch.mm(logits, weight, out=d_h)
            if d_weight is not None:
                _add_product(d_weight, low, logits, h, first=number == 0)
        ctx.save_for_backward(d_hidden, d_weight, low)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad_output):
        # torch's once_differentiable only notices a grad_output that has a gradient. These gradients depend on hidden
        # and weight too, which aren't kept: a second derivative would be silently zero, so it is refused at once.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("head_cross_entropy has no second derivative: go backward without create_graph")
        if ctx.spent:  # what is saved may be a copy of what was scaled: autograd's own check wouldn't see it
            raise RuntimeError(
                "this is the second backward pass through head_cross_entropy, and the first has scaled its gradients "
                "in place: compute the loss again, or ask for all gradients at once"
            )
        d_hidden, d_weight, low = ctx.saved_tensors
        scale = grad_output / (ctx.tokens * ctx.factor)
        if grad_output.dtype == torch.float64:  # of gradcheck, which goes backward more than once
            return *[None if x is None else x * scale for x in (d_hidden, d_weight)], *[None] * 5
        ctx.spent = True
        if d_hidden is not None:
            _scale_(d_hidden, scale, ctx.step)
        if low is not None:
            split_sum_round_(d_weight, low, scale)
        elif d_weight is not None:
            d_weight.mul_(scale)
        return d_hidden, d_weight, *[None] * 5


def _gradients(
    hidden: Tensor, weight: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for d hidden and for d weight's sum, in 16 bits with its lower halves: None for what nobody wants."""
    halves = weight.element_size() == 2
    return (
        hidden.new_empty(hidden.shape) if for_hidden else None,
        (weight.new_zeros if halves else weight.new_empty)(weight.shape) if for_weight else None,
        weight.new_zeros(weight.shape, dtype=torch.int16) if for_weight and halves else None,
    )


def _scale_(x: Tensor, scale: Tensor, step: int) -> None:
    """x *= scale in scale's precision: a factor rounded to bf16 would scale the whole network's gradient."""
    if x.dtype == scale.dtype:
        x.mul_(scale)
        return
    for piece in x.split(step):
        piece.copy_(piece.float() * scale)


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, rows: int,
    maximum: Reduce = identity, total: Reduce = identity,
) -> Tensor:
    """Mean cross-entropy of targets under softmax(hidden weight^T): a scalar, fp32, with gradients.

    first: number of the word in this rank's row 0; rows: how many of its rows are words (the rest is padding,
    whose gradient is zero). Raises ValueError for shapes and types that don't fit. A target that no rank has makes
    loss and gradients NaN (torch's -100 is one: there are no tokens that don't count). A second backward pass raises
    RuntimeError, and so does one with create_graph: there is no second derivative.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return token_losses(hidden, weight, targets, first, rows, maximum, total).mean()
    _check(hidden, weight, targets, rows)
    return _HeadCrossEntropy.apply(hidden, weight, targets, first, rows, maximum, total)


def _fake_statistics(logits, targets, first, words):
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


def _fake_gradient(logits, targets, maximum, normalizer, first, words, factor=1.0) -> None:
    pass


if EXTENSION.compiled:  # they have no gradients: the head's are made of them
    torch.library.register_fake("megagpt2::cross_entropy_statistics", _fake_statistics)
    torch.library.register_fake("megagpt2::cross_entropy_gradient_", _fake_gradient)

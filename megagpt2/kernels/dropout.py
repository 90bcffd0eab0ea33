"""Dropout whose mask is a function of (seed, layer, site, sample, coordinate): DESIGN D5.

Contract: y = x * keep / (1 - p), keep = [bits >= p * 2**32]; 0 where an element is dropped, whatever x is there.
The product is made in x's precision (fp32 for the 16-bit types, rounded once). The mask is never stored, neither for
the backward pass nor across recomputation: it is drawn again. The gradient is the same product,

    dx = dy * keep / (1 - p)

so the operator is its own derivative. csrc/dropout computes the same bits in one pass over x, on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt2.kernels.checks import check_dropout
from megagpt2.kernels.extension import EXTENSION, TYPES
from megagpt2.kernels.fakes import contiguous_like
from megagpt2.kernels.philox import random_bits, random_bits_reference


def keep_mask(key: tuple[int, int], probability: float, samples: Tensor, start: int, count: int) -> Tensor:
    """Which elements stay: bool [batch, count] for elements start .. start + count - 1 of each sample."""
    return random_bits(key, samples, start, count) >= int(probability * 2**32)


def dropout_reference(
    x: Tensor, samples: Tensor, key: tuple[int, int], probability: float, start: int = 0
) -> Tensor:
    """`dropout` in plain torch, on any device."""
    bits = random_bits_reference(key, samples, start, x.shape[1:].numel())
    keep = (bits >= int(probability * 2**32)).view(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - probability)), 0.0)


def dropout(x: Tensor, samples: Tensor, key: tuple[int, int], probability: float, start: int = 0) -> Tensor:
    """Drop elements of x [batch, ...]; each sample's elements are numbers start, start + 1, ... of its tensor.

    samples: int64 [batch], the number of each sample in the run, which never repeats. probability: in [0, 1).
    Raises ValueError for other arguments.
    """
    check_dropout(x, samples, key, probability, start)
    if EXTENSION.serves(x, samples, types=TYPES | {torch.float64}):
        return torch.ops.megagpt2.dropout(x, samples, *key, probability, start)
    return dropout_reference(x, samples, key, probability, start)


def _fake(x, samples, key0, key1, probability, start):
    return contiguous_like(x)


def _setup_context(ctx, inputs, output) -> None:
    _, samples, *ctx.arguments = inputs
    ctx.save_for_backward(samples)


def _backward(ctx, grad_output):
    (samples,) = ctx.saved_tensors
    return torch.ops.megagpt2.dropout(grad_output, samples, *ctx.arguments), *[None] * 5


if EXTENSION.compiled:
    torch.library.register_fake("megagpt2::dropout", _fake)
    torch.library.register_autograd("megagpt2::dropout", _backward, setup_context=_setup_context)

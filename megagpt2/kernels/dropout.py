"""Dropout whose mask is a function of (seed, layer, site, sample, coordinate): DESIGN D5.

Contract: y = x * keep / (1 - p), keep = [bits >= p * 2**16]; 0 where an element is dropped, whatever x is there.
The product is made in x's precision (fp32 for the 16-bit types, rounded once). The mask is never stored, neither for
the backward pass nor across recomputation: it is drawn again. The gradient is the same product,

    dx = dy * keep / (1 - p)

so the operator is its own derivative. csrc/dropout computes the same bits in one pass over x.

Two elements share a random word of kernels/philox.py, since drawing is most of the work: elements 2w and 2w + 1 of a
sample have the lower and the upper half of word w. p is rounded to a multiple of 2**-16, at most 1 - 2**-16, here as
in the factor: 0.1 is 0.10001, and the mean of y is that of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt2.kernels.checks import check_dropout
from megagpt2.kernels.extension import EXTENSION, TYPES
from megagpt2.kernels.fakes import contiguous_like
from megagpt2.kernels.philox import random_bits, random_bits_reference


def threshold_and_scale(probability: float) -> tuple[int, float]:
    """What an element's bits have to reach for it to stay, and the factor 1 / (1 - p) for the p that is rounded so."""
    threshold = min(int(probability * 2**16 + 0.5), 2**16 - 1)
    return threshold, 2**16 / (2**16 - threshold)


def keep_mask(
    key: tuple[int, int], probability: float, samples: Tensor, start: int, count: int, draw=random_bits
) -> Tensor:
    """Which elements stay: bool [batch, count] for elements start .. start + count - 1 of each sample."""
    first = start // 2
    words = draw(key, samples, first, (start + count + 1) // 2 - first)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, start % 2 : start % 2 + count]
    return bits >= threshold_and_scale(probability)[0]


def dropout_reference(
    x: Tensor, samples: Tensor, key: tuple[int, int], probability: float, start: int = 0
) -> Tensor:
    """`dropout` in plain torch, on any device."""
    keep = keep_mask(key, probability, samples, start, x.shape[1:].numel(), random_bits_reference).view(x.shape)
    return torch.where(keep, x * threshold_and_scale(probability)[1], 0.0)


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

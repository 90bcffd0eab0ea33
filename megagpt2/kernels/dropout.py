"""Dropout whose mask is a function of (seed, layer, site, sample, coordinate): DESIGN D5.

Contract: y = x * keep / (1 - p), keep = [bits >= p * 2**32]; the mask is never stored across recomputation,
it is drawn again. The gradient is the same product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt2.kernels.philox import random_bits


def keep_mask(key: tuple[int, int], probability: float, samples: Tensor, start: int, count: int) -> Tensor:
    """Which elements stay: bool [batch, count] for elements start .. start + count - 1 of each sample."""
    return random_bits(key, samples, start, count) >= int(probability * 2**32)


def dropout(x: Tensor, samples: Tensor, key: tuple[int, int], probability: float, start: int = 0) -> Tensor:
    """Drop elements of x [batch, ...]; each sample's elements are numbers start, start + 1, ... of its tensor.

    samples: int64 [batch], the number of each sample in the run, which never repeats.
    """
    keep = keep_mask(key, probability, samples, start, x[0].numel()).view(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - probability)), 0.0)

"""What the operators ask of their arguments, in words for those who call them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_vector(x: Tensor, vector: Tensor, name: str) -> None:
    """Raise ValueError unless `vector` has one element for each column of x [..., width], of x's type."""
    if vector.dim() != 1 or vector.shape != x.shape[-1:] or vector.dtype != x.dtype:
        raise ValueError(
            f"{name} is {vector.dtype} {list(vector.shape)} and x {x.dtype} {list(x.shape)}: give one element of "
            f"x's type for each column of x"
        )


def check_same(x: Tensor, other: Tensor, name: str) -> None:
    """Raise ValueError unless `other` has x's shape and type."""
    if other.shape != x.shape or other.dtype != x.dtype:
        raise ValueError(
            f"{name} is {other.dtype} {list(other.shape)} and x {x.dtype} {list(x.shape)}: give both alike"
        )


def checked_dropout(
    x: Tensor, samples: Tensor | None, key: tuple[int, int], probability: float, start: int
) -> tuple[Tensor | None, tuple[int, int], float, int]:
    """The arguments of a dropout inside another operator; at probability 0 those that draw nothing, without samples.
    Raises ValueError unless x [batch, ..., width] can be dropped with them."""
    if probability == 0.0:
        return None, (0, 0), 0.0, 0
    if samples is None:
        raise ValueError(f"probability is {probability} but there are no samples: give one for each x[i]")
    if x.dim() < 2:
        raise ValueError(f"x is {list(x.shape)}: dropout needs [batch, ..., width], whose x[i] are samples")
    check_dropout(x, samples, key, probability, start)
    return samples, key, probability, start


def check_dropout(x: Tensor, samples: Tensor, key: tuple[int, int], probability: float, start: int) -> None:
    """Raise ValueError unless x [batch, ...] can be dropped with these arguments of kernels/dropout.py."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"probability is {probability}: it must be at least 0 and below 1")
    if samples.dtype != torch.int64 or samples.dim() != 1 or samples.shape != x.shape[:1]:
        raise ValueError(
            f"samples are {samples.dtype} {list(samples.shape)} and x is {list(x.shape)}: give an int64 number for "
            "each x[i]"
        )
    if not all(0 <= word < 2**32 for word in key):
        raise ValueError(f"key is {key}: give two words in [0, 2**32), as key_of makes them")
    if start < 0:
        raise ValueError(f"start is {start}: elements have numbers from 0 on")

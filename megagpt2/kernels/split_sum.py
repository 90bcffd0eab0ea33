"""A sum in fp32 that grows where its 16-bit result will be: half the memory of an fp32 accumulator beside the result.

Contract: the float32's bits lie in two tensors of one shape,

    high (bf16 or fp16, whose bits mean nothing until the end)    the sum's upper 16 bits
    low (int16)                                                   its lower 16 bits

Both begin as zeros. `split_sum_add_` adds fp32 or 16-bit terms, rounding as fp32 does; `split_sum_round_` turns high
into sum * scale, rounded once. Every bit is that of an fp32 accumulator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt2.kernels.extension import EXTENSION
from megagpt2.kernels.in_place import check_no_gradient, written


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """The sums, fp32."""
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split_sum_add_reference_(high: Tensor, low: Tensor, x: Tensor) -> None:
    """`split_sum_add_` in plain torch, on any device."""
    sums = (_joined(high, low) + x).view(torch.int32)
    high.view(torch.int16).copy_(sums >> 16)
    low.copy_(sums)  # the lower 16 bits: int16 wraps


def split_sum_round_reference_(high: Tensor, low: Tensor, scale: Tensor) -> None:
    """`split_sum_round_` in plain torch, on any device."""
    high.copy_(_joined(high, low) * scale)


def _check_shapes(high: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        if x.shape != high.shape:
            raise ValueError(f"{name} is {list(x.shape)} and high {list(high.shape)}: give both of one shape")


def split_sum_add_(high: Tensor, low: Tensor, x: Tensor) -> None:
    """Add x (fp32, or of high's type) to the sum in high and low, which are contiguous.

    Raises ValueError for shapes that differ, and for tensors that require a gradient: there is none.
    """
    _check_shapes(high, low=low, x=x)
    check_no_gradient(high=high, x=x)
    if EXTENSION.serves(high, low, x):
        torch.ops.megagpt2.split_sum_add_(high, low, x)
        written(high, low)
    else:
        split_sum_add_reference_(high, low, x)


def split_sum_round_(high: Tensor, low: Tensor, scale: Tensor) -> None:
    """Replace high by its sum times scale (fp32, one element). Raises ValueError as `split_sum_add_` does."""
    _check_shapes(high, low=low)
    check_no_gradient(high=high, scale=scale)
    if EXTENSION.serves(high, low, scale):
        torch.ops.megagpt2.split_sum_round_(high, low, scale)
        written(high)
    else:
        split_sum_round_reference_(high, low, scale)


def _fake(high, low, x) -> None:
    pass


if EXTENSION.compiled:  # they have no gradient: what is summed here is one
    torch.library.register_fake("megagpt2::split_sum_add_", _fake)
    torch.library.register_fake("megagpt2::split_sum_round_", _fake)

"""What the operators' fake implementations share."""

from __future__ import annotations

import torch
from torch import Tensor


def contiguous_like(x: Tensor) -> Tensor:
    """A result of x's shape, type and device as every operator makes it, whatever the strides of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)

"""What an operator that writes into its arguments owes autograd, which sees nothing of it."""

from __future__ import annotations

import torch
from torch import Tensor


def check_no_gradient(**tensors: Tensor) -> None:
    """Raise ValueError if an argument of the operator wants a gradient: it would silently get a wrong one, or none."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, which this operator doesn't have: give {name}.detach(), or call it "
                    "under torch.no_grad()"
                )


def written(*tensors: Tensor) -> None:
    """Tell autograd that the values have changed, so that a backward pass which saved them raises.

    A traced program needs none of it: there the operator's schema says what it writes.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)

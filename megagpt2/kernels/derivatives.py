"""Gradients that can't be differentiated again say so, when somebody tries."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class _Last(torch.autograd.Function):
    """Gradients as they are. differentiable: a tensor that requires a gradient, so that they do."""

    @staticmethod
    def forward(ctx, differentiable: Tensor, *gradients: Tensor | None):
        return gradients

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError(
            "the compiled operators have no second derivative: set MEGAGPT2_REFERENCE=1 for those in plain torch"
        )


def last_derivative(backward: Callable) -> Callable:
    """For the backward(ctx, *upstream) of an operator whose backward operator has no gradient itself.

    torch would take that for a gradient of zero, with a warning: here it raises RuntimeError. (torch's
    once_differentiable lets a gradient through that depends on saved tensors alone.)
    """

    @functools.wraps(backward)
    def wrapped(ctx, *upstream):
        if not torch.is_grad_enabled():  # nobody will differentiate it
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        return _Last.apply(torch.empty(0, requires_grad=True), *gradients)

    return wrapped

"""residual + dropout(x + bias): how the output of attention and of the MLP joins the residual stream.

Contract: x [batch, ..., width], bias [width] or None, residual like x, of one type;

    z = residual + (x + bias) keep / (1 - p)      keep = [bits >= p * 2**16], of kernels/dropout.py

in fp32, with one rounding at the end (the reference rounds at every operation). Where an element is dropped, z is the
residual, whatever x is there. The mask is never stored but drawn again for the gradients

    d residual = dz      dx = dz keep / (1 - p)      d bias = sum_rows dx

where the sum is of unrounded values, in blocks of rows that depend on the shape alone: its bits depend on neither
threads nor timing. At p = 0 dx is dz itself, and nothing is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt2.kernels.checks import check_same, check_vector, checked_dropout
from megagpt2.kernels.derivatives import last_derivative
from megagpt2.kernels.dropout import dropout_reference
from megagpt2.kernels.extension import EXTENSION, Worth
from megagpt2.kernels.fakes import contiguous_like

# Where nothing is dropped (else the reference is slower everywhere). Times as fast as torch on a CPU, two threads,
# forward and with backward (tools/bench/break_even.py): 0.6 to 2.0 at 1,048,576 elements, 1.0 to 2.2 at 4,194,304, of
# rows of 64 or more; of rows of 16 in fp32 0.2 to 0.4 there, of one element 0.05.
WORTH = Worth(fewest=2**21, narrowest=64)


def bias_dropout_add_reference(
    x: Tensor, bias: Tensor | None, residual: Tensor, samples: Tensor | None = None, key: tuple[int, int] = (0, 0),
    probability: float = 0.0, start: int = 0,
) -> Tensor:
    """`bias_dropout_add` in plain torch, on any device and in any floating-point type."""
    h = x if bias is None else x + bias
    return residual + (h if samples is None else dropout_reference(h, samples, key, probability, start))


def bias_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor, samples: Tensor | None = None, key: tuple[int, int] = (0, 0),
    probability: float = 0.0, start: int = 0,
) -> Tensor:
    """residual + dropout(x + bias), for x [batch, ..., width], bias [width] or None, and residual like x.

    samples, key, probability and start are those of `dropout`, and not looked at where the probability is 0.
    Raises ValueError for tensors that don't fit.
    """
    if not x.dim():
        raise ValueError("x is a scalar: give [batch, ..., width]")
    if bias is not None:
        check_vector(x, bias, "bias")
    check_same(x, residual, "residual")
    samples, key, probability, start = checked_dropout(x, samples, key, probability, start)
    if EXTENSION.serves(x, bias, residual, samples, worth=None if probability else WORTH):
        return torch.ops.megagpt2.bias_dropout_add(x, bias, residual, samples, *key, probability, start)
    return bias_dropout_add_reference(x, bias, residual, samples, key, probability, start)


def _fake(x, bias, residual, samples, key0, key1, probability, start):
    return contiguous_like(x)


def _fake_backward(dz, samples, key0, key1, probability, start):
    return dz.new_empty(0) if samples is None else contiguous_like(dz), dz.new_empty(dz.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    _, bias, _, samples, *ctx.arguments = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(samples)


@last_derivative
def _backward(ctx, dz):
    (samples,) = ctx.saved_tensors
    dx, d_bias = dz, None
    if ctx.with_bias:
        drawn, d_bias = torch.ops.megagpt2.bias_dropout_add_backward(dz, samples, *ctx.arguments)
        dx = dz if samples is None else drawn
    elif samples is not None:
        dx = torch.ops.megagpt2.dropout(dz, samples, *ctx.arguments)
    return dx, d_bias, dz, *[None] * 5


if EXTENSION.compiled:
    torch.library.register_fake("megagpt2::bias_dropout_add", _fake)
    torch.library.register_fake("megagpt2::bias_dropout_add_backward", _fake_backward)
    torch.library.register_autograd("megagpt2::bias_dropout_add", _backward, setup_context=_setup_context)

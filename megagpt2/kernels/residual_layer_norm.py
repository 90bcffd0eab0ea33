"""z = residual + dropout(x + bias) and y = layer_norm(z): a layer's output joins the stream, the next layer reads it.

Contract: x [batch, ..., width], bias [width] or None, residual like x, weight and norm_bias [width], of one type. z is
what `bias_dropout_add` gives, rounded once, and y what `layer_norm` gives of the rounded z:

    z = residual + (x + bias) keep / (1 - p)      y = (z - mean) rstd weight + norm_bias

Beside z, mean and rstd of its rows are kept. With dz, what arrives at z from elsewhere, added before it is rounded:

    d residual = dz + the gradient of layer_norm      d weight, d norm_bias as in layer_norm
    dx = d residual keep / (1 - p)                    d bias = sum_rows dx

The sums over rows are made in blocks that depend on the shape alone, so that their bits depend on neither threads nor
timing. csrc/layer_norm writes z once and reads it in the backward pass alone; the mask is drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt2.kernels.bias_dropout_add import bias_dropout_add_reference
from megagpt2.kernels.checks import check_same, check_vector, checked_dropout
from megagpt2.kernels.derivatives import last_derivative
from megagpt2.kernels.extension import EXTENSION, Worth
from megagpt2.kernels.fakes import contiguous_like
from megagpt2.kernels.layer_norm import layer_norm_reference

# Where nothing is dropped (else the reference is slower everywhere). Times as fast as torch on a CPU, two threads,
# forward and with backward (tools/bench/break_even.py), of rows of 256 or more: in fp32 0.7 to 1.1 at 1,048,576
# elements, 0.9 to 1.4 at 4,194,304, in bf16 0.9 to 1.9 and 1.1 to 1.9; rows of 64 in fp32 0.8 to 0.9 there.
WORTH = Worth(fewest=2**21, narrowest=128)


def residual_layer_norm_reference(
    x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor, epsilon: float,
    samples: Tensor | None = None, key: tuple[int, int] = (0, 0), probability: float = 0.0, start: int = 0,
) -> tuple[Tensor, Tensor]:
    """`residual_layer_norm` in plain torch, on any device and in any floating-point type."""
    z = bias_dropout_add_reference(x, bias, residual, samples, key, probability, start)
    return z, layer_norm_reference(z, weight, norm_bias, epsilon)


def residual_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor, epsilon: float,
    samples: Tensor | None = None, key: tuple[int, int] = (0, 0), probability: float = 0.0, start: int = 0,
) -> tuple[Tensor, Tensor]:
    """z = residual + dropout(x + bias) and layer_norm(z), for x [batch, ..., width].

    bias [width] or None; residual like x; weight and norm_bias [width]. samples, key, probability and start are those
    of `dropout`, and not looked at where the probability is 0. Raises ValueError for tensors that don't fit.
    """
    for vector, name in ((bias, "bias"), (weight, "weight"), (norm_bias, "norm_bias")):
        if vector is not None:
            check_vector(x, vector, name)
    check_same(x, residual, "residual")
    samples, key, probability, start = checked_dropout(x, samples, key, probability, start)
    worth = None if probability else WORTH
    if EXTENSION.serves(x, bias, residual, weight, norm_bias, samples, worth=worth):
        z, y, _, _ = torch.ops.megagpt2.residual_layer_norm(
            x, bias, residual, weight, norm_bias, epsilon, samples, *key, probability, start
        )
        return z, y
    return residual_layer_norm_reference(
        x, bias, residual, weight, norm_bias, epsilon, samples, key, probability, start
    )


def _fake(x, bias, residual, weight, norm_bias, epsilon, samples, key0, key1, probability, start):
    rows = x.shape[:-1].numel()
    return contiguous_like(x), contiguous_like(x), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


def _fake_backward(dy, dz, z, mean, rstd, weight, samples, key0, key1, probability, start):
    dx = z.new_empty(0) if samples is None else contiguous_like(z)
    return contiguous_like(z), dx, *(torch.empty_like(weight) for _ in range(3))


def _setup_context(ctx, inputs, output) -> None:
    _, bias, _, weight, _, _, samples, *ctx.arguments = inputs
    z, _, mean, rstd = output
    ctx.with_bias = bias is not None
    ctx.save_for_backward(z, mean, rstd, weight, samples)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # z may have no other reader: then there is no dz to add


@last_derivative
def _backward(ctx, dz, dy, d_mean, d_rstd):
    z, mean, rstd, weight, samples = ctx.saved_tensors
    d_residual, dx, d_bias, d_weight, d_norm_bias = torch.ops.megagpt2.residual_layer_norm_backward(
        torch.zeros_like(z) if dy is None else dy, dz, z, mean, rstd, weight, samples, *ctx.arguments
    )
    dx = d_residual if samples is None else dx
    return dx, d_bias if ctx.with_bias else None, d_residual, d_weight, d_norm_bias, *[None] * 6


if EXTENSION.compiled:
    torch.library.register_fake("megagpt2::residual_layer_norm", _fake)
    torch.library.register_fake("megagpt2::residual_layer_norm_backward", _fake_backward)
    torch.library.register_autograd("megagpt2::residual_layer_norm", _backward, setup_context=_setup_context)

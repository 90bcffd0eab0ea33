"""Layer normalization over the last dimension (Ba et al. 2016, "Layer normalization", equation 3).

Contract: x [..., width], weight and bias [width], all of one type;

    y = (x - mean) rstd weight + bias      mean = mean(x)      rstd = 1 / sqrt(mean((x - mean)**2) + epsilon)

with sums in fp32 (float64 for float64), one rounding at the end. mean and rstd, fp32 [rows], are what the backward
pass needs beside x:

    dx = rstd (g - mean(g) - xhat mean(g xhat))      g = dy weight      xhat = (x - mean) rstd
    d weight = sum_rows dy xhat                      d bias = sum_rows dy

The sums over rows are made in blocks that depend on the shape alone, so that their bits depend on neither threads nor
timing. csrc/layer_norm reads x once in each pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt2.kernels.checks import check_vector
from megagpt2.kernels.derivatives import last_derivative
from megagpt2.kernels.extension import EXTENSION, Worth
from megagpt2.kernels.fakes import contiguous_like

# Times as fast as torch on a CPU, two threads, forward and with backward (tools/bench/break_even.py): 0.6 to 1.4 at
# 262,144 elements, at 1,048,576 1.2 to 2.1 in bf16 and 0.7 to 1.6 in fp32, at 4,194,304 1.4 to 2.3 and 0.9 to 1.6.
WORTH = Worth(fewest=2**21, narrowest=64)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`layer_norm` by torch's own, on any device and in any floating-point type."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalize x [..., width], scale by weight [width] and shift by bias [width], of x's type.

    Raises ValueError for another weight or bias.
    """
    check_vector(x, weight, "weight")
    check_vector(x, bias, "bias")
    if EXTENSION.serves(x, weight, bias, worth=WORTH):
        return torch.ops.megagpt2.layer_norm(x, weight, bias, epsilon)[0]
    return layer_norm_reference(x, weight, bias, epsilon)


def layer_norm_apex(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`layer_norm` by apex, which is optional: config/facts.py finds out whether it is there."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, weight, bias, tuple(weight.shape), epsilon)


BACKENDS = {"fused": layer_norm, "apex": layer_norm_apex, "torch": layer_norm_reference}


def _fake(x, weight, bias, epsilon):
    rows = x.shape[:-1].numel()
    return contiguous_like(x), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


def _fake_backward(dy, x, mean, rstd, weight, dz):
    return contiguous_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd


@last_derivative
def _backward(ctx, dy, d_mean, d_rstd):
    if dy is None:
        return None, None, None, None
    x, mean, rstd, weight = ctx.saved_tensors
    return *torch.ops.megagpt2.layer_norm_backward(dy, x, mean, rstd, weight, None), None


if EXTENSION.compiled:
    torch.library.register_fake("megagpt2::layer_norm", _fake)
    torch.library.register_fake("megagpt2::layer_norm_backward", _fake_backward)
    torch.library.register_autograd("megagpt2::layer_norm", _backward, setup_context=_setup_context)

"""GELU of x + bias in the tanh form (Hendrycks and Gimpel 2016, "Gaussian error linear units", section 2).

Contract: x [..., width], bias [width], of one type;

    y = gelu(x + bias)      gelu(h) = h (1 + tanh(u)) / 2      u = sqrt(2 / pi) (h + 0.044715 h**3)

in fp32, with one rounding at the end (the reference rounds x + bias too). Nothing but x and bias is kept for

    dx = dy gelu'(x + bias)      d bias = sum_rows dx

where the sum is of unrounded values, in blocks of rows that depend on the shape alone: its bits depend on neither
threads nor timing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt2.kernels.checks import check_vector
from megagpt2.kernels.derivatives import last_derivative
from megagpt2.kernels.extension import EXTENSION, Worth
from megagpt2.kernels.fakes import contiguous_like

# Times as fast as torch on a CPU, two threads, forward and with backward (tools/bench/break_even.py): 0.8 to 1.5 at
# 16,384 elements, 1.2 to 2.8 at 65,536, 1.7 to 4.0 at 262,144 of rows of 16 or more; rows of 4 with backward 0.7 to
# 1.2 from there on, of one element 0.2.
WORTH = Worth(fewest=2**16, narrowest=16)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` in plain torch, on any device and in any floating-point type."""
    return F.gelu(x + bias, approximate="tanh")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) for x [..., width] and bias [width] of x's type; raises ValueError for another bias."""
    check_vector(x, bias, "bias")
    if EXTENSION.serves(x, bias, worth=WORTH):
        return torch.ops.megagpt2.bias_gelu(x, bias)
    return bias_gelu_reference(x, bias)


def _fake(x, bias):
    return contiguous_like(x)


def _fake_backward(dy, x, bias):
    return contiguous_like(x), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


@last_derivative
def _backward(ctx, dy):
    return torch.ops.megagpt2.bias_gelu_backward(dy, *ctx.saved_tensors)


if EXTENSION.compiled:
    torch.library.register_fake("megagpt2::bias_gelu", _fake)
    torch.library.register_fake("megagpt2::bias_gelu_backward", _fake_backward)
    torch.library.register_autograd("megagpt2::bias_gelu", _backward, setup_context=_setup_context)

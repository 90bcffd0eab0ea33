"""Every operator with a gradient as a function of tensors, beside its reference: for what all of them must do.

Run as a program it compares them with float64 on the vector instructions of MEGAGPT2_CPU; with the argument `bits` it
prints a hash of everything that they compute.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megagpt2.kernels.bias_dropout_add import bias_dropout_add, bias_dropout_add_reference
from megagpt2.kernels.bias_gelu import bias_gelu, bias_gelu_reference
from megagpt2.kernels.layer_norm import layer_norm, layer_norm_reference
from megagpt2.kernels.residual_layer_norm import residual_layer_norm, residual_layer_norm_reference
from megagpt2.kernels.scale_mask_softmax import WeightDropout, scale_mask_softmax, scale_mask_softmax_reference
from tests.support.kernels import TYPES, assert_as_exact, with_gradients

KEY = (11, 12)
EPSILON = 1e-5


@dataclass(frozen=True)
class Operator:
    """ours and reference: functions of tensors of these shapes, of one type, whose first result counts."""

    name: str
    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for shape in self.shapes]


def operators(rows: int, width: int, probability: float = 0.0, device: str = "cpu") -> list[Operator]:
    """On x [2, rows, width]; attention weights for `rows` queries and `width` keys."""
    x, vector = (2, rows, width), (width,)
    drop = {"samples": torch.tensor([5, 2**40], device=device), "key": KEY, "probability": probability, "start": 3}
    weights = None if probability == 0.0 else WeightDropout(drop["samples"], KEY, probability, 3)

    def stream(function, x, bias, residual, weight, norm_bias):
        """The residual stream and its norm, both of which count."""
        return torch.cat(function(x, bias, residual, weight, norm_bias, EPSILON, **drop), dim=-1)

    return [
        Operator("layer_norm", partial(layer_norm, epsilon=EPSILON), partial(layer_norm_reference, epsilon=EPSILON),
                 [x, vector, vector]),
        Operator("residual_layer_norm", partial(stream, residual_layer_norm),
                 partial(stream, residual_layer_norm_reference), [x, vector, x, vector, vector]),
        Operator("bias_gelu", bias_gelu, bias_gelu_reference, [x, vector]),
        Operator("bias_dropout_add", partial(bias_dropout_add, **drop), partial(bias_dropout_add_reference, **drop)
                 if probability else lambda x, bias, residual: bias_dropout_add_reference(x, bias, residual),
                 [x, vector, x]),
        Operator("scale_mask_softmax", partial(scale_mask_softmax, scale=0.7, causal=True, dropout=weights),
                 partial(scale_mask_softmax_reference, scale=0.7, causal=True, dropout=weights), [(2, 3, rows, width)]),
    ]


def compare(operator: Operator, dtype: torch.dtype) -> None:
    """Invariant I8: against float64 ours is about as exact as torch's, result and gradients."""
    inputs = operator.inputs(dtype)
    with torch.no_grad():
        dy = torch.randn(operator.reference(*inputs).shape).to(dtype)
    found = with_gradients(operator.ours, inputs, dy)
    torchs = with_gradients(operator.reference, inputs, dy)
    exact = with_gradients(operator.reference, [t.double() for t in inputs], dy.double())
    scale = 2 * math.sqrt(dy.numel() / dy.shape[-1]) * dy.abs().max().item()  # of terms that cancel
    for number, three in enumerate(zip(found, exact, torchs, strict=True)):
        assert_as_exact(*three, f"{operator.name} {dtype} {list(dy.shape)}, result {number}", scale)


def compare_nans(operator: Operator, dtype: torch.dtype, bits: int) -> None:
    """A NaN of these 16 bits in an input makes NaNs of the same results as in torch, whatever its other bits are."""
    nan = torch.tensor(bits - 2**16 if bits >= 2**15 else bits, dtype=torch.int16).view(dtype)
    assert nan.isnan()
    for number in range(len(operator.shapes)):
        inputs = operator.inputs(dtype)
        inputs[number].view(-1)[1] = nan
        with torch.no_grad():
            dy = torch.randn(operator.reference(*inputs).shape).to(dtype)
        found, expected = (with_gradients(f, inputs, dy) for f in (operator.ours, operator.reference))
        results = 1 if operator.name == "scale_mask_softmax" else len(found)  # a gradient times a weight of 0 is no NaN
        for one, other in zip(found[:results], expected, strict=False):
            assert torch.equal(one.isnan(), other.isnan()), f"{operator.name} {dtype} {bits:04x} in input {number}"


def all_bits() -> str:
    """Of results and gradients, also of shapes whose rows fill cache lines."""
    digest = hashlib.sha256()
    for rows, width in (*sizes(), (3, 64), (5, 96), (70, 160), (33, 1024)):
        for probability in (0.0, 0.3):
            for operator in operators(rows, width, probability):
                for dtype in TYPES:
                    inputs = operator.inputs(dtype)
                    with torch.no_grad():
                        dy = torch.randn(operator.reference(*inputs).shape).to(dtype)
                    for tensor in with_gradients(operator.ours, inputs, dy):
                        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def sizes() -> Iterator[tuple[int, int]]:
    """Rows and widths: every tail of a vector, and some vectors together."""
    yield from ((3, width) for width in range(1, 36))
    yield from ((40, 255), (5, 1600), (2, 1601))


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:] == ["bits"]:
        print(all_bits())
        sys.exit()
    for rows, width in sizes():
        for probability in (0.0, 0.3):
            for operator in operators(rows, width, probability):
                for dtype in TYPES:
                    compare(operator, dtype)
    for operator in operators(3, 70):
        for dtype, quiet in ((torch.bfloat16, 0x7FC0), (torch.float16, 0x7E00)):
            for bits in (quiet, 0x7FFF, 0xFFFF, 0xFF81):
                compare_nans(operator, dtype, bits)
    for value in (-3e38, 1e12, 4e9):  # scores whose product with the scale is rounded by more than exp can take
        scores = value * (1 - 1e-3 * torch.rand(1, 1, 1, 64))
        y = scale_mask_softmax(scores, 0.3)
        exact = scale_mask_softmax_reference(scores.double(), 0.3)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-6)
    print("as exact")

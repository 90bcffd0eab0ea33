"""Layer normalization of csrc/: as exact as torch's at every shape, and the same bits every time (invariant I8)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.kernels.layer_norm import layer_norm, layer_norm_reference
from tests.support.kernels import (
    TYPES,
    assert_as_exact,
    assert_threads_decide_nothing,
    compiled,
    devices,
    poisoned,
    with_gradients,
)

EPSILON = 1e-5


@st.composite
def inputs(draw):
    """x of any shape, layout, offset and scale, with weight, bias and dy."""
    width = draw(st.one_of(st.integers(1, 70), st.sampled_from([768, 1023, 1600, 1601])))
    shape = (*draw(st.lists(st.integers(0, 5), max_size=2)), width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(TYPES))
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * draw(st.sampled_from([1.0, 1e-3, 30.0])) + draw(st.sampled_from([0.0, 1.0, -20.0]))
    weight, bias = (torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(2))
    x, dy, weight, bias = (t.to(dtype) for t in (x, dy, weight, bias))
    if draw(st.booleans()):  # strided, with the same values
        x, dy = (torch.stack([t, t], dim=-1)[..., 0] for t in (x, dy))
    return x, weight, bias, dy


@compiled
@devices
@given(inputs())
@settings(max_examples=150)
def test_values_and_gradients_are_as_exact_as_torchs(device, given_inputs):
    *tensors, dy = (t.to(device) for t in given_inputs)
    with poisoned():
        found = with_gradients(partial(layer_norm, epsilon=EPSILON), tensors, dy)
    torchs = with_gradients(partial(layer_norm_reference, epsilon=EPSILON), tensors, dy)
    exact = with_gradients(
        partial(layer_norm_reference, epsilon=EPSILON), [t.double() for t in tensors], dy.double()
    )
    x, weight, _ = (t.double() for t in tensors)
    rstd = (x.var(-1, correction=0) + EPSILON).rsqrt().max().item() if x.numel() else 0.0
    gradient = (weight.abs().max() * dy.abs().max()).item() if x.numel() else 0.0
    offset = x.abs().max().item() * rstd if x.numel() else 0.0  # x - mean loses as many digits as x is far from zero
    summed = dy.double().abs().reshape(-1, dy.shape[-1]).sum(0).max().item() if x.numel() else 0.0  # of one column
    scales = [offset * weight.abs().max().item(), gradient * rstd * (1 + offset), offset * summed, summed]
    for name, scale, *three in zip(["y", "dx", "d weight", "d bias"], scales, found, exact, torchs, strict=True):
        assert_as_exact(*three, name, scale)


@compiled
@pytest.mark.parametrize("value", [950.0, 1e6, -3e-5])
@pytest.mark.parametrize("width", [67, 768, 1600])
def test_rows_of_one_value_are_zero(value, width):
    """Far from zero the mean's own rounding is as large as epsilon's root: it is given back."""
    x = torch.full((3, width), value) + torch.tensor([[0.0], [0.37], [13.1]])
    weight, bias = torch.ones(width), torch.zeros(width)
    assert not layer_norm(x, weight, bias, EPSILON).any()


@compiled
@devices
def test_what_is_not_finite_stays_in_its_row(device):
    x = torch.randn(4, 50, device=device)
    x[1, 7], x[2, 9] = math.nan, math.inf
    weight, bias = torch.ones(50, device=device), torch.zeros(50, device=device)
    found, expected = (function(x, weight, bias, EPSILON) for function in (layer_norm, layer_norm_reference))
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found[[0, 3]], expected[[0, 3]])


@compiled
@pytest.mark.parametrize("shape", [(517, 67), (3, 100_003), (2, 300, 16)], ids=str)
def test_the_number_of_threads_decides_nothing(shape):
    x, dy = (torch.randn(shape).bfloat16() for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).bfloat16() for _ in range(2))
    assert_threads_decide_nothing(lambda: with_gradients(partial(layer_norm, epsilon=EPSILON), [x, weight, bias], dy))


@compiled
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_opcheck(dtype):
    """Schema, fake tensors, autograd registration, and tracing with shapes that change; rows of nothing too."""
    x, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in [(3, 5, 8), (8,), (8,)])
    for piece in (x, x.detach().transpose(0, 1), x.detach()[:0]):
        torch.library.opcheck(torch.ops.megagpt2.layer_norm.default, (piece, weight, bias, EPSILON))
        _, mean, rstd = torch.ops.megagpt2.layer_norm(piece.detach(), weight.detach(), bias.detach(), EPSILON)
        for dz in (None, piece.detach()):
            arguments = (piece.detach(), piece.detach(), mean, rstd, weight.detach(), dz)
            torch.library.opcheck(torch.ops.megagpt2.layer_norm_backward.default, arguments)
    nothing, empty = torch.empty(0).to(dtype), torch.empty(3, 0).to(dtype)
    fakes = ("test_schema", "test_faketensor")  # without values: the mean of nothing is NaN, which is not itself
    torch.library.opcheck(
        torch.ops.megagpt2.layer_norm.default, (empty, nothing, nothing, EPSILON), test_utils=fakes
    )


def test_torch_compile_sees_the_whole():
    """No graph break, in the shape it was traced with and in others."""
    weight, bias = torch.randn(7), torch.randn(7)
    traced = torch.compile(
        lambda x: layer_norm(x, weight, bias, EPSILON) * 2, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for length in (5, 6, 11):
        x = torch.randn(2, length, 7, requires_grad=True)
        y, expected = traced(x), layer_norm(x, weight, bias, EPSILON) * 2
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (y, expected)))


def test_gradients_of_the_reference():
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 3, 5), (5,), (5,)]]
    assert torch.autograd.gradcheck(partial(layer_norm, epsilon=EPSILON), tensors)


@pytest.mark.parametrize(
    ("weight", "bias", "name"),
    [(torch.zeros(4), torch.zeros(3), "weight"), (torch.zeros(3), torch.zeros(3).double(), "bias")],
    ids=str,
)
def test_another_weight_or_bias_is_refused(weight, bias, name):
    with pytest.raises(ValueError, match=f"{name} is .* and x"):
        layer_norm(torch.zeros(2, 3), weight, bias, EPSILON)

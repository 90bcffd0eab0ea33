"""GELU with a bias of csrc/: as exact as torch's at every shape, and the same bits every time (invariant I8)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.kernels.bias_gelu import bias_gelu, bias_gelu_reference
from tests.support.kernels import (
    TYPES,
    assert_as_exact,
    assert_threads_decide_nothing,
    compiled,
    devices,
    poisoned,
    with_gradients,
)


def exact_gelu(x, bias):
    """The same function without 1 + tanh(u), which has no digits for large negative x, in float64 either."""
    h = x + bias
    return h * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))


@st.composite
def inputs(draw):
    """x of any shape, layout and scale, with bias and dy."""
    width = draw(st.one_of(st.integers(1, 70), st.sampled_from([768, 1601, 6400])))
    shape = (*draw(st.lists(st.integers(0, 5), max_size=2)), width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(TYPES))
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * draw(st.sampled_from([1.0, 1e-3, 30.0])) + draw(st.sampled_from([0.0, 3.0, -5.0]))
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    x, bias, dy = (t.to(dtype) for t in (x, bias, dy))
    if draw(st.booleans()):  # strided, with the same values
        x, dy = (torch.stack([t, t], dim=-1)[..., 0] for t in (x, dy))
    return x, bias, dy


@compiled
@devices
@given(inputs())
@settings(max_examples=100)
def test_values_and_gradients_are_as_exact_as_torchs(device, given_inputs):
    x, bias, dy = (t.to(device) for t in given_inputs)
    with poisoned():
        found = with_gradients(bias_gelu, [x, bias], dy)
    torchs = with_gradients(bias_gelu_reference, [x, bias], dy)
    exact = with_gradients(exact_gelu, [x.double(), bias.double()], dy.double())
    largest = dy.abs().max().item() if dy.numel() else 0.0  # the slope is a difference of two terms of about 1
    total = 2 * dy.abs().sum(list(range(dy.dim() - 1))).max().item() if dy.numel() else 0.0
    for name, scale, *three in zip(["y", "dx", "d bias"], [0.0, largest, total], found, exact, torchs, strict=True):
        assert_as_exact(*three, name, scale)


@compiled
@devices
def test_every_digit_counts_on_the_left_tail(device):
    """gelu(h) = h / (1 + exp(-2 u)): there 1 + tanh(u) has lost its digits, this has a few units of exp's argument."""
    x = torch.linspace(-9, 2, 9001, device=device)
    bias = torch.zeros(9001, device=device)
    found, exact = bias_gelu(x, bias).double(), exact_gelu(x.double(), bias.double())
    argument = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3).double().abs()
    assert ((found - exact).abs() <= 2.0**-23 * (4 + 4 * argument) * exact.abs()).all()


@compiled
@devices
def test_what_is_far_out_stays_finite_and_a_nan_stays(device):
    x = torch.tensor([[-3e38, -1e20, -11.0, -10.0, 10.0, 11.0, 1e20, 3e38, math.inf, math.nan]], device=device)
    y, dx, _ = with_gradients(bias_gelu, [x, torch.zeros(10, device=device)], torch.ones_like(x))
    torch.testing.assert_close(y, x.clamp(min=0), rtol=1e-6, atol=1e-35, equal_nan=True)
    torch.testing.assert_close(dx, torch.where(x.isnan(), x, (x > 0).float()), rtol=1e-6, atol=1e-35, equal_nan=True)


@compiled
@pytest.mark.parametrize("shape", [(517, 67), (3, 100_003), (2, 300, 16)], ids=str)
def test_the_number_of_threads_decides_nothing(shape):
    x, dy = (torch.randn(shape).bfloat16() for _ in range(2))
    bias = torch.randn(shape[-1]).bfloat16()
    assert_threads_decide_nothing(lambda: with_gradients(bias_gelu, [x, bias], dy))


@compiled
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_opcheck(dtype):
    """Schema, fake tensors, autograd registration, and tracing with shapes that change."""
    x, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in [(3, 5, 8), (8,)])
    for piece in (x, x.detach().transpose(0, 1), x.detach()[:0]):
        torch.library.opcheck(torch.ops.megagpt2.bias_gelu.default, (piece, bias))
        torch.library.opcheck(
            torch.ops.megagpt2.bias_gelu_backward.default, (piece.detach(), piece.detach(), bias.detach())
        )


def test_torch_compile_sees_the_whole():
    """No graph break, in the shape it was traced with and in others."""
    bias = torch.randn(7)
    traced = torch.compile(lambda x: bias_gelu(x, bias) * 2, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 11):
        x = torch.randn(2, length, 7, requires_grad=True)
        y, expected = traced(x), bias_gelu(x, bias) * 2
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (y, expected)))


def test_gradients_of_the_reference():
    x, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 3, 5), (5,)])
    assert torch.autograd.gradcheck(bias_gelu, (x, bias))


@compiled
def test_nothing_but_x_and_bias_is_saved():
    saved = []
    x, bias = torch.randn(4, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        bias_gelu(x, bias)
    assert saved == [x.data_ptr(), bias.data_ptr()]


@pytest.mark.parametrize("bias", [torch.zeros(1), torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64)], ids=str)
def test_another_bias_is_refused(bias):
    with pytest.raises(ValueError, match="bias is .* and x"):
        bias_gelu(torch.zeros(2, 3), bias)


@compiled
def test_the_operator_refuses_what_does_not_fit():
    x, bias = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(RuntimeError, match="bias must be a vector of 3"):
        torch.ops.megagpt2.bias_gelu(x, torch.zeros(4))
    with pytest.raises(RuntimeError, match="x and dy must have the same"):
        torch.ops.megagpt2.bias_gelu_backward(torch.zeros(2, 4), x, bias)
    with pytest.raises(RuntimeError, match="at least one dimension"):
        torch.ops.megagpt2.bias_gelu(torch.tensor(1.0), bias)

"""residual + dropout(x + bias) of csrc/: the masks of dropout, and as exact as torch at every shape (invariant I8)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.kernels.bias_dropout_add import bias_dropout_add, bias_dropout_add_reference
from megagpt2.kernels.dropout import keep_mask
from megagpt2.kernels.philox import key_of
from tests.support.kernels import (
    TYPES,
    assert_as_exact,
    assert_threads_decide_nothing,
    compiled,
    devices,
    poisoned,
    with_gradients,
)

KEY = key_of(1234, "test")


@st.composite
def inputs(draw):
    """x, bias or None, residual and dz of any shape and layout, and what is dropped."""
    width = draw(st.one_of(st.integers(1, 70), st.sampled_from([768, 1601])))
    batch = draw(st.integers(0, 3))
    shape = (batch, *draw(st.lists(st.integers(0, 5), max_size=2)), width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(TYPES))
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    tensors = [(t * draw(st.sampled_from([1.0, 1e-3, 30.0]))).to(dtype) for t in tensors]
    if draw(st.booleans()):  # strided, with the same values
        tensors = [torch.stack([t, t], dim=-1)[..., 0] for t in tensors]
    x, residual, dz = tensors
    bias = torch.randn(width, generator=generator).to(dtype) if draw(st.booleans()) else None
    samples = torch.randint(2**62, (batch,), generator=generator)
    start = draw(st.one_of(st.integers(0, 9), st.integers(2**34 - 600, 2**34 + 9), st.just(2**62)))
    probability = draw(st.sampled_from([0.0, 0.1, 0.5]))
    return x, bias, residual, dz, (samples if probability else None, KEY, probability, start)


def results(function, x, bias, residual, dz, arguments):
    """z, dx, d bias where there is one, d residual."""
    if bias is None:
        return with_gradients(lambda x, residual: function(x, None, residual, *arguments), [x, residual], dz)
    return with_gradients(lambda x, bias, residual: function(x, bias, residual, *arguments), [x, bias, residual], dz)


@compiled
@devices
@given(inputs())
@settings(max_examples=150)
def test_values_and_gradients_are_as_exact_as_torchs(device, given_inputs):
    *tensors, (samples, *rest) = given_inputs
    tensors = [t if t is None else t.to(device) for t in tensors]
    arguments = (samples if samples is None else samples.to(device), *rest)
    with poisoned():
        found = results(bias_dropout_add, *tensors, arguments)
    torchs = results(bias_dropout_add_reference, *tensors, arguments)
    exact = results(
        bias_dropout_add_reference, *(t if t is None else t.double() for t in tensors), arguments
    )
    x, bias, residual, dz = tensors
    terms = sum(t.abs().max().item() for t in (x, bias, residual) if t is not None) if x.numel() else 0.0
    total = 2 * dz.abs().sum(list(range(dz.dim() - 1))).max().item() if dz.numel() else 0.0
    names = {"z": 2 * terms, "dx": 0.0} | ({} if bias is None else {"d bias": total}) | {"d residual": 0.0}
    for (name, scale), *three in zip(names.items(), found, exact, torchs, strict=True):
        assert_as_exact(*three, name, scale)


@compiled
@devices
@pytest.mark.parametrize("width", [1, 3, 64, 1601])
def test_the_mask_is_dropouts(device, width):
    """Bit for bit: with a bias of 0 and a residual of 0, what is kept is x / (1 - p). A dropped NaN leaves no trace."""
    x = torch.randn(2, 7, width, device=device)
    samples, start, probability = torch.tensor([7, 2**40], device=device), 2**34 - 5, 0.25
    keep = keep_mask(KEY, probability, samples, start, 7 * width).view(x.shape)
    expected = torch.where(keep, x * (1.0 / (1.0 - probability)), 0.0)
    zeros, x = torch.zeros_like(x), torch.where(keep, x, math.nan)
    bias = torch.zeros(width, device=device)
    z, dx, d_bias, d_residual = results(
        bias_dropout_add, x, bias, zeros, torch.ones_like(x), (samples, KEY, probability, start)
    )
    assert torch.equal(z, expected)
    assert torch.equal(dx, torch.where(keep, dx.new_tensor(1.0 / (1.0 - probability)), 0.0))
    assert torch.equal(d_residual, torch.ones_like(x))
    torch.testing.assert_close(d_bias, dx.sum((0, 1)))


@compiled
def test_the_gradient_of_the_residual_is_the_upstream_one():
    """Not a copy of it; nor is that of x where nothing is dropped."""
    x, residual = (torch.randn(2, 3, 5, requires_grad=True) for _ in range(2))
    dz = torch.randn(2, 3, 5)
    for bias in (None, torch.randn(5, requires_grad=True)):
        dx, d_residual = torch.autograd.grad(bias_dropout_add(x, bias, residual), [x, residual], dz)
        assert d_residual.data_ptr() == dz.data_ptr() == dx.data_ptr()
    [d_residual] = torch.autograd.grad(
        bias_dropout_add(x, None, residual, torch.tensor([1, 2]), KEY, 0.5), [residual], dz
    )
    assert d_residual.data_ptr() == dz.data_ptr()


@compiled
def test_nothing_but_the_sample_numbers_is_saved():
    saved = []
    x, residual = (torch.randn(2, 100, requires_grad=True) for _ in range(2))
    bias = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        bias_dropout_add(x, bias, residual)
        bias_dropout_add(x, bias, residual, torch.tensor([1, 2]), KEY, 0.1)
    assert saved == [(2,)]


@compiled
@pytest.mark.parametrize("shape", [(3, 517, 67), (2, 3, 50_003)], ids=str)
@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_the_number_of_threads_decides_nothing(shape, probability):
    x, residual, dz = (torch.randn(shape).bfloat16() for _ in range(3))
    bias, samples = torch.randn(shape[-1]).bfloat16(), torch.arange(shape[0])
    assert_threads_decide_nothing(
        lambda: results(bias_dropout_add, x, bias, residual, dz, (samples, KEY, probability, 3))
    )


@compiled
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_opcheck(with_bias, probability):
    """Schema, fake tensors, autograd registration, and tracing with shapes that change."""
    x, residual = (torch.randn(2, 5, 8).bfloat16().requires_grad_() for _ in range(2))
    bias = torch.randn(8).bfloat16().requires_grad_() if with_bias else None
    samples = torch.tensor([7, 2**40]) if probability else None
    rest = (samples, *KEY, probability, 3)
    torch.library.opcheck(torch.ops.megagpt2.bias_dropout_add.default, (x, bias, residual, *rest))
    torch.library.opcheck(
        torch.ops.megagpt2.bias_dropout_add.default, (x.detach()[:, :0], bias, residual.detach()[:, :0], *rest)
    )
    torch.library.opcheck(torch.ops.megagpt2.bias_dropout_add_backward.default, (x.detach().transpose(1, 2), *rest))


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_torch_compile_sees_the_whole(probability):
    """No graph break, in the shape it was traced with and in others."""
    bias, samples = torch.randn(7), torch.tensor([7, 2**40])

    def function(x, samples):
        return bias_dropout_add(x + 1, bias, x, samples, KEY, probability, 3) * 2

    traced = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 11):
        x = torch.randn(2, length, 7, requires_grad=True)
        y, expected = traced(x, samples), function(x, samples)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (y, expected)))


@pytest.mark.parametrize("probability", [0.0, 0.4])
def test_gradients_of_the_reference(probability):
    x, residual = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    function = partial(
        bias_dropout_add, samples=torch.tensor([1, 2]), key=KEY, probability=probability, start=3
    )
    assert torch.autograd.gradcheck(function, (x, bias, residual))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bias": torch.zeros(1)}, "bias is"),
        ({"x": torch.zeros(()), "bias": None, "residual": torch.zeros(()), "probability": 0.0}, "x is a scalar"),
        ({"residual": torch.zeros(2, 4)}, "residual is"),
        ({"residual": torch.zeros(2, 3, dtype=torch.float16)}, "residual is"),
        ({"samples": None}, "there are no samples"),
        ({"samples": torch.tensor([1])}, "give an int64 number for each x.i."),
        ({"probability": 1.0}, "below 1"),
        ({"probability": -0.1}, "at least 0"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes, complaint):
    arguments = {
        "x": torch.zeros(2, 3), "bias": torch.zeros(3), "residual": torch.zeros(2, 3), "samples": torch.tensor([1, 2]),
        "key": KEY, "probability": 0.1,
    }
    with pytest.raises(ValueError, match=complaint):
        bias_dropout_add(**(arguments | changes))


@compiled
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bias": torch.zeros(4)}, "bias must be a vector of 3"),
        ({"residual": torch.zeros(2, 4)}, "must have the same shape"),
        ({"samples": torch.tensor([1])}, "1 samples"),
        ({"key0": -1}, "0, 2"),
        ({"start": -1}, "elements have numbers"),
        ({"x": torch.zeros(2), "residual": torch.zeros(2), "bias": None}, "batch, ..., width"),
    ],
    ids=str,
)
def test_the_operator_refuses_what_does_not_fit(changes, complaint):
    arguments = {
        "x": torch.zeros(2, 3), "bias": torch.zeros(3), "residual": torch.zeros(2, 3), "samples": torch.tensor([1, 2]),
        "key0": 1, "key1": 2, "probability": 0.1, "start": 0,
    }
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.megagpt2.bias_dropout_add(**(arguments | changes))

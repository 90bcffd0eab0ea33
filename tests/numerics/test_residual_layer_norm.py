"""residual + dropout(x + bias), normalized: what bias_dropout_add and layer_norm give one after the other, in one pass.

Those two are held against float64 in tests of their own.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.kernels.bias_dropout_add import bias_dropout_add
from megagpt2.kernels.philox import key_of
from megagpt2.kernels.residual_layer_norm import residual_layer_norm
from tests.support.kernels import TYPES, assert_threads_decide_nothing, compiled, devices, poisoned

KEY, EPSILON = key_of(1234, "test"), 1e-5


def results(tensors, dz, dy, arguments):
    """z, y, and the gradients of x, bias where there is one, residual, weight and norm_bias."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    z, y = residual_layer_norm(*leaves, EPSILON, *arguments)
    wanted = [leaf for leaf in leaves if leaf is not None]
    outputs, upstream = ([y], [dy]) if dz is None else ([z, y], [dz, dy])
    return [z.detach(), y.detach(), *torch.autograd.grad(outputs, wanted, upstream)]


def one_after_the_other(tensors, dz, dy, arguments):
    """The same of the two operators; layer_norm_backward adds dz."""
    x, bias, residual, weight, norm_bias = tensors
    samples, key, *rest = arguments
    z = bias_dropout_add(x, bias, residual, *arguments)
    y, mean, rstd = torch.ops.megagpt2.layer_norm(z, weight, norm_bias, EPSILON)
    d_residual, d_weight, d_norm_bias = torch.ops.megagpt2.layer_norm_backward(dy, z, mean, rstd, weight, dz)
    dx, d_bias = torch.ops.megagpt2.bias_dropout_add_backward(d_residual, samples, *key, *rest)
    dx = d_residual if samples is None else dx
    return [z, y, dx, *([] if bias is None else [d_bias]), d_residual, d_weight, d_norm_bias]


@st.composite
def inputs(draw):
    """x, bias or None, residual, dy and dz or None of any shape and layout, and what is dropped."""
    width = draw(st.one_of(st.integers(2, 70), st.sampled_from([768, 1601])))
    batch = draw(st.integers(0, 3))
    shape = (batch, *draw(st.lists(st.integers(0, 5), max_size=2)), width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(TYPES))
    large = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    if draw(st.booleans()):  # strided, with the same values
        large = [torch.stack([t, t], dim=-1)[..., 0] for t in large]
    x, residual, dz, dy = large
    bias, weight, norm_bias = (torch.randn(width, generator=generator).to(dtype) for _ in range(3))
    samples = torch.randint(2**62, (batch,), generator=generator)
    start = draw(st.one_of(st.integers(0, 9), st.integers(2**34 - 600, 2**34 + 9)))
    probability = draw(st.sampled_from([0.0, 0.1, 0.5]))
    tensors = [x, bias if draw(st.booleans()) else None, residual, weight, norm_bias]
    return tensors, dz if draw(st.booleans()) else None, dy, (samples if probability else None, KEY, probability, start)


def moved(given_inputs, device):
    tensors, dz, dy, (samples, *rest) = given_inputs
    tensors, dz, samples = ([t if t is None else t.to(device) for t in ts] for ts in (tensors, [dz], [samples]))
    return tensors, dz[0], dy.to(device), (samples[0], *rest)


@compiled
@devices
@given(inputs())
@settings(max_examples=150)
def test_values_and_gradients_are_those_of_the_two_operators(device, given_inputs):
    """Bit for bit, in every set of vector instructions and on every device: the rows' steps are the same functions."""
    tensors, dz, dy, arguments = moved(given_inputs, device)
    with poisoned():
        found = results(tensors, dz, dy, arguments)
    expected = one_after_the_other(tensors, dz, dy, arguments)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@compiled
@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_gradients_without_a_reader_of_y(probability):
    """Then the stream's gradient passes through, dropped on its way to x."""
    tensors = [torch.randn(shape, requires_grad=True) for shape in [(2, 3, 5), (5,), (2, 3, 5), (5,), (5,)]]
    samples, dz = torch.tensor([1, 2]), torch.randn(2, 3, 5)
    z, _ = residual_layer_norm(*tensors, EPSILON, samples, KEY, probability)
    dx, d_residual = torch.autograd.grad(z, [tensors[0], tensors[2]], dz)
    expected = bias_dropout_add(dz, None, torch.zeros(2, 3, 5), samples, KEY, probability)
    assert torch.equal(d_residual, dz) and torch.equal(dx, expected)


@compiled
@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_the_number_of_threads_decides_nothing(probability):
    x, residual, dz, dy = (torch.randn(3, 517, 67).bfloat16() for _ in range(4))
    tensors = [x, torch.randn(67).bfloat16(), residual, *(torch.randn(67).bfloat16() for _ in range(2))]
    arguments = (torch.arange(3), KEY, probability, 3)
    assert_threads_decide_nothing(lambda: results(tensors, dz, dy, arguments))


@compiled
def test_z_and_the_statistics_are_all_that_is_saved():
    saved = []
    tensors = [torch.randn(shape, requires_grad=True) for shape in [(2, 3, 5), (5,), (2, 3, 5), (5,), (5,)]]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        residual_layer_norm(*tensors, EPSILON)
    assert saved == [(2, 3, 5), (6,), (6,), (5,)]


@compiled
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_opcheck(with_bias, probability):
    """Schema, fake tensors, autograd registration, and tracing with shapes that change."""
    shapes = [(2, 5, 8), (8,), (2, 5, 8), (8,), (8,)]
    tensors = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    if not with_bias:
        tensors[1] = None
    samples = torch.tensor([7, 2**40]) if probability else None
    rest = (samples, *KEY, probability, 3)
    torch.library.opcheck(torch.ops.megagpt2.residual_layer_norm.default, (*tensors, EPSILON, *rest))
    z = tensors[0].detach()
    mean, rstd = (torch.ones(10) for _ in range(2))
    torch.library.opcheck(
        torch.ops.megagpt2.residual_layer_norm_backward.default,
        (z, z if with_bias else None, z, mean, rstd, tensors[3].detach(), *rest),
    )


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_torch_compile_sees_the_whole(probability):
    """No graph break, in the shape it was traced with and in others."""
    bias, weight, norm_bias = (torch.randn(7) for _ in range(3))
    samples = torch.tensor([7, 2**40])

    def function(x, samples):
        z, y = residual_layer_norm(x + 1, bias, x, weight, norm_bias, EPSILON, samples, KEY, probability, 3)
        return z * y

    traced = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 11):
        x = torch.randn(2, length, 7, requires_grad=True)
        y, expected = traced(x, samples), function(x, samples)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (y, expected)))


@pytest.mark.parametrize("probability", [0.0, 0.4])
def test_gradients_of_the_reference(probability):
    shapes = [(2, 3, 5), (5,), (2, 3, 5), (5,), (5,)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    function = partial(
        residual_layer_norm, epsilon=EPSILON, samples=torch.tensor([1, 2]), key=KEY, probability=probability, start=3
    )
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("name", ["bias", "weight", "norm_bias", "residual"])
def test_what_does_not_fit_is_refused(name):
    x = torch.zeros(2, 3)
    arguments = dict.fromkeys(("x", "residual"), x) | dict.fromkeys(("bias", "weight", "norm_bias"), torch.zeros(3))
    with pytest.raises(ValueError, match=f"^{name} is"):
        residual_layer_norm(**(arguments | {name: torch.zeros(1)}), epsilon=EPSILON)


def test_samples_are_asked_for_where_something_is_dropped():
    x, vector = torch.zeros(2, 3), torch.ones(3)
    z, y = residual_layer_norm(x, None, x + 1, vector, vector, EPSILON)
    assert torch.equal(z, x + 1) and torch.equal(y, F.layer_norm(x, (3,)) + 1)
    with pytest.raises(ValueError, match="there are no samples"):
        residual_layer_norm(x, None, x, vector, vector, EPSILON, probability=0.5)

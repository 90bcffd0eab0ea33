"""Layer normalization of csrc/: as exact as torch's at every shape, and the same bits every time (invariant I8)."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.kernels.layer_norm import layer_norm, layer_norm_reference
from tests.support.kernels import TYPES, assert_as_exact, compiled, poisoned, with_gradients

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
@given(inputs())
@settings(max_examples=150)
def test_values_and_gradients_are_as_exact_as_torchs(given_inputs):
    *tensors, dy = given_inputs
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
    scales = [offset * weight.abs().max().item(), gradient * rstd * (1 + offset), offset * dy.abs().sum().item(), 0.0]
    for name, scale, *three in zip(["y", "dx", "d weight", "d bias"], scales, found, exact, torchs, strict=True):
        assert_as_exact(*three, name, scale)

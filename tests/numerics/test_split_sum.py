"""A sum in two halves is a sum in fp32, bit by bit, and is rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagpt2.kernels.split_sum import (
    split_sum_add_,
    split_sum_add_reference_,
    split_sum_round_,
    split_sum_round_reference_,
)
from tests.support.kernels import assert_threads_decide_nothing, compiled

HALVES = [torch.bfloat16, torch.float16]
OPERATORS = [(split_sum_add_, split_sum_round_), (split_sum_add_reference_, split_sum_round_reference_)]


def terms(count: int, shape: list[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Of sizes that cancel, round and vanish beside one another."""
    generator = torch.Generator().manual_seed(seed)
    exponents = (torch.randint(-12, 12, shape, generator=generator) for _ in range(count))
    return [(torch.randn(shape, generator=generator) * torch.exp2(e)).to(dtype) for e in exponents]


def summed(add, round_, xs: list[Tensor], dtype: torch.dtype, scale: float) -> Tensor:
    high = torch.zeros(xs[0].shape, dtype=dtype, device=xs[0].device)
    low = torch.zeros_like(high, dtype=torch.int16)
    for x in xs:
        add(high, low, x)
    round_(high, low, torch.tensor(scale, device=high.device))
    return high


@pytest.mark.parametrize("operators", OPERATORS, ids=["operators", "reference"])
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=3), st.integers(1, 5), st.sampled_from(HALVES), st.booleans(),
    st.booleans(), st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_it_is_the_sum_in_fp32(operators, shape, count, dtype, wide, strided, seed):
    xs = terms(count, shape, torch.float32 if wide else dtype, seed)
    if strided:
        xs = [torch.stack([x, x], dim=-1)[..., 0] for x in xs]
    expected = torch.zeros(shape)
    for x in xs:
        expected += x
    assert torch.equal(summed(*operators, xs, dtype, 1.0), expected.to(dtype))
    scale = 1.0 / 3075  # its rounding to 16 bits would show
    assert torch.equal(summed(*operators, xs, dtype, scale), (expected * torch.tensor(scale)).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [[3, 7], [64, 128], [2000, 1601]], ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_it_is_the_sum_in_fp32_on_a_gpu(shape, dtype, wide):
    xs = terms(3, shape, torch.float32 if wide else dtype, 0)
    found = summed(split_sum_add_, split_sum_round_, [x.cuda() for x in xs], dtype, 0.3)
    assert torch.equal(found.cpu(), summed(split_sum_add_, split_sum_round_, xs, dtype, 0.3))


@compiled
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_infinities_and_nans_stay(dtype):
    """And more than fp16 can hold may come and go on the way."""
    xs = [torch.tensor([[1e9, 1e9, -torch.inf, torch.nan, 1.0]]), torch.tensor([[-1e9, 0.0, 1.0, 1.0, torch.inf]])]
    found = summed(split_sum_add_, split_sum_round_, xs, dtype, 1.0)
    expected = (xs[0] + xs[1]).to(dtype)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert found[0, 0] == 0.0 and found[0, 3].isnan()
    odd = torch.tensor([[0x7FFFFFFF, -1, 0x7F800001, -(2**31) + 0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    assert odd.isnan().all() and summed(split_sum_add_, split_sum_round_, [odd], dtype, 1.0).isnan().all()


@compiled
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_number_of_threads_decides_nothing(dtype):
    """200,001 elements: several threads' pieces, the last of which is no whole vector."""
    xs = terms(3, [200_001], torch.float32, 0)
    assert_threads_decide_nothing(lambda: [summed(split_sum_add_, split_sum_round_, xs, dtype, 0.3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # float64: the reference in plain torch
def test_shapes_that_differ_are_named(dtype):
    """As many elements in another shape, or fewer that could be repeated, are not added."""
    high, low = torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3, dtype=torch.int16)
    for x in (torch.ones(3, 2), torch.ones(1, 3), torch.ones(6), torch.ones(1, 2, 3)):
        with pytest.raises(ValueError, match=r"x is \[.*\] and high \[2, 3\]"):
            split_sum_add_(high, low, x.to(dtype))
    for call in (split_sum_add_, split_sum_round_):
        with pytest.raises(ValueError, match=r"low is \[3, 2\] and high \[2, 3\]"):
            call(high, low.view(3, 2), torch.ones(2, 3).to(dtype))
    assert (high == 0).all() and (low == 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("operator", [split_sum_add_, split_sum_round_])
def test_autograd_sees_what_is_overwritten(operator, dtype):
    """A backward pass that saved high raises; so does asking for a gradient that the operator doesn't have."""
    leaf = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    low, x = torch.ones(2, 3, dtype=torch.int16), torch.ones(2, 3) if operator is split_sum_add_ else torch.ones(())
    high = leaf.exp()  # which its backward pass needs
    before = low._version
    operator(high.detach(), low, x)
    assert (low._version > before) == (operator is split_sum_add_)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        high.sum().backward()
    with pytest.raises(ValueError, match="high requires a gradient"):
        operator(leaf, low, x)
    with pytest.raises(ValueError, match="requires a gradient"):
        operator(leaf.detach(), low, x.clone().requires_grad_())
    assert (leaf == 0).all()


@compiled
def test_opcheck():
    high, low = torch.zeros(5, 8, dtype=torch.bfloat16), torch.zeros(5, 8, dtype=torch.int16)
    for x in (torch.randn(5, 8), torch.randn(5, 8).bfloat16(), torch.randn(8, 5).T):
        torch.library.opcheck(torch.ops.megagpt2.split_sum_add_.default, (high, low, x))
    torch.library.opcheck(torch.ops.megagpt2.split_sum_round_.default, (high, low, torch.tensor(0.5)))


@compiled
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"high": torch.zeros(2, 3)}, "bfloat16 or float16"),
        ({"low": torch.zeros(2, 3, dtype=torch.int32)}, "int16"),
        ({"low": torch.zeros(2, 4, dtype=torch.int16)}, "shape of high"),
        ({"high": torch.zeros(3, 2).bfloat16().T}, "contiguous"),
        ({"x": torch.zeros(2, 3).half()}, "in the type of high"),
        ({"x": torch.zeros(2, 4)}, "shape of high"),
        ({"x": torch.zeros(3, 2)}, "shape of high"),
        ({"low": torch.zeros(6, dtype=torch.int16)}, "shape of high"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes, complaint):
    arguments = {
        "high": torch.zeros(2, 3).bfloat16(), "low": torch.zeros(2, 3, dtype=torch.int16), "x": torch.zeros(2, 3)
    }
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.megagpt2.split_sum_add_(**(arguments | changes))
    with pytest.raises(RuntimeError, match="one float32"):
        torch.ops.megagpt2.split_sum_round_(arguments["high"], arguments["low"], torch.zeros(2))

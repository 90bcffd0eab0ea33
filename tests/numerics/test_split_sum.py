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
from tests.support.kernels import compiled

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

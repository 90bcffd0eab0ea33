"""--check-replicas: what ranks hold alike is compared bit by bit, a planted flip is found and named (invariant I5)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt2.training.replicas import checksum
from tests.distributed.test_layouts import PP, SP, TP, ZERO

JOB = "tests.support.replicas:run"
NORM, MATRIX = "h.1.ln_2.weight", "h.2.mlp.c_fc.weight"


@pytest.mark.parametrize(
    "ranks, layout, flip, named",
    [
        (2, {ZERO: 1}, (1, MATRIX), f"{MATRIX}: ranks 0, 1 differ among each other"),
        (3, {ZERO: 2, "batch.global_batch": 12}, (1, MATRIX), f"{MATRIX}: rank 1 against 0, 2"),
        (3, {TP: 3, SP: True, "model.context": 30}, (2, NORM), f"{NORM}: rank 2 against 0, 1"),
        (4, {TP: 2, ZERO: 3}, (3, NORM), f"{NORM}: ranks 2, 3 differ among each other"),
        (4, {TP: 2, ZERO: 1}, (3, MATRIX), f"{MATRIX}: ranks 1, 3 differ among each other"),
        (4, {PP: 2}, (3, "wte.weight"), None),
        (4, {PP: 4}, (3, "wte.weight"), "wte.weight (tied): ranks 0, 3 differ among each other"),
    ],
    ids=["dp2", "dp3", "tp3-sp", "tp2-dp2-zero3", "tp2-dp2", "pp2-dp2-tied", "pp4-tied"],
)
def test_a_flipped_bit_is_found_and_named_on_every_rank(pool, ranks, layout, flip, named):
    both = ["wte.weight (tied): ranks 1, 3 differ among each other", "wte.weight: ranks 2, 3 differ among each other"]
    for answer in pool.run(JOB, ranks, changes=layout, flip=flip):
        assert sorted(answer["error"]) == ([named] if named else both)
        assert answer["steps"] == 2 and not answer["saved"]  # at once, and the wrong state is not kept
        assert (named or both[0]) in answer["events"][-1][1]


def test_replicas_of_every_kind_agree_while_they_train(pool):
    """Two replicas of two stages; TP2 x PP2 x SP; ZeRO-3: no step finds a difference."""
    odd = {"model.width": 35}  # two replicas: ZeRO-3 pads every vector, with what happens to be in memory
    for layout in ({PP: 2}, {TP: 2, PP: 2, SP: True}, {TP: 2, ZERO: 3, **odd}):
        for answer in pool.run(JOB, 4, changes=layout, flip=None):
            assert answer["error"] is None and answer["steps"] == 3 and answer["saved"] == 1
            (step, message), = answer["events"]  # told once
            assert step == 1 and message.startswith("replicas agree: ")
            assert int(message.split()[2]) >= 10


@given(
    st.integers(1, 5000), st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
)
def test_every_single_bit_changes_the_checksum(count, data, dtype):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    other = tensor.clone()
    size = tensor.element_size()
    index, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 8 * size - 1))
    other.view(torch.uint8)[index * size + bit // 8] ^= 1 << bit % 8
    assert not torch.equal(checksum(tensor), checksum(other))
    assert torch.equal(checksum(tensor), checksum(tensor.clone()))


@given(st.integers(2, 3000), st.data())
def test_exchanged_elements_change_the_checksum(count, data):
    tensor = torch.arange(1, count + 1, dtype=torch.float32)
    i, j = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
    other = tensor.clone()
    other[i], other[j] = tensor[j], tensor[i]
    assert not torch.equal(checksum(tensor), checksum(other))

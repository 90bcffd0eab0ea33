"""fp16 with dynamic loss scaling, computed by torch on the CPU: slow, but the same arithmetic and the same engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megagpt2.checkpoint.load import open_checkpoint
from tests.distributed.test_checkpoints import JOB, contents
from tests.distributed.test_layouts import PP, SP, TP, ZERO
from tests.support.parity import STEPS, assert_rounded_as, trained
from tests.support.train import small_config

FP16 = {"training.precision": "fp16"}


@pytest.fixture(scope="module")
def runs(pool):
    """Plain torch on one process in fp32 and in fp16."""
    return [trained(pool, 1, changes, "train_plain") for changes in ({}, FP16)]


@pytest.mark.parametrize(
    "ranks, layout",
    [(4, {TP: 2, PP: 2}), (4, {PP: 2, ZERO: 1}), (2, {ZERO: 2}), (4, {TP: 2, SP: True, ZERO: 3})],
    ids=["tp2-pp2", "pp2-dp2", "dp2-zero2", "tp2-dp2-zero3-sp"],
)
def test_fp16_is_as_near_to_fp32_as_one_process_is(pool, runs, ranks, layout):
    """As for bf16 (support/matrix.py): 2**-9 are two bits of fp16's eleven."""
    found = trained(pool, ranks, {**FP16, **layout})
    assert found.adam[0]["scales"] == [2.0**16] * STEPS and not any(found.adam[0]["skipped"])
    assert_rounded_as(found, *runs, floor=2.0**-9)


def test_one_process_in_fp16_is_near_fp32(runs):
    """fp16 has ten bits of mantissa: a loss is good to some 2**-10, and it isn't fp32's."""
    exact, rounded = (run.adam[0] for run in runs)
    np.testing.assert_allclose(rounded["losses"], exact["losses"], rtol=2.0**-10)
    assert rounded["losses"] != exact["losses"]


@pytest.mark.parametrize("ranks, layout", [(1, {}), (4, {TP: 2, PP: 2})], ids=["one", "tp2-pp2"])
def test_a_scale_that_overflowed_is_remembered(pool, tmp_path, ranks, layout):
    """From 2**24 the first steps overflow: the scale falls, is saved, and going on from there is bitwise."""
    changes = {**FP16, **layout, "training.initial_loss_scale": 2**24}
    straight = pool.run(JOB, ranks, changes=changes, folder=str(tmp_path / "straight"), steps=12)[0]
    first = pool.run(JOB, ranks, changes=changes, folder=str(tmp_path / "parts"), steps=5)[0]
    second = pool.run(JOB, ranks, changes=changes, folder=str(tmp_path / "parts"), steps=7, load=first["saved"])[0]
    states = [open_checkpoint(Path(run["saved"]), small_config().model).state for run in (straight, first, second)]
    assert states[0] == states[2]
    assert states[0].loss_scaler["cur_scale"] < states[1].loss_scaler["cur_scale"] < 2**24
    assert 0 < states[0].updates < 12
    assert first["losses"] + second["losses"] == straight["losses"]
    one, other = contents(Path(straight["saved"])), contents(Path(second["saved"]))
    assert all((other[key] == tensor).all() for key, tensor in one.items())

"""Samples while training: every layout computes the one-process logits, on every rank."""

from __future__ import annotations

import numpy as np
import pytest

TP, PP, SP, ZERO = (
    "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel", "parallel.zero_stage",
)
LENGTH = 13  # no multiple of anything: sequence parallelism must pad and look at the right position


@pytest.mark.parametrize(
    "ranks, layout",
    [(2, {TP: 2}), (3, {TP: 3}), (4, {TP: 2, PP: 2}), (4, {TP: 2, SP: True, PP: 2}), (4, {TP: 2, SP: True, ZERO: 3})],
    ids=["tp2", "tp3-uneven-words", "tp2-pp2", "tp2-pp2-sp", "tp2-dp2-zero3-sp"],
)
def test_next_logits(pool, ranks, layout):
    batch = {"batch.global_batch": 12}
    reference = pool.run("tests.support.train:logits", 1, changes=batch, length=LENGTH)[0]
    assert reference.shape == (2, 307)  # words only: the padding of the vocabulary is never seen (I9)
    for found in pool.run("tests.support.train:logits", ranks, changes={**batch, **layout}, length=LENGTH):
        np.testing.assert_allclose(found, reference, rtol=0, atol=1e-5 * np.abs(reference).max())

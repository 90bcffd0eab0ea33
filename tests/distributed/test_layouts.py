"""Invariant I1: every layout trains the model that one process trains, dropout on.

error(T) = max|a - b| / max|b| per tensor. fp32: losses, gradient norms and gradients (read from one step of SGD)
within 1e-5; weights after 5 steps of Adam (eps 1e-5) within 1e-4. The key third of c_attn.bias has
gradient zero in exact arithmetic (a constant added to all scores of a softmax): there only rounding is left, and Adam
turns rounding into steps of the learning rate, so |difference| <= 2 lr steps is all that holds.

Parts that two ranks hold are compared bit by bit on the way (I5).
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.train import error, small_config, whole

STEPS = 5
RATE = 1024.0  # of SGD: so large a step that a weight of 1 does not round its gradient of 1e-3 away
SGD = {
    "optimizer.name": "sgd", "optimizer.learning_rate": RATE, "optimizer.clip": 0.0, "optimizer.weight_decay": 0.0,
}
TP, PP, SP = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel"
ZERO, RECOMPUTE = "parallel.zero_stage", "parallel.activation_checkpointing"

LAYOUTS = {  # name: (ranks, what differs from one process)
    "tp2": (2, {TP: 2}),  # 5 heads: 3 and 2
    "tp2-selective": (2, {TP: 2, RECOMPUTE: "selective"}),
    "tp2-sp": (2, {TP: 2, SP: True}),
    "tp4-sp-full": (4, {TP: 4, SP: True, RECOMPUTE: "full"}),  # 2, 1, 1, 1
    "pp2": (2, {PP: 2}),
    "pp4-full": (4, {PP: 4, RECOMPUTE: "full"}),
    "tp2-pp2": (4, {TP: 2, PP: 2}),
    "tp2-pp2-sp-full": (4, {TP: 2, PP: 2, SP: True, RECOMPUTE: "full"}),
    "pp2-dp2": (4, {PP: 2}),
    "dp2-zero0": (2, {ZERO: 0}),
    "dp2-zero1": (2, {ZERO: 1}),
    "dp2-zero2": (2, {ZERO: 2}),
    "dp2-zero3": (2, {ZERO: 3}),
    "dp4-zero2-micro2": (4, {ZERO: 2, "batch.micro_batch": 2}),
    "tp2-dp2-zero3-sp-full": (4, {TP: 2, SP: True, ZERO: 3, RECOMPUTE: "full"}),
}


def gradients(parts: list[dict]) -> dict[str, np.ndarray]:
    """One step of SGD moves every weight by RATE times its gradient."""
    before, after = whole(parts, "before"), whole(parts, "after")
    return {name: (before[name] - after[name]) / RATE for name in before}


def without_keys(name: str, tensor: np.ndarray) -> np.ndarray:
    """c_attn.bias without its key third; any other tensor as it is."""
    if not name.endswith("attn.c_attn.bias"):
        return tensor
    q, _, v = np.split(tensor, 3)
    return np.concatenate([q, v])


def adam_and_sgd(pool, ranks: int, changes: dict) -> tuple[list[dict], list[dict]]:
    adam = pool.run("tests.support.train:train", ranks, changes=changes, steps=STEPS)
    sgd = pool.run("tests.support.train:train", ranks, changes={**changes, **SGD}, steps=1)
    return adam, sgd


def compare(adam, sgd, reference) -> None:
    """I1's measure of a layout's runs against the one-process runs."""
    adam_one, sgd_one = reference
    for part in adam:  # every rank reports the same, right loss
        np.testing.assert_allclose(part["losses"], adam_one[0]["losses"], rtol=1e-5)
        np.testing.assert_allclose(part["norms"], adam_one[0]["norms"], rtol=1e-5)
        np.testing.assert_allclose(part["validation"], adam_one[0]["validation"], rtol=1e-5)
    expected, found = gradients(sgd_one), gradients(sgd)
    assert found.keys() == expected.keys()
    wrong = {
        name: e for name in expected
        if (e := error(without_keys(name, found[name]), without_keys(name, expected[name]))) > 1e-5
    }
    assert not wrong, f"gradients differ by more than 1e-5: {wrong}"
    expected, found = whole(adam_one, "after"), whole(adam, "after")
    wrong = {
        name: e for name in expected
        if (e := error(without_keys(name, found[name]), without_keys(name, expected[name]))) > 1e-4
    }
    assert not wrong, f"weights differ by more than 1e-4 after {STEPS} steps: {wrong}"
    rate = small_config().optimizer.learning_rate
    for name in expected:
        if name.endswith("attn.c_attn.bias"):
            keys = np.abs(np.split(found[name], 3)[1] - np.split(expected[name], 3)[1])
            assert keys.max() <= 2 * rate * STEPS


@pytest.fixture(scope="module")
def one_process(pool):
    return adam_and_sgd(pool, 1, {})


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_the_same_model(pool, one_process, name):
    ranks, changes = LAYOUTS[name]
    compare(*adam_and_sgd(pool, ranks, changes), one_process)


def test_micro_batch_does_not_matter(pool, one_process):
    compare(*adam_and_sgd(pool, 1, {"batch.micro_batch": 4}), one_process)


def test_post_norm_model_under_tensor_and_pipeline(pool):
    """GPT-1's form has no final norm: one layer fewer in the list."""
    post = {"model.norm": "post"}
    reference = adam_and_sgd(pool, 1, post)
    compare(*adam_and_sgd(pool, 4, {TP: 2, PP: 2, **post}), reference)


def test_tied_copies_stay_equal_over_three_replicas_of_two_stages(pool, one_process):
    """Six ranks: no layout of four can see the tied gradients' sums being taken in the wrong order."""
    batch = {"batch.global_batch": 12}
    reference = adam_and_sgd(pool, 1, batch)
    compare(*adam_and_sgd(pool, 6, {PP: 2, **batch}), reference)


def test_words_that_do_not_divide(pool, one_process):
    """384 padded rows over 3 ranks are 128 each, of which the last has 51 words; over 5 ranks the last has none."""
    reference = adam_and_sgd(pool, 1, {"batch.global_batch": 12})
    compare(*adam_and_sgd(pool, 3, {TP: 3, "batch.global_batch": 12}), reference)
    few = {"model.vocabulary": 90, "model.heads": 4}  # 128 rows, 32 each: ranks 2 and 3 hold 26 and no words
    compare(*adam_and_sgd(pool, 4, {TP: 4, **few}), adam_and_sgd(pool, 1, few))


def test_clipping_uses_the_true_global_norm(pool):
    """With a clip far below the norm, SGD's step has exactly that length (times RATE) on every layout."""
    for ranks, layout in [(1, {}), (4, {TP: 2, PP: 2}), (4, {TP: 2, ZERO: 2})]:
        parts = pool.run("tests.support.train:train", ranks, changes={**SGD, "optimizer.clip": 0.25, **layout}, steps=1)
        moved = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients(parts).values()))
        # DeepSpeed divides by norm + 1e-6
        assert moved == pytest.approx(0.25, rel=1e-5)


BF16 = {"training.precision": "bf16"}


@pytest.fixture(scope="module")
def one_process_bf16(pool):
    return adam_and_sgd(pool, 1, BF16)


@pytest.mark.parametrize(
    "ranks, layout",
    [
        (2, {PP: 2}), (4, {TP: 2, PP: 2}), (4, {TP: 2, SP: True, ZERO: 3}), (4, {PP: 2, RECOMPUTE: "full"}),
        (2, {ZERO: 2}),
    ],
    ids=["pp2", "tp2-pp2", "tp2-dp2-zero3-sp", "pp2-dp2-full", "dp2-zero2"],
)
def test_bf16_is_as_near_to_fp32_as_one_process_is(pool, one_process, one_process_bf16, ranks, layout):
    """I2: what a layout's bf16 differs from fp32 by is what rounding to bf16 costs, not more.

    Rounding errors of the two are different draws: twice the one-process error is allowed, and no tensor is held to
    less than 2**-6, two bits of bf16's eight.
    """
    adam, sgd = adam_and_sgd(pool, ranks, {**BF16, **layout})
    rounded_as_one_process_is(adam, sgd, one_process, one_process_bf16, floor=2.0**-6)


def rounded_as_one_process_is(adam, sgd, exact, rounded, floor: float) -> None:
    """I2: a layout's low precision differs from fp32 by twice what one process's does, or by `floor`."""
    truth = np.array(exact[0][0]["losses"])
    rounding = np.abs(np.array(rounded[0][0]["losses"]) - truth).max()
    assert np.abs(np.array(adam[0]["losses"]) - truth).max() <= 2 * rounding + 2e-4
    wrong = {}
    expected, one_process, found = gradients(exact[1]), gradients(rounded[1]), gradients(sgd)
    for name in expected:
        truth, one, here = (without_keys(name, tensors[name]) for tensors in (expected, one_process, found))
        if error(here, truth) > max(2 * error(one, truth), floor):
            wrong[name] = (error(here, truth), error(one, truth))
    assert not wrong, f"(error, one process's error) of gradients: {wrong}"

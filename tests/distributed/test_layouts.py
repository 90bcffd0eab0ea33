"""Invariant I1 (see support/parity.py) where the matrix of layouts does not reach: other sizes, six ranks, clipping."""

from __future__ import annotations

import pytest

from tests.support.matrix import BF16_FLOOR
from tests.support.parity import Errors, assert_exact, assert_rounded_as, clipped_length, trained

TP, PP, SP = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel"
ZERO = "parallel.zero_stage"


def agree(found, reference) -> None:
    assert_exact(Errors.of(found, reference))


def test_micro_batch_does_not_matter(pool):
    agree(trained(pool, 1, {"batch.micro_batch": 4}), trained(pool, 1, {}, "train_plain"))


def test_post_norm_model_under_tensor_and_pipeline(pool):
    """GPT-1's form has no final norm: one layer fewer in the list."""
    post = {"model.norm": "post"}
    reference = trained(pool, 1, post, "train_plain")
    agree(trained(pool, 4, {TP: 2, PP: 2, **post}), reference)


def test_tied_copies_stay_equal_over_three_replicas_of_two_stages(pool):
    """Six ranks: no layout of four can see the tied gradients' sums being taken in the wrong order."""
    batch = {"batch.global_batch": 12}
    reference = trained(pool, 1, batch, "train_plain")
    agree(trained(pool, 6, {PP: 2, **batch}), reference)


def test_three_replicas_of_two_stages_in_bf16(pool):
    """Where the tied pair's gradients are DeepSpeed's fp32 sums, not the parameters' own."""
    batch, bf16 = {"batch.global_batch": 12, "batch.micro_batch": 2}, {"training.precision": "bf16"}
    exact, rounded = (trained(pool, 1, {**batch, **changes}, "train_plain") for changes in ({}, bf16))
    assert_rounded_as(trained(pool, 6, {PP: 2, **batch, **bf16}), exact, rounded, BF16_FLOOR)


def test_words_that_do_not_divide(pool):
    """Of 384 padded rows over 3 ranks the last has 51 words of 128; of 128 over 4 ranks the last has none of 32."""
    batch = {"batch.global_batch": 12, "batch.micro_batch": 6}  # two exchanges for each layer, not twelve
    agree(trained(pool, 3, {TP: 3, **batch}), trained(pool, 1, batch, "train_plain"))
    # 128 rows, 32 each: ranks 2 and 3 hold 26 and no words
    few = {"model.vocabulary": 90, "model.heads": 4, "batch.micro_batch": 4}
    agree(trained(pool, 4, {TP: 4, **few}), trained(pool, 1, few, "train_plain"))


def test_clipping_uses_the_true_global_norm(pool):
    for ranks, layout in [(1, {}), (4, {TP: 2, PP: 2}), (4, {TP: 2, ZERO: 2})]:
        assert clipped_length(pool, ranks, layout, 0.25) == pytest.approx(0.25, rel=1e-5)


def test_the_unfused_adam_trains_the_same_model(pool):
    """kernels.adam: torch on stretches of flat buffers, against the fused one on whole tensors; I5 holds on the way."""
    reference = trained(pool, 1, {}, "train_plain")
    agree(trained(pool, 4, {"kernels.adam": "torch", TP: 2, ZERO: 2}), reference)
    agree(trained(pool, 4, {"kernels.adam": "torch", "kernels.layer_norm": "torch", PP: 2}), reference)

"""What the loop says of a first loss after resuming."""

from __future__ import annotations

import math

import pytest

from megagpt2.training.loop import compared_with_stored

STORED = [3.20, 3.30, 3.10, 3.25, 3.15]  # their middle is 3.20, a tenth of it 0.32, three times their spread 0.6


@pytest.mark.parametrize(
    ("loss", "near"),
    [(3.2, True), (3.75, True), (2.65, True), (3.85, False), (2.5, False), (10.9, False), (0.0, False),
     (math.inf, False), (math.nan, False)],
)
def test_a_loss_that_jumps_is_warned_of(loss, near):
    said = compared_with_stored(loss, STORED)
    assert said.startswith(f"first loss after resuming {loss:.4f}, the checkpoint's last 5 are 3.1000 to 3.3000")
    assert ("warning: that is far off" not in said) == near


def test_of_one_stored_loss_a_tenth_is_allowed():
    assert "warning" not in compared_with_stored(5.4, [5.0])
    assert "warning" in compared_with_stored(5.6, [5.0])

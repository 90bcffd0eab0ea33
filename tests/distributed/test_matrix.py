"""Every legal layout trains the model that plain torch trains on one process: invariants I1, I2, I5 (support/parity).

The fast tests run layouts in which every pair of choices occurs together; the slow ones run all.
"""

from __future__ import annotations

import pytest

from tests.support.matrix import all_layouts, check_layout, pairs, pairwise_cover, references

LAYOUTS = all_layouts()
COVER = pairwise_cover(LAYOUTS)


def name(plan) -> str:
    return f"{plan.name}-{plan.precision}"


@pytest.fixture(scope="module")
def reference(pool):
    return references(pool)


def test_the_cover_has_every_pair_of_choices():
    assert set().union(*map(pairs, COVER)) == set().union(*map(pairs, LAYOUTS))
    assert len(COVER) < len(LAYOUTS) / 8


@pytest.mark.parametrize("plan", COVER, ids=name)
def test_a_layout_of_the_pairwise_cover(pool, reference, plan):
    check_layout(pool, plan, reference)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [plan for plan in LAYOUTS if plan not in COVER], ids=name)
def test_any_other_layout(pool, reference, plan):
    check_layout(pool, plan, reference)

"""Every legal layout trains the model that plain torch trains on one process: invariants I1, I2, I5 (support/parity).

The fast tests run layouts of 1, 2 and 4 ranks in which every pair of choices occurs together; the slow ones run all.
"""

from __future__ import annotations

import pytest

from tests.support.matrix import COVERED, References, all_layouts, check_layout, fast_cover, pairs

LAYOUTS = all_layouts(worlds=COVERED)
COVER = fast_cover()
OTHERS = [plan for plan in all_layouts() if plan not in COVER]


def name(plan) -> str:
    return f"{plan.name}-{plan.precision}"


@pytest.fixture(scope="module")
def references(pool):
    return References(pool)


def test_the_cover_has_every_pair_of_choices():
    assert set().union(*map(pairs, COVER)) == set().union(*map(pairs, LAYOUTS))
    assert len(COVER) < len(LAYOUTS) / 8


@pytest.mark.parametrize("plan", COVER, ids=name)
def test_a_layout_of_the_pairwise_cover(pool, references, plan):
    check_layout(pool, plan, references)


@pytest.mark.slow
@pytest.mark.parametrize("plan", OTHERS, ids=name)
def test_any_other_layout(pool, references, plan):
    check_layout(pool, plan, references)

"""The learning rate against independent formulas, and the shapes that its users expect."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt2.config.schema import ScheduleConfig
from megagpt2.training.schedule import learning_rate

PEAK, DECAY = 6e-4, 1000
SHAPES = ["cosine", "linear", "wsd", "constant"]
FALLING = SHAPES[:3]


def rates(name: str, updates=range(DECAY + 1), warmup: int = 100, minimum: float = 0.1, **fields) -> list[float]:
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, minimum=minimum, **fields)
    return [learning_rate(schedule, PEAK, update, DECAY) for update in updates]


@pytest.mark.parametrize("name", SHAPES)
def test_warm_up_is_linear_from_the_first_part_to_the_peak(name):
    """No update is wasted on a rate of 0, and the last one of the warm-up has the whole."""
    assert rates(name, range(100)) == pytest.approx([PEAK * (n + 1) / 100 for n in range(100)], rel=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_no_jump_anywhere(name):
    """The steepest of the shapes rises by 1/100 of the peak a step; wsd falls by 1/100 in its last tenth."""
    values = rates(name)
    assert max(abs(b - a) for a, b in zip(values, values[1:], strict=False)) <= PEAK / 100 * (1 + 1e-9)
    assert values[99] == values[100] == PEAK  # the joint itself
    assert rates(name, [0], warmup=0) == [PEAK]


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.parametrize("minimum", [0.0, 0.1, 1.0])
def test_the_end_is_the_minimum_and_stays(name, minimum):
    # One rounding of peak * minimum; cosine's (1 + cos(pi)) / 2 is exactly 0.
    ends = rates(name, [DECAY, DECAY + 1, 10 * DECAY], minimum=minimum)
    assert ends == pytest.approx([PEAK * minimum] * 3, rel=1e-12)


def test_constant_stays_for_ever():
    assert set(rates("constant", [100, DECAY, 10 * DECAY])) == {PEAK}


@given(
    st.sampled_from(FALLING), st.integers(0, 999), st.floats(0, 1), st.floats(0.001, 1),
    st.lists(st.integers(0, 2000), min_size=2, max_size=30),
)
def test_it_never_rises_after_the_warm_up_nor_leaves_its_bounds(name, warmup, minimum, fraction, updates):
    updates = sorted(warmup + update for update in updates)
    values = rates(name, updates, warmup, minimum, wsd_decay_fraction=fraction)
    slack = 1e-12 * PEAK  # roundings of the last bit
    assert all(b <= a + slack for a, b in zip(values, values[1:], strict=False))
    assert all(PEAK * minimum - slack <= value <= PEAK + slack for value in values)


@given(st.integers(100, DECAY), st.floats(0, 1))
def test_values_by_other_formulas(update, minimum):
    """cos(pi x) = 1 - 2 sin(pi x / 2)^2; straight lines by interpolation between their ends."""
    low = PEAK * minimum
    x = (update - 100) / 900
    assert rates("cosine", [update], minimum=minimum)[0] == pytest.approx(
        PEAK - (PEAK - low) * math.sin(math.pi * x / 2) ** 2, rel=1e-9
    )
    assert rates("linear", [update], minimum=minimum)[0] == pytest.approx(PEAK + (low - PEAK) * x, rel=1e-9)
    # wsd: the last 300 of 1000 steps
    expected = PEAK if update <= 700 else (PEAK * (DECAY - update) + low * (update - 700)) / 300
    assert rates("wsd", [update], minimum=minimum, wsd_decay_fraction=0.3)[0] == pytest.approx(expected, rel=1e-9)


def test_wsd_decay_never_begins_inside_the_warm_up():
    values = rates("wsd", warmup=500, wsd_decay_fraction=0.9)
    assert values[499] == values[500] == PEAK
    assert values[750] == pytest.approx(PEAK * 0.55, rel=1e-12)  # half of the way from 500 to 1000

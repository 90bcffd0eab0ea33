"""Every legal layout of the small model, and few of them that hold every pair of choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations

from megagpt2.config.rules import Facts, Plan, legal_layouts
from tests.support.parity import Errors, Trained, assert_exact, assert_rounded_as, trained
from tests.support.train import small_config

BATCH = {"batch.global_batch": 8, "batch.micro_batch": 2}
BF16_FLOOR = 2.0**-6  # two bits of bf16's eight
_FACTS = Facts(world_size=1, device="cpu", bf16=True, fp16=True, deepspeed=True)


def all_layouts(precisions: Iterable[str] = ("fp32", "bf16"), worlds: Iterable[int] = (1, 2, 4)) -> list[Plan]:
    """As rules.py enumerates them: what it comes to allow is tested by being allowed."""
    configs = [small_config(**BATCH, **{"training.precision": precision}) for precision in precisions]
    return [plan for config in configs for plan in legal_layouts(config, worlds, _FACTS)]


def changes(plan: Plan) -> dict:
    """The request behind a layout."""
    return {**BATCH, "training.precision": plan.precision, **plan.changes()}


def pairs(plan: Plan) -> set[tuple]:
    """Every combination of two of the choices that make a layout."""
    choices = {**plan.changes(), "data_parallel": plan.data, "precision": plan.precision}
    return set(combinations(choices.items(), 2))


def pairwise_cover(plans: list[Plan]) -> list[Plan]:
    """Layouts in which every pair of choices that occurs in any of `plans` occurs, chosen greedily.

    Of those that add as many pairs one in the precision that was chosen less often is taken, then the quickest: fewest
    ranks, then fewest shards.
    """
    left = set().union(*map(pairs, plans))
    chosen = []
    while left:
        seen = Counter(plan.precision for plan in chosen)
        gain = {p: (len(pairs(p) & left), -seen[p.precision], -p.world_size, -p.tensor) for p in plans}
        best = max(plans, key=gain.get)
        chosen.append(best)
        left -= pairs(best)
    return chosen


def references(pool) -> dict[str, Trained]:
    """Plain torch on one process, by precision."""
    return {
        precision: trained(pool, 1, {**BATCH, "training.precision": precision}, "train_plain")
        for precision in ("fp32", "bf16")
    }


def check_layout(pool, plan: Plan, reference: dict[str, Trained]) -> Errors:
    """Train it; assert invariant I1 or I2; its errors against fp32."""
    found = trained(pool, plan.world_size, changes(plan))
    errors = Errors.of(found, reference["fp32"])
    if plan.precision == "fp32":
        assert_exact(errors)
    else:
        assert_rounded_as(found, reference["fp32"], reference[plan.precision], BF16_FLOOR)
    return errors

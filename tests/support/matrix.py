"""Every legal layout of the small model, and few of them that hold every pair of choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations

from megagpt2.config.rules import Facts, Plan, legal_layouts
from tests.support.parity import Errors, Trained, assert_exact, assert_rounded_as, trained
from tests.support.train import small_config

MICRO_BATCH = 2
WORLDS = (1, 2, 3, 4)
COVERED = (1, 2, 4)  # ranks in the fast tests: three, whose batch is another, are left to the slow ones
BF16_FLOOR = 2.0**-6  # two bits of bf16's eight
_FACTS = Facts(world_size=1, device="cpu", bf16=True, fp16=True, deepspeed=True)


def _request(precision: str, world: int) -> dict:
    """8 samples a step; 12 on three ranks, so that three replicas have as many each."""
    samples = 12 if world == 3 else 8
    return {"batch.global_batch": samples, "batch.micro_batch": MICRO_BATCH, "training.precision": precision}


def all_layouts(precisions: Iterable[str] = ("fp32", "bf16"), worlds: Iterable[int] = WORLDS) -> list[Plan]:
    """As rules.py enumerates them: what it comes to allow is tested by being allowed."""
    return [
        plan
        for precision in precisions
        for world in worlds
        for plan in legal_layouts(small_config(**_request(precision, world)), [world], _FACTS)
    ]


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


def fast_cover(precisions: Iterable[str] = ("fp32", "bf16"), worlds: Iterable[int] = COVERED) -> list[Plan]:
    """The layouts that the fast tests train, and `tools/check_layouts.py --pairwise`."""
    return pairwise_cover(all_layouts(precisions, worlds))


class References:
    """Plain torch on one process, for each batch and precision trained when it is first asked for."""

    def __init__(self, pool) -> None:
        self._pool = pool
        self._trained: dict[tuple, Trained] = {}

    def of(self, precision: str, world: int) -> Trained:
        """What a layout on that many ranks must come to."""
        request = _request(precision, world)
        key = tuple(request.values())
        if key not in self._trained:
            self._trained[key] = trained(self._pool, 1, request, "train_plain")
        return self._trained[key]


def check_layout(pool, plan: Plan, references: References) -> Errors:
    """Train it; assert invariant I1 or I2; its errors against fp32."""
    precision, world = plan.precision, plan.world_size
    found = trained(pool, world, {**_request(precision, world), **plan.changes()})
    exact = references.of("fp32", world)
    errors = Errors.of(found, exact)
    if precision == "fp32":
        assert_exact(errors)
    else:
        assert_rounded_as(found, exact, references.of(precision, world), BF16_FLOOR)
    return errors

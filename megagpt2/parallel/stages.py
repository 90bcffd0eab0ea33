"""Pipeline stages without an engine: where the layer list is cut, and what one stage holds and computes.

`parallel/pipeline.py` gives the same stages to DeepSpeed; this file knows nothing of it, so that a layout can be cut,
built and checked in one process (planning/dry_run.py).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

from torch import Tensor, nn

from megagpt2.model.gpt2 import LayerPlan
from megagpt2.model.layers import Builder


def balanced_bounds(costs: list[float], stages: int, first_block: int, last_block: int) -> list[int]:
    """Cut a list of layers into stages of equal time: [0, ..., len(costs)], stage s is [bounds[s], bounds[s + 1]).

    Layers first_block .. last_block are the blocks; what precedes them stays in the first stage, what follows
    (norm, head) in the last, and every stage gets a block. Minimizes the slowest stage, then the sum of
    squares, by dynamic programming; of equally good cuts it takes the one with more blocks in earlier stages.
    """
    blocks = last_block - first_block + 1
    if blocks < stages:
        raise ValueError(f"{blocks} blocks can't fill {stages} pipeline stages: at most {blocks} stages")
    prefix = [0]
    for cost in _whole_numbers(costs):
        prefix.append(prefix[-1] + cost)
    edge = [0, *range(first_block + 1, last_block + 1), len(costs)]  # where a cut may be; edge[i]: after i blocks

    def time(before: int, done: int) -> int:
        return prefix[edge[done]] - prefix[edge[before]]

    @cache
    def slowest(count: int, done: int) -> int:
        """The least time of the slowest of `count` stages that share the first `done` blocks."""
        if count == 1:
            return time(0, done)
        return min(max(slowest(count - 1, before), time(before, done)) for before in range(count - 1, done))

    limit = slowest(stages, blocks)

    @cache
    def evenest(count: int, done: int) -> tuple[float, tuple[int, ...]]:
        """(least sum of squares, cuts, negative) of the first `done` blocks in `count` stages, none over the limit.

        Negative, because the least tuple is then the one whose cuts come latest, from the first on.
        """
        if count == 0:
            return 0, ()
        options = []
        for before in range(count - 1, done) if count > 1 else [0]:
            squares, cuts = evenest(count - 1, before)
            last = time(before, done)
            options.append((squares + last * last if last <= limit else math.inf, (*cuts, -edge[done])))
        return min(options)

    return [0, *(-cut for cut in evenest(stages, blocks)[1])]


def _whole_numbers(costs: list[float]) -> list[int]:
    """The costs times one factor that makes them integers: their sums are exact, and equal cuts compare as equal."""
    exact = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(cost.denominator for cost in exact))
    return [int(cost * scale) for cost in exact]


class Stage(nn.Module):
    """The layers [start, stop) of the list, on one rank or one tensor-parallel group."""

    def __init__(self, plans: list[LayerPlan], start: int, stop: int, builder: Builder) -> None:
        super().__init__()
        self.names = [plan.name for plan in plans[start:stop]]
        self.first, self.last = start == 0, stop == len(plans)
        self.embedding = plans[0].build(builder) if self.first or self.last else None
        inner = plans[max(start, 1) : min(stop, len(plans) - 1)]  # without the two uses of the tied embedding
        self.layers = nn.ModuleList(plan.build(builder) for plan in inner)

    def forward(self, state: tuple[Tensor, Tensor], targets: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """state: (tokens int64 [batch, sequence], samples) on the first stage, (hidden, samples) on the others.

        Returns (hidden, samples); on the last stage the mean loss, or without targets the logits.
        """
        x, samples = state
        if self.first:
            x = self.embedding(x)
        state = (x, samples)
        for layer in self.layers:
            state = layer(state)
        return self.embedding(state[0], targets) if self.last else state

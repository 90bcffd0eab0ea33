"""How the layer list is cut into pipeline stages, and what each stage's share of the time is.

The head costs as much as several blocks (2.5 in GPT-2 1542M, 5 in 117M; 2 and 4 where blocks are computed twice): the
list is cut by estimated time, not by the number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megagpt2.config.schema import ModelConfig
from megagpt2.model.gpt2 import layer_plans
from megagpt2.parallel.stages import balanced_bounds
from megagpt2.planning.time import layer_costs


@dataclass(frozen=True)
class StageShare:
    """One pipeline stage, for people."""

    names: tuple[str, ...]  # its entries of the layer list
    blocks: int
    share: float  # of the estimated time of all stages, 0 to 1

    def __str__(self) -> str:
        blocks = f"{self.blocks} block{'s' if self.blocks != 1 else ''}"
        return f"{self.names[0]} .. {self.names[-1]} ({blocks}, {100 * self.share:.1f} %)"


def stage_bounds(model: ModelConfig, sequence: int, stages: int, recompute: str) -> list[int]:
    """Stage s holds entries bounds[s] .. bounds[s + 1] - 1 of the model's layer list.

    recompute: parallel.activation_checkpointing. Raises ValueError where there are fewer blocks than stages.
    """
    return balanced_bounds(layer_costs(model, sequence, recompute), stages, 2, 1 + model.layers)


def stage_shares(model: ModelConfig, sequence: int, bounds: list[int], recompute: str) -> list[StageShare]:
    """What stands in each stage of these bounds."""
    names = [plan.name for plan in layer_plans(model)]
    costs = layer_costs(model, sequence, recompute)
    whole = sum(costs)
    return [
        StageShare(
            tuple(names[a:b]), sum(name.startswith("h.") for name in names[a:b]), sum(costs[a:b]) / whole
        )
        for a, b in pairwise(bounds)
    ]

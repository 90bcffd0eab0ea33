"""The places of a layout, (stage, shard), built on the meta device: shapes without memory.

A layout of t x p x d ranks has t x p places; the d replicas of a place hold the same parts and run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.distributed import ProcessGroup

from megagpt2.config.rules import Plan
from megagpt2.config.schema import Config
from megagpt2.model.gpt2 import LayerPlan, layer_plans
from megagpt2.model.layers import Builder
from megagpt2.model.parameters import specified
from megagpt2.parallel.stages import Stage
from megagpt2.parallel.tensor import builder_for
from megagpt2.parallel.topology import Topology
from megagpt2.planning.memory import Place, RankBytes, kept_whole, rank_bytes
from megagpt2.planning.stages import stage_bounds

Build = Callable[[list[LayerPlan], int, int, Builder], Stage]
MakeBuilder = Callable[[int, Topology, bool], Builder]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BuiltPlace:
    """One (stage, shard)."""

    place: Place
    names: tuple[str, ...]  # its entries of the layer list
    bytes: RankBytes


def built_places(
    config: Config, plan: Plan, group: ProcessGroup | None = None, build: Build = Stage,
    make_builder: MakeBuilder = builder_for,
) -> Iterator[tuple[BuiltPlace, Stage]]:
    """Every place with its module, on the meta device in the plan's precision, stage by stage.

    group: the tensor-parallel group that the layers talk in; building takes none, running them does.
    """
    bounds = stage_bounds(config.model, plan.sequence_length, plan.pipeline, plan.activation_checkpointing)
    plans = layer_plans(config.model, plan.activation_checkpointing)
    grid = Topology(plan.tensor, plan.pipeline, plan.data)
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        for shard in range(plan.tensor):
            rank = grid.rank_at(stage, 0, shard)
            topology = Topology(plan.tensor, plan.pipeline, plan.data, rank, group)
            builder = make_builder(config.training.seed, topology, plan.sequence_parallel)
            with torch.device("meta"):
                module = build(plans, start, stop, builder).to(_DTYPES[plan.precision])
            yield _described(config, plan, stage, shard, module), module


def _described(config: Config, plan: Plan, stage: int, shard: int, module: Stage) -> BuiltPlace:
    sizes, whole = [parameter.numel() for parameter in specified(module)], kept_whole(config)
    place = Place(
        stage,
        shard,
        elements=sum(sizes),
        small=sum(size for size in sizes if size <= whole),
        blocks=sum(name.startswith("h.") for name in module.names),
        head_rows=module.embedding.weight.shape[0] if module.last else 0,
        largest=max(sizes),
    )
    return BuiltPlace(place, tuple(module.names), rank_bytes(config, plan, place))

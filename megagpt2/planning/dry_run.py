"""Every rank of a layout without its machines: each (stage, shard) is built on the meta device, which has shapes and no
memory, in one process with a process group that moves nothing.

What is checked (`DryRun.problems` names what fails):

1. The stages hold the model's layer list, each entry once; the tied embedding on the first and the last.
2. Every element of every parameter is held by exactly one shard of its stage, or, where the parameter is replicated
   by design (norms, positions, biases after a row-parallel matrix), as a whole by all of them. Names and shapes are
   those of the undivided model.
3. The elements so counted sum up to the model's size, and all elements on all places to that plus the copies.
4. A micro-batch goes forward through each stage, dropout off: what a stage passes on is what the next one takes.

Replicas (data parallelism) run the same code on the same shapes: the places are checked once, for all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagpt2.config.rules import Plan
from megagpt2.config.schema import Config
from megagpt2.model.gpt2 import GPT2, LayerPlan, layer_plans
from megagpt2.model.layers import DenseBuilder
from megagpt2.model.parameters import Spec, specified
from megagpt2.parallel.stages import Stage
from megagpt2.parallel.tensor import builder_for
from megagpt2.planning.memory import ELEMENT_BYTES
from megagpt2.planning.places import Build, BuiltPlace, MakeBuilder, built_places

SHOWN = 20
"""Problems of one kind that are named; the rest is counted."""


@dataclass(frozen=True)
class Part:
    """What one place holds of one parameter."""

    stage: int
    shard: int
    spec: Spec
    shape: tuple[int, ...]  # of the real tensor


@dataclass
class DryRun:
    """What was built, and what is wrong with it."""

    plan: Plan
    places: list[BuiltPlace] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tensors: int = 0  # parameters of the undivided model, by name
    model: int = 0  # their elements
    held: int = 0  # elements on all places, without padding
    padding: int = 0
    copies: int = 0  # of those held, what is there a second, third, ... time by design
    passed: tuple[int, ...] = ()  # shape of what goes from stage to stage


def dry_run(config: Config, plan: Plan, build: Build = Stage, make_builder: MakeBuilder = builder_for) -> DryRun:
    """Build and run every place of the layout. `build` and `make_builder` are training's; tests give wrong ones.

    Raises RuntimeError in a process that has a process group already: the layout's own is a fake one.
    """
    run = DryRun(plan, passed=_hidden_shape(config, plan))
    parts: dict[str, list[Part]] = defaultdict(list)
    passed: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    names: dict[int, tuple[str, ...]] = {}
    with _fake_group(plan) as group:
        for built, module in built_places(config, plan, group, build, make_builder):
            stage, shard = built.place.stage, built.place.shard
            run.places.append(built)
            names[stage] = built.names
            for parameter in specified(module):
                parts[parameter.spec.name].append(Part(stage, shard, parameter.spec, tuple(parameter.shape)))
            try:
                passed[stage].append((shard, _forward(run, module)))
            except (RuntimeError, ValueError, IndexError) as error:
                run.problems.append(f"stage {stage}, shard {shard}: the forward pass fails: {error}")
    with torch.device("meta"):
        reference = {p.spec.name: p.spec.shape for p in specified(GPT2(config.model, DenseBuilder(0)))}
    run.tensors, run.model = len(reference), config.model.parameters()
    _count(run, parts)
    run.problems += [
        *_shortened(_layer_problems(layer_plans(config.model), names)),
        *_shortened(_parameter_problems(plan, reference, parts)),
        *_shortened(_passed_problems(run, passed)),
    ]
    return run


@contextmanager
def _fake_group(plan: Plan) -> Iterator[ProcessGroup | None]:
    """The tensor-parallel group of rank 0 of `plan.world_size`. All such groups are alike but for who is in them."""
    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process without a process group: its own is a fake one")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.world_size)
    try:
        yield dist.new_group(list(range(plan.tensor))) if plan.tensor > 1 else None
    finally:
        dist.destroy_process_group()


def _hidden_shape(config: Config, plan: Plan) -> tuple[int, int, int]:
    """What passes between stages: the residual stream, [batch, sequence or a piece of it, width]."""
    pieces = plan.tensor if plan.sequence_parallel else 1
    return plan.micro_batch, plan.sequence_length // pieces, config.model.width


@torch.no_grad()
def _forward(run: DryRun, module: Stage) -> Tensor:
    """What the stage passes on for a micro-batch; the last one: its loss."""
    plan = run.plan
    samples = torch.zeros(plan.micro_batch, dtype=torch.int64, device="meta")
    tokens = torch.zeros(plan.micro_batch, plan.sequence_length, dtype=torch.int64, device="meta")
    hidden = torch.empty(run.passed, dtype=next(module.parameters()).dtype, device="meta")
    out = module.eval()((tokens if module.first else hidden, samples), tokens if module.last else None)
    return out if module.last else out[0]


def _passed_problems(run: DryRun, passed: dict[int, list[tuple[int, Tensor]]]) -> Iterator[str]:
    """All shards pass on the residual stream that the next stage takes; the last stage one number, in fp32."""
    for stage, outputs in passed.items():
        last = stage == run.plan.pipeline - 1
        shape, size = ((), 4) if last else (run.passed, ELEMENT_BYTES[run.plan.precision])
        for shard, out in outputs:
            if tuple(out.shape) != shape or out.element_size() != size:
                yield (
                    f"stage {stage}, shard {shard}: its {'loss' if last else 'output'} is {list(out.shape)} of"
                    f" {out.element_size()} bytes, not {list(shape)} of {size}"
                )


def _layer_problems(plans: list[LayerPlan], stages: dict[int, tuple[str, ...]]) -> Iterator[str]:
    expected = [plan.name for plan in plans]
    found = [name for stage in sorted(stages) for name in stages[stage]]
    for name in expected:
        if (count := found.count(name)) != 1:
            yield f"layer {name}: {'no stage holds it' if not count else f'held {count} times'}"
    yield from (f"layer {name}: the model has none of that name" for name in found if name not in expected)
    if sorted(found) == sorted(expected) and found != expected:
        yield f"layers are out of order: {', '.join(found)}"


def _parameter_problems(
    plan: Plan, reference: dict[str, tuple[int, ...]], parts: dict[str, list[Part]]
) -> Iterator[str]:
    for name in reference:
        if name not in parts:
            yield f"{name}: no rank holds it"
    for name, held in parts.items():
        if name not in reference:
            yield f"{name}: the model has no such parameter"
            continue
        stages = sorted({part.stage for part in held})
        tied = held[0].spec.tied
        allowed = sorted({0, plan.pipeline - 1}) if tied else stages[:1]
        if stages != allowed:
            yield f"{name}: held by stages {stages}, not by {allowed}"
        for stage in stages:
            yield from _stage_problems(name, reference[name], [p for p in held if p.stage == stage], plan.tensor)


def _stage_problems(name: str, shape: tuple[int, ...], held: list[Part], tensor: int) -> Iterator[str]:
    """Do the shards of one stage hold every element of this parameter exactly once (or all of them all)?"""
    stage = held[0].stage
    if [part.shard for part in held] != list(range(tensor)):
        yield f"{name}: on stage {stage} held by shards {[part.shard for part in held]}, not by each of {tensor} once"
        return
    for part in held:
        if part.spec.shape != shape:
            yield f"{name}: its shape is {list(part.spec.shape)} on stage {stage}, not {list(shape)}"
            return
        if part.shape != part.spec.local_shape:
            local = list(part.spec.local_shape)
            yield f"{name}: shard {part.shard} of stage {stage} holds {list(part.shape)}, not {local}"
    dims = {part.spec.dim for part in held}
    if len(dims) > 1:
        yield f"{name}: shards of stage {stage} cut different dimensions"
    elif dims != {None}:
        yield from _range_problems(name, stage, shape[dims.pop()], held)


def _range_problems(name: str, stage: int, extent: int, held: list[Part]) -> Iterator[str]:
    cuts = sorted((start, stop, part.shard) for part in held for start, stop in part.spec.ranges if start < stop)
    end = 0
    for start, stop, shard in cuts:
        if start < end:
            yield f"{name}: {start} .. {min(end, stop) - 1} held twice on stage {stage}, again by shard {shard}"
        elif start > end:
            yield f"{name}: {end} .. {start - 1} held by no shard of stage {stage}"
        end = max(end, stop)
    if end != extent:
        yield f"{name}: {min(end, extent)} .. {max(end, extent) - 1} " + (
            f"held by no shard of stage {stage}" if end < extent else f"don't exist, but stage {stage} holds them"
        )


def _count(run: DryRun, parts: dict[str, list[Part]]) -> None:
    """The sums, from the sizes of the tensors: they don't rely on the ranges."""
    for held in parts.values():
        rows = math.prod(held[0].spec.shape[1:])
        padding = sum(part.spec.padding * rows for part in held)
        elements = sum(math.prod(part.shape) for part in held) - padding
        stages = {part.stage for part in held}
        first = [math.prod(part.shape) - part.spec.padding * rows for part in held if part.stage == min(stages)]
        once = sum(first) if held[0].spec.sharded else first[0]
        run.held, run.padding, run.copies = run.held + elements, run.padding + padding, run.copies + elements - once
    if run.held - run.copies != run.model:
        run.problems.append(
            f"the places hold {run.held - run.copies:,} elements besides copies and padding, the model has"
            f" {run.model:,}"
        )


def _shortened(problems: Iterator[str]) -> list[str]:
    found = list(problems)
    rest = [f"... and {len(found) - SHOWN} more like it"] if len(found) > SHOWN else []
    return found[:SHOWN] + rest

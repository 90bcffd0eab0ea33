"""From any format to any other, a tensor at a time, and the proof that both are the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from megagpt2.checkpoint.formats.source import Source, WithOptimizer, first_difference, whole_specs
from megagpt2.checkpoint.save import Ranks, save_checkpoint
from megagpt2.checkpoint.shards import Slices
from megagpt2.checkpoint.snapshot import Snapshot, TrainingState, contribution
from megagpt2.checkpoint.store import CheckpointError
from megagpt2.model.gpt2 import layer_plans
from megagpt2.model.layers import DenseBuilder
from megagpt2.model.parameters import Extent, Spec
from megagpt2.parallel.topology import Topology

TOKENS = 64  # positions that are compared, or the context if that is shorter


def fixed_input(vocabulary: int, context: int) -> Tensor:
    """int64 [2, sequence]: token numbers spread over the vocabulary, the same for every model of it."""
    length = min(TOKENS, context)
    numbers = torch.arange(2 * length, dtype=torch.int64)
    return (numbers * 2654435761 % 2**32 * vocabulary // 2**32).view(2, length)


@torch.no_grad()
def logits_of(source: Source, tokens: Tensor) -> Tensor:
    """fp32 [batch, sequence, vocabulary] by our model in fp32, whose layers are there one after the other."""
    first, *rest = layer_plans(source.model)
    samples = torch.zeros(len(tokens), dtype=torch.int64)

    def layer(build: Callable[[DenseBuilder], nn.Module]) -> nn.Module:
        module = build(DenseBuilder(seed=0))
        for parameter in module.parameters():
            parameter.zero_()[tuple(slice(n) for n in parameter.spec.shape)] = source.read(
                Spec(parameter.spec.name, parameter.spec.shape)
            ).float()
        return module.eval()

    embedding = layer(first.build)
    state = embedding(tokens), samples
    for plan in rest:
        if plan.build is not None:
            state = layer(plan.build)(state)
    return embedding(state[0])


def difference(source: Source, target: Source) -> tuple[float, float]:
    """Largest |difference| of the logits on the fixed input, and the largest |logit|. CheckpointError where the models
    are not even of one shape."""
    ours, theirs = source.model, target.model
    if name := first_difference(ours, theirs):
        raise CheckpointError(f"{name} is {getattr(ours, name)} before, {getattr(theirs, name)} after conversion")
    tokens = fixed_input(ours.vocabulary, ours.context)
    before, after = logits_of(source, tokens), logits_of(target, tokens)
    return float((before - after).abs().max()), float(before.abs().max())


class Trained(Source, WithOptimizer, Protocol):
    """A source that holds Adam's state."""


def write_checkpoint(
    checkpoints: Path, source: Trained, tokenizer_files: dict[str, str], end_of_text: int | None
) -> Path:
    """A checkpoint of ours, from which training goes on with checkpoint.resume."""
    specs = whole_specs(source.model)
    extents = [Extent.whole(spec) for spec in specs]
    kinds = tuple(kind for kind in source.kinds if kind != "master" or source.dtype != torch.float32)

    def states() -> Iterator[dict[str, Tensor]]:
        for spec in specs:
            yield {kind: source.state(kind, spec).contiguous().flatten() for kind in kinds}

    snapshot = Snapshot(
        extents, (source.read(spec).contiguous().flatten() for spec in specs), Slices(kinds, extents, states()),
        TrainingState(step=source.updates, samples_seen=0, updates=source.updates), source.model, source.dtype,
        tokenizer_files=tokenizer_files, end_of_text=end_of_text,
    )
    return save_checkpoint(checkpoints, contribution(snapshot, Topology()), Ranks(Topology()))

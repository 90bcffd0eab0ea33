"""What a rank contributes to a checkpoint, and a copy of it that training does not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megagpt2.checkpoint.shards import Slices
from megagpt2.config.schema import ModelConfig
from megagpt2.model.parameters import Extent, Spec
from megagpt2.parallel.topology import Topology

_BITS = {2: torch.int16, 4: torch.int32}
MODEL_FILE = 1 << 31  # bytes of a stage's weights for which another replica writes a file of its own


@dataclass(frozen=True)
class TrainingState:
    """What resuming needs beside tensors: one integer for the data, and what the schedule and scaler count."""

    step: int  # steps made, skipped ones included
    samples_seen: int
    updates: int  # steps that changed the weights: what the learning rate and Adam count
    losses: list[float] = field(default_factory=list)  # the last ones, newest last
    skipped_samples: list[list[int]] = field(default_factory=list)  # [first, past the last]: that data.skip passed over
    loss_scaler: dict[str, float] = field(default_factory=dict)
    data: dict[str, int | str | None] = field(default_factory=dict)  # what samples_seen counts: corpus, length, seed


@dataclass(frozen=True)
class Snapshot:
    """A rank's weights and optimizer slices. Values come one after the other and need to hold only until the next."""

    weights: list[Extent]  # in the order of the values: what a file holds is known before it is written
    weight_values: Iterable[Tensor]  # [elements] each, in `dtype`
    slices: Slices
    state: TrainingState
    model: ModelConfig
    dtype: torch.dtype
    partitioned: bool = False  # replicas hold different stretches of the weights (ZeRO-3)
    tokenizer_files: dict[str, str] = field(default_factory=dict)  # name -> text, already read
    end_of_text: int | None = None
    # What `contribution` adds: the tensors of each of this stage's files. Replica i owns the i-th; one may be empty.
    files: list[list[Spec]] = field(default_factory=list)

    def bytes(self) -> int:
        """Of its tensors."""
        weights = sum(extent.elements for extent in self.weights) * self.dtype.itemsize
        return weights + 4 * len(self.slices.kinds) * sum(place.elements for place in self.slices.places)

    def noted(self) -> Snapshot:
        """The same, all tensors found out; not copied, and all to be there at once."""
        return replace(
            self, weight_values=list(self.weight_values), slices=replace(self.slices, values=list(self.slices.values))
        )

    def copied(self) -> Snapshot:
        """The same with copies in main memory."""
        weights = [copy_to_memory(value) for value in self.weight_values]
        values = [{kind: copy_to_memory(v) for kind, v in parts.items()} for parts in self.slices.values]
        return replace(self, weight_values=weights, slices=replace(self.slices, values=values))


def copy_to_memory(tensor: Tensor) -> Tensor:
    """A copy on the CPU. Of a GPU's tensor the copy is queued in the current stream, into locked memory, which torch
    keeps for the next one. On the CPU one thread makes it, which leaves torch's own threads to training."""
    if tensor.device.type == "cuda":
        locked = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return locked.copy_(tensor, non_blocking=True)
    copy, bits = torch.empty(tensor.shape, dtype=tensor.dtype), _BITS[tensor.itemsize]
    np.copyto(copy.view(bits).numpy(), tensor.detach().view(bits).numpy())  # numpy has no bf16
    return copy


def contribution(snapshot: Snapshot, topology: Topology) -> Snapshot:
    """Without what another rank contributes: what all shards or replicas hold alike, and the tied embedding's second
    copy. Values are looked at as they come, for ranks may have to make them together."""
    specs = [extent.spec for extent in snapshot.weights if topology.first_stage or not extent.spec.tied]
    stage_bytes = snapshot.model.parameters() * snapshot.dtype.itemsize / topology.pipeline
    files = in_files(specs, min(topology.data, max(1, math.ceil(stage_bytes / MODEL_FILE))))
    owned = {spec.name for spec in files[topology.replica]} if topology.replica < len(files) else set()

    def of_this_rank(extent: Extent) -> bool:
        """Of what several stages or shards hold the first one's."""
        spec = extent.spec
        return (topology.first_stage or not spec.tied) and (topology.shard == 0 or spec.sharded) and extent.elements > 0

    def weight_of_this_rank(extent: Extent) -> bool:
        return of_this_rank(extent) and (snapshot.partitioned or extent.spec.name in owned)

    def chosen(which: Callable[[Extent], bool], extents: list[Extent], values: Iterable) -> Iterator:
        return (value for extent, value in zip(extents, values, strict=True) if which(extent))

    slices = snapshot.slices
    return replace(
        snapshot,
        files=files,
        weights=list(filter(weight_of_this_rank, snapshot.weights)),
        weight_values=chosen(weight_of_this_rank, snapshot.weights, snapshot.weight_values),
        slices=replace(
            slices, places=list(filter(of_this_rank, slices.places)),
            values=chosen(of_this_rank, slices.places, slices.values),
        ),
    )


def in_files(specs: list[Spec], count: int) -> list[list[Spec]]:
    """A stage's tensors in so many files: in order, about as much in each."""
    files: list[list[Spec]] = [[] for _ in range(count)]
    total, before = sum(math.prod(spec.shape) for spec in specs), 0
    for spec in specs:
        size = math.prod(spec.shape)
        files[min(int((before + size / 2) * count / total), count - 1)].append(spec)
        before += size
    return files

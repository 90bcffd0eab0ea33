"""Optimizer state as named slices: one file per rank, each slice saying where in the whole tensor it lies.

    optimizer/rank_00003.safetensors:  "exp_avg/h.0.attn.c_attn.weight" fp32 [n], ...
    its metadata, "slices":            {"h.0.attn.c_attn.weight": {"shape", "dim", "ranges", "padding",
                                                                    "start", "stop"}}

The slice is elements start .. stop - 1 of the flattened tensor-parallel shard, which is the concatenation along
`dim` of the whole tensor's `ranges`. Any layout can therefore read what any other wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megagpt2.checkpoint.store import CheckpointError, open_safetensors
from megagpt2.checkpoint.stream import TensorFile
from megagpt2.model.parameters import Spec


@dataclass(frozen=True)
class Slices:
    """One rank's slices. Where they lie is known beforehand; their values come one after the other, and need to hold
    only until the next: state that is not in memory is never there as a whole."""

    kinds: tuple[str, ...] = ()  # of "master", "exp_avg", "exp_avg_sq"
    places: list[tuple[Spec, int, int]] = field(default_factory=list)  # parameter, first element, past the last
    values: Iterable[dict[str, Tensor]] = ()  # {kind: fp32 [stop - start]} for each place

    @classmethod
    def in_memory(cls, pieces: list[tuple[Spec, int, dict[str, Tensor]]]) -> Self:
        """Of pieces that are there: parameter, first element, {kind: fp32 [n]}."""
        kinds = tuple(pieces[0][2]) if pieces else ()
        places = [(spec, start, start + parts[kinds[0]].numel()) for spec, start, parts in pieces]
        return cls(kinds, places, [parts for *_, parts in pieces])


def write_slices(path: Path, slices: Slices) -> None:
    """One rank's slices, as one file."""
    # An fp32 run of an optimizer without moments has no kinds: its weights are all of its state.
    places = slices.places if slices.kinds else []
    described = {
        spec.name: {
            "shape": spec.shape, "dim": spec.dim, "ranges": spec.ranges, "padding": spec.padding, "start": start,
            "stop": stop,
        }
        for spec, start, stop in places
    }
    entries = [
        (f"{kind}/{spec.name}", torch.float32, (stop - start,)) for spec, start, stop in places for kind in slices.kinds
    ]
    with TensorFile(path, entries, {"slices": json.dumps(described)}) as file:
        if entries:
            for (spec, _, _), parts in zip(places, slices.values, strict=True):
                for kind in slices.kinds:
                    file.add(f"{kind}/{spec.name}", parts[kind])


class SliceReader:
    """Whole tensors from all ranks' files; memory of one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, list[tuple[Path, dict]]] = {}
        self.kinds: set[str] = set()
        files = sorted(folder.glob("rank_*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} holds no optimizer state")
        for path in files:
            with open_safetensors(path) as f:
                try:
                    slices = json.loads((f.metadata() or {})["slices"])
                except (KeyError, ValueError) as error:
                    raise CheckpointError(f"{path} is not a file of optimizer slices: {error!r}") from None
                self.kinds |= {key.split("/", 1)[0] for key in f.keys()}  # noqa: SIM118 - not a dict
            for name, place in slices.items():
                self.places.setdefault(name, []).append((path, place))

    def read(self, kind: str, spec: Spec) -> Tensor:
        """The whole tensor of one kind ("master", "exp_avg", "exp_avg_sq") of a parameter, fp32."""
        if spec.name not in self.places:
            raise CheckpointError(f"{self.folder} has no state of {spec.name}: is it another model?")
        if kind not in self.kinds:
            raise CheckpointError(
                f"{self.folder} has no {kind}, only {', '.join(sorted(self.kinds))}: another optimizer wrote it"
            )
        whole = torch.empty(spec.shape)
        covered = torch.zeros(spec.shape, dtype=torch.bool)
        shards: dict[tuple, list[tuple[Path, dict]]] = {}
        for path, place in self.places[spec.name]:
            if tuple(place["shape"]) != spec.shape:
                raise CheckpointError(f"{path}: {spec.name} has shape {place['shape']}, the model {list(spec.shape)}")
            shards.setdefault(tuple(map(tuple, place["ranges"])), []).append((path, place))
        for ranges, pieces in shards.items():
            dim, padding = pieces[0][1]["dim"], pieces[0][1]["padding"]
            shard = Spec(spec.name, spec.shape, dim=dim, ranges=ranges, padding=padding)
            local = torch.empty(shard.local_shape).flatten()
            here = torch.zeros(local.shape, dtype=torch.bool)
            for path, place in pieces:
                with open_safetensors(path) as f:
                    local[place["start"] : place["stop"]] = f.get_tensor(f"{kind}/{spec.name}")
                here[place["start"] : place["stop"]] = True
            shard.place(local.view(shard.local_shape), whole)
            shard.place(here.view(shard.local_shape), covered)
        if not covered.all():
            raise CheckpointError(f"{self.folder}: parts of {kind}/{spec.name} are in no file")
        return whole

    def local_value(self, kind: str, spec: Spec) -> Tensor:
        """This rank's part."""
        return spec.local(self.read(kind, spec))

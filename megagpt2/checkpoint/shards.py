"""Optimizer state as named slices: a file for each rank, and one index that says where in the whole tensors they lie.

    optimizer/rank_00003.safetensors:  "exp_avg/h.0.attn.c_attn.weight" fp32 [n], ...
    optimizer/index.json:              {"kinds": ["exp_avg", ...],
                                        "slices": {"h.0.attn.c_attn.weight": [{"file", "shape", "dim", "ranges",
                                                                               "padding", "start", "stop"}, ...]}}

A slice is elements start .. stop - 1 of the flattened tensor-parallel shard, which is the concatenation along `dim` of
the whole tensor's `ranges`. Any layout can therefore read what any other wrote, and opens only the files that hold what
it needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt2.checkpoint.rectangles import Rectangle, copy_shared, rectangles
from megagpt2.checkpoint.store import CheckpointError, get_tensor, open_safetensors
from megagpt2.checkpoint.stream import TensorFile
from megagpt2.model.parameters import Extent, Spec

INDEX = "index.json"


@dataclass(frozen=True)
class Slices:
    """One rank's slices. Where they lie is known beforehand; their values come one after the other, and need to hold
    only until the next: state that is not in memory is never there as a whole."""

    kinds: tuple[str, ...] = ()  # of "master", "exp_avg", "exp_avg_sq"
    places: list[Extent] = field(default_factory=list)
    values: Iterable[dict[str, Tensor]] = ()  # {kind: fp32 [elements]} for each place


def write_slices(path: Path, slices: Slices) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """One rank's slices, as one file: the file's record, and what the index says of it. No file where there are none,
    as in an fp32 run of an optimizer without moments, whose weights are all of its state."""
    places = slices.places if slices.kinds else []
    listed = {place.spec.name: {"file": path.name, **described(place)} for place in places}
    entries = [
        (f"{kind}/{place.spec.name}", torch.float32, (place.elements,)) for place in places for kind in slices.kinds
    ]
    if not entries:
        for _ in slices.values:  # ranks may have to make them together
            pass
        return None, {"kinds": [], "slices": {}}
    with TensorFile(path, entries, {"format": "pt"}) as file:
        for place, parts in zip(places, slices.values, strict=True):
            for kind in slices.kinds:
                file.add(f"{kind}/{place.spec.name}", parts[kind])
    return file.record, {"kinds": list(slices.kinds), "slices": listed}


def described(extent: Extent) -> dict[str, Any]:
    """An extent in JSON's types, without its name."""
    spec = extent.spec
    return {
        "shape": spec.shape, "dim": spec.dim, "ranges": spec.ranges, "padding": spec.padding, "start": extent.start,
        "stop": extent.stop,
    }


def understood(name: str, data: dict[str, Any]) -> Extent:
    """The way back; whatever raises KeyError, TypeError or ValueError makes no sense."""
    shape, dim = _integers(data["shape"], 1), data["dim"]
    ranges = tuple((begin, end) for begin, end in map(_integers, data["ranges"]))
    start, stop, padding = _integers([data["start"], data["stop"], data["padding"]])
    if len(shape) not in (1, 2) or (dim is not None and dim not in range(len(shape))):
        raise ValueError(f"shape {shape}, dim {dim}")
    if dim is not None and any(not begin <= end <= shape[dim] for begin, end in ranges):
        raise ValueError(f"ranges {ranges} of a dimension of {shape[dim]}")
    extent = Extent(Spec(name, shape, dim=dim, ranges=ranges, padding=padding), start, stop)
    if not start <= stop <= Extent.whole(extent.spec).stop:
        raise ValueError(f"elements {start} to {stop} of {Extent.whole(extent.spec).stop}")
    return extent


def _integers(value: Any, least: int = 0) -> tuple[int, ...]:
    if not all(type(n) is int and n >= least for n in value):
        raise ValueError(f"{value!r} are not whole numbers from {least} on")
    return tuple(value)


def index_of(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One index of what `write_slices` returned on all ranks."""
    kinds: list[str] = []
    slices: dict[str, list] = {}
    for part in parts:
        kinds = part["kinds"] or kinds
        for name, place in part["slices"].items():
            slices.setdefault(name, []).append(place)
    return {"kinds": kinds, "slices": slices}


@dataclass(frozen=True)
class _Slice:
    """The file that holds it, and where its elements lie."""

    file: str
    extent: Extent
    rectangles: tuple[Rectangle, ...]


def _slice(name: str, data: dict[str, Any]) -> _Slice:
    extent, file = understood(name, data), data["file"]
    if Path(file).name != file:
        raise ValueError(f"the file {file!r} lies outside the folder")
    return _Slice(file, extent, tuple(rectangles(extent)))


class SliceReader:
    """Any extent of any parameter's state from the files of all ranks that wrote it. Files are mapped: what is not
    asked for is not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.kinds = {str(kind) for kind in index["kinds"]}
            self._slices = {name: [_slice(name, data) for data in every] for name, every in index["slices"].items()}
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no optimizer state: {path} does not exist") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not an index of optimizer slices: {error!r}") from None

    def piece(self, kind: str, extent: Extent) -> Tensor:
        """What a rank holds of a parameter's state ("master", "exp_avg", "exp_avg_sq"), fp32 [elements]; padding is
        0."""
        spec = extent.spec
        if spec.name not in self._slices:
            raise CheckpointError(f"{self.folder} has no state of {spec.name}: is it another model?")
        if kind not in self.kinds:
            raise CheckpointError(
                f"{self.folder} has no {kind}, only {', '.join(sorted(self.kinds))}: another optimizer wrote it"
            )
        wanted = list(rectangles(extent))
        values, seen = torch.zeros(extent.elements), torch.zeros(extent.elements, dtype=torch.bool)
        for one in self._slices[spec.name]:
            if one.extent.spec.shape != spec.shape:
                raise CheckpointError(
                    f"{self.folder / one.file}: {spec.name} has shape {list(one.extent.spec.shape)}, the model"
                    f" {list(spec.shape)}"
                )
            pairs = [(theirs, mine) for theirs in one.rectangles for mine in wanted if theirs.shared(mine)]
            stored = self._stored(one, f"{kind}/{spec.name}") if pairs else None
            for theirs, mine in pairs:
                self.bytes_read += 4 * copy_shared(theirs, stored, mine, values, seen)
        if int(seen.sum()) != sum(rectangle.elements for rectangle in wanted):
            raise CheckpointError(f"{self.folder}: parts of {kind}/{spec.name} are in no file")
        return values

    def read(self, kind: str, spec: Spec) -> Tensor:
        """A rank's whole part of a parameter's state."""
        return self.piece(kind, Extent.whole(spec)).view(spec.local_shape)

    def _stored(self, one: _Slice, name: str) -> Tensor:
        path = self.folder / one.file
        if one.file not in self._open:
            self._open[one.file] = open_safetensors(path)
        stored = get_tensor(self._open[one.file], path, name)
        if stored.dtype != torch.float32 or tuple(stored.shape) != (one.extent.elements,):
            raise CheckpointError(
                f"{path}: {name} is {stored.dtype} {list(stored.shape)}, the index says fp32 [{one.extent.elements}]"
            )
        return stored

"""Writing a checkpoint from all ranks at once.

    every stage   model/model-0000i-of-0000n.safetensors: its shards put together, Hugging Face names; large stages in
                  several files, each the work of another replica
    every rank    optimizer/rank_0000R.safetensors: its slices of masters and moments
    rank 0        config.json, indices, tokenizer, state.json; then the manifest, then the rename

All ranks call it together. The folder must be on a file system that every rank sees. Where one rank can't write, all
are told, and nothing is left but the checkpoints that were there before.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt2.checkpoint import store
from megagpt2.checkpoint.disk import write_file
from megagpt2.checkpoint.formats import huggingface
from megagpt2.checkpoint.rectangles import copy_shared, rectangles, whole
from megagpt2.checkpoint.shards import INDEX, described, index_of, understood, write_slices
from megagpt2.checkpoint.snapshot import Snapshot
from megagpt2.checkpoint.stream import TensorFile
from megagpt2.model.parameters import Extent, Spec
from megagpt2.parallel.messages import gather_texts, receive_text, send_text
from megagpt2.parallel.topology import Topology

T = TypeVar("T")
_CPU = torch.device("cpu")
_SEEN_WITHIN = 10.0  # seconds in which a network file system shows what another node has made


class SaveError(RuntimeError):
    """A checkpoint could not be written: raised on every rank, with what every rank that failed says."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that write together."""

    topology: Topology
    group: dist.ProcessGroup | None = None  # of all ranks, on the CPU; None: the default group

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every rank; raises SaveError on all where it was an OSError on one."""
        problem, answer = "", None
        try:
            answer = action()
        except OSError as error:
            problem = str(error) or type(error).__name__
        every = [problem] if self.topology.world_size == 1 else gather_texts(problem, _CPU, self.group)
        if told := [f"rank {rank}: {text}" for rank, text in enumerate(every) if text]:
            more = f" (and {len(told) - 3} other ranks)" if len(told) > 3 else ""
            raise SaveError("; ".join(told[:3]) + more)
        return answer


def save_checkpoint(checkpoints: Path, snapshot: Snapshot, ranks: Ranks) -> Path:
    """Write `checkpoints/step_N`; returns it when it is complete and durable. snapshot: `contribution` of this rank."""
    topology, step, first = ranks.topology, snapshot.state.step, ranks.topology.rank == 0
    folder = store.partial_folder(checkpoints, step)
    try:
        ranks.together(lambda: first and store.begin(checkpoints, step))
        ranks.together(lambda: wait_for(folder / store.PARTS))
        ranks.together(lambda: _write_part(folder, snapshot, ranks))
        ranks.together(lambda: first and _finish(checkpoints, folder, snapshot, topology))
    except SaveError:
        if first:
            store.give_up(checkpoints, step)
        raise
    return store.step_folder(checkpoints, step)


def wait_for(folder: Path) -> None:
    """Until what rank 0 has made is here too."""
    until = time.monotonic() + _SEEN_WITHIN
    while not folder.is_dir():
        if time.monotonic() > until:
            raise OSError(
                f"{platform.node()} does not see {folder}, which rank 0 has made: run.directory must be on a file"
                " system that all nodes share"
            )
        time.sleep(0.1)


def _write_part(folder: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    """This rank's files, and a note on them for rank 0."""
    files, tensors = _write_model(folder / "model", snapshot, ranks)
    path = folder / "optimizer" / f"rank_{ranks.topology.rank:05d}.safetensors"
    record, slices = write_slices(path, snapshot.slices)
    if record is not None:
        files[f"optimizer/{path.name}"] = record
    note = {"files": files, "tensors": tensors, "slices": slices}
    write_file(folder / store.PARTS / f"rank_{ranks.topology.rank:05d}.json", json.dumps(note).encode())


# Model files. Each has an owner, who writes it, and contributors, who hold parts of its tensors.


def _write_model(folder: Path, snapshot: Snapshot, ranks: Ranks) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """This rank's share of its stage's files: {path in the checkpoint: record}, {file: names of its tensors}."""
    grid, values = ranks.topology, iter(snapshot.weight_values)
    files, tensors, count = {}, {}, len(snapshot.files)
    problem = None
    for number, members in enumerate(snapshot.files):
        if not members:
            continue
        names = {spec.name for spec in members}
        mine = [extent for extent in snapshot.weights if extent.spec.name in names]
        replicas = range(grid.data) if snapshot.partitioned else [number]
        owner = grid.rank_at(grid.stage, number, 0)
        others = [r for replica in replicas for r in grid.tensor_ranks(grid.stage, replica) if r != owner]
        if grid.rank in others:
            _contribute(mine, values, owner, ranks)
        if grid.rank != owner:
            continue
        path = folder / f"model-{grid.stage * count + number + 1:05d}-of-{grid.pipeline * count:05d}.safetensors"
        wholes = _assembled(members, mine, values, others, snapshot.dtype, ranks)
        entries = [_entry(spec, snapshot) for spec in members]
        try:
            with TensorFile(path, entries, {"format": "pt"}) as file:
                for (name, *_), tensor in zip(entries, wholes, strict=True):
                    file.add(name, tensor)
        except OSError as error:
            problem = error
            for _ in wholes:  # the others send what they have before they learn of it
                pass
            continue
        files[f"model/{path.name}"] = file.record
        tensors[path.name] = [name for name, *_ in entries]
    if problem is not None:
        raise problem
    return files, tensors


def _entry(spec: Spec, snapshot: Snapshot) -> tuple[str, torch.dtype, tuple[int, ...]]:
    return huggingface.foreign_name(spec.name, snapshot.model), snapshot.dtype, huggingface.foreign_shape(spec)


def _contribute(extents: list[Extent], values: Iterator[Tensor], owner: int, ranks: Ranks) -> None:
    """Send the owner of a file this rank's parts of its tensors."""
    send_text(json.dumps([[extent.spec.name, described(extent)] for extent in extents]), owner, ranks.group)
    for _, value in zip(extents, values):  # noqa: B905 - in this order: one value too many would be lost
        dist.send(value.detach().to(_CPU).contiguous(), owner, group=ranks.group)


def _assembled(
    specs: list[Spec], mine: list[Extent], values: Iterator[Tensor], others: list[int], dtype: torch.dtype,
    ranks: Ranks,
) -> Iterator[Tensor]:
    """The whole tensors, in transformers' orientation, from this rank's parts and the others'."""
    parts = {ranks.topology.rank: {extent.spec.name: extent for extent in mine}}
    for rank in others:
        listed = json.loads(receive_text(rank, ranks.group))
        parts[rank] = {name: understood(name, data) for name, data in listed}
    for spec in specs:
        tensor = torch.empty(huggingface.foreign_shape(spec), dtype=dtype)
        target, done = whole(spec.shape, huggingface.is_transposed(spec.name)), 0
        for rank, extents in parts.items():
            if spec.name not in extents:
                continue
            extent = extents[spec.name]
            if rank == ranks.topology.rank:
                value = next(values).detach().to(_CPU)
            else:
                value = torch.empty(extent.elements, dtype=dtype)
                dist.recv(value, rank, group=ranks.group)
            done += sum(copy_shared(source, value, target, tensor.view(-1)) for source in rectangles(extent))
        if done != math.prod(spec.shape):
            raise RuntimeError(f"{done} of {math.prod(spec.shape)} elements of {spec.name} are on no rank")
        yield tensor


# What rank 0 adds.


def _finish(checkpoints: Path, folder: Path, snapshot: Snapshot, topology: Topology) -> None:
    notes = []
    for rank in range(topology.world_size):
        notes.append(json.loads((folder / store.PARTS / f"rank_{rank:05d}.json").read_text(encoding="utf-8")))
    records = {name: record for note in notes for name, record in note["files"].items()}
    weight_map = {name: file for note in notes for file, names in note["tensors"].items() for name in names}
    total = snapshot.model.parameters() * snapshot.dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    config = huggingface.config_json(snapshot.model, snapshot.dtype, snapshot.end_of_text)
    texts = {
        "model/config.json": json.dumps(config, indent=1),
        f"model/{huggingface.INDEX}": json.dumps(index, indent=1),
        f"optimizer/{INDEX}": json.dumps(index_of(note["slices"] for note in notes)),
        "state.json": json.dumps(asdict(snapshot.state), indent=1),
    }
    texts |= {f"model/{name}": text for name, text in snapshot.tokenizer_files.items()}
    for name, text in texts.items():
        records[name] = write_file(folder / name, text.encode())
    grid = {"tensor": topology.tensor, "pipeline": topology.pipeline, "data": topology.data}
    store.commit(checkpoints, snapshot.state.step, records, grid)

"""Writing a checkpoint from all ranks at once.

    every stage   model/model-0000S-of-0000P.safetensors: its tensor-parallel shards put together, Hugging Face names
    every rank    optimizer/rank_0000R.safetensors: its slices of masters and moments
    rank 0        config.json, index, tokenizer, state.json; then the manifest, then the rename

All ranks must call it together. The folder must be on a file system that every rank sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt2.checkpoint import store
from megagpt2.checkpoint.formats import huggingface
from megagpt2.checkpoint.shards import Slices, write_slices
from megagpt2.checkpoint.stream import TensorFile
from megagpt2.config.schema import ModelConfig
from megagpt2.model.parameters import Spec
from megagpt2.parallel.topology import Topology


@dataclass(frozen=True)
class TrainingState:
    """What resuming needs beside tensors: one integer for the data, and what the schedule and scaler count."""

    step: int  # steps made, skipped ones included
    samples_seen: int
    updates: int  # steps that changed the weights: what the learning rate counts
    losses: list[float] = field(default_factory=list)  # the last ones, newest last
    loss_scaler: dict[str, float] = field(default_factory=dict)
    data: dict[str, int | str | None] = field(default_factory=dict)  # what samples_seen counts: corpus, length, seed


@dataclass(frozen=True)
class Snapshot:
    """What a rank contributes: its weights (local parts, stored dtype, in order) and its optimizer slices."""

    specs: list[Spec]  # of the weights, in their order: what a file holds is known before it is written
    weights: Iterable[tuple[Spec, Tensor]]
    slices: Slices
    state: TrainingState
    model: ModelConfig
    dtype: torch.dtype
    tokenizer_files: dict[str, str] = field(default_factory=dict)  # name -> text, already read
    end_of_text: int | None = None


def _peer_spec(spec: Spec, shard: int, topology: Topology) -> Spec:
    """Receive a description of another shard's part: ranges and padding, as integers."""
    flat = torch.zeros(2 * len(spec.ranges) + 1, dtype=torch.int64, device=_wire(topology))
    dist.recv(flat, topology.rank_at(topology.stage, topology.replica, shard), group=topology.tensor_group)
    numbers = flat.tolist()
    ranges = tuple(zip(numbers[:-1:2], numbers[1:-1:2], strict=True))
    return Spec(spec.name, spec.shape, dim=spec.dim, ranges=ranges, padding=numbers[-1])


def _wire(topology: Topology) -> torch.device:
    """Where tensors must be for the backend to carry them."""
    backend = dist.get_backend(topology.tensor_group) if topology.tensor_group is not None else "gloo"
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def assemble(weights: Iterable[tuple[Spec, Tensor]], topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) on shard 0 of this stage; the other shards send, and yield nothing."""
    wire = _wire(topology)
    for spec, local in weights:
        local = local.detach().to(wire).contiguous()
        if topology.tensor == 1 or not spec.sharded:
            if topology.shard == 0:
                whole = torch.empty(spec.shape, dtype=local.dtype)
                spec.place(local.cpu(), whole)
                yield spec.name, whole
            continue
        if topology.shard:
            home = topology.rank_at(topology.stage, topology.replica, 0)
            numbers = [n for pair in spec.ranges for n in pair] + [spec.padding]
            dist.send(torch.tensor(numbers, device=wire), home, group=topology.tensor_group)
            dist.send(local, home, group=topology.tensor_group)
            continue
        whole = torch.empty(spec.shape, dtype=local.dtype)
        spec.place(local.cpu(), whole)
        for shard in range(1, topology.tensor):
            peer = _peer_spec(spec, shard, topology)
            piece = torch.empty(peer.local_shape, dtype=local.dtype, device=wire)
            dist.recv(piece, topology.rank_at(topology.stage, topology.replica, shard), group=topology.tensor_group)
            peer.place(piece.cpu(), whole)
        yield spec.name, whole


def _write_model_part(folder: Path, snapshot: Snapshot, topology: Topology) -> list[Path]:
    """This stage's file. The tied embedding is on two stages: only the first writes it."""
    specs = [s for s in snapshot.specs if topology.first_stage or s.name != "wte.weight"]  # the tied second copy
    if topology.shard or not specs:
        for _ in assemble(snapshot.weights, topology):
            pass
        return []

    def stored(name: str, whole: Tensor) -> Tensor:
        return huggingface.transpose_if_projection(name, whole)

    entries = [
        (huggingface.foreign_name(s.name, snapshot.model), snapshot.dtype,
         tuple(stored(s.name, torch.empty(s.shape, device="meta")).shape))
        for s in specs
    ]
    path = folder / "model" / f"model-{topology.stage + 1:05d}-of-{topology.pipeline:05d}.safetensors"
    names = {s.name for s in specs}
    with TensorFile(path, entries, {"format": "pt"}) as file:
        for name, whole in assemble(snapshot.weights, topology):
            if name in names:
                file.add(huggingface.foreign_name(name, snapshot.model), stored(name, whole))
    return [path]


def _write_common(folder: Path, snapshot: Snapshot) -> list[Path]:
    """What rank 0 adds once all model files are there."""
    weight_map, total = {}, 0
    for path in sorted((folder / "model").glob("model-*.safetensors")):
        with store.open_safetensors(path) as f:
            weight_map |= dict.fromkeys(f.keys(), path.name)
        total += path.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    texts = {
        "model/config.json": json.dumps(
            huggingface.config_json(snapshot.model, snapshot.dtype, snapshot.end_of_text), indent=1
        ),
        f"model/{huggingface.INDEX}": json.dumps(index, indent=1),
        "state.json": json.dumps(asdict(snapshot.state), indent=1),
    }
    texts |= {f"model/{name}": text for name, text in snapshot.tokenizer_files.items()}
    for name, text in texts.items():
        store.write_text(folder / name, text)
    return [folder / name for name in texts]


def _record(folder: Path, paths: list[Path], rank: int, part: str) -> None:
    """Sync and hash what this rank wrote, and leave the result for rank 0."""
    records = {}
    for path in paths:
        store.sync_file(path)
        records[str(path.relative_to(folder))] = store.file_record(path)
    store.write_text(folder / "parts" / f"{part}_{rank:05d}.json", json.dumps(records))


def _barrier(topology: Topology) -> None:
    if topology.world_size > 1:
        dist.barrier()


def save_checkpoint(checkpoints: Path, snapshot: Snapshot, topology: Topology) -> Path:
    """Write `checkpoints/step_N`; returns it when it is complete and durable."""
    step, rank = snapshot.state.step, topology.rank
    final = store.step_folder(checkpoints, step)
    if rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        store.begin(checkpoints, step)
    _barrier(topology)
    folder = store.partial_folder(checkpoints, step)
    # Every replica iterates the weights (ZeRO-3 gathers them together), the first one writes.
    if topology.replica == 0:
        written = _write_model_part(folder, snapshot, topology)
    else:
        written = []
        for _ in snapshot.weights:
            pass
    optimizer = folder / "optimizer" / f"rank_{rank:05d}.safetensors"
    write_slices(optimizer, snapshot.slices)
    _record(folder, [*written, optimizer], rank, "rank")
    _barrier(topology)
    if rank == 0:
        _record(folder, _write_common(folder, snapshot), rank, "common")
        records = {}
        for part in sorted((folder / "parts").glob("*.json")):
            records |= json.loads(part.read_text(encoding="utf-8"))
        grid = {"tensor": topology.tensor, "pipeline": topology.pipeline, "data": topology.data}
        store.commit(checkpoints, step, records, grid)
    _barrier(topology)
    return final

"""Which checkpoint to start from, and what is in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megagpt2.checkpoint import store
from megagpt2.checkpoint.formats import huggingface
from megagpt2.checkpoint.formats.source import first_difference
from megagpt2.checkpoint.shards import SliceReader
from megagpt2.checkpoint.snapshot import TrainingState
from megagpt2.config.schema import ModelConfig
from megagpt2.model.parameters import Extent, Spec


def choose(
    resume: str, checkpoints: Path, verify: store.Verify = store.verify
) -> tuple[Path | None, list[str]]:
    """The checkpoint that `checkpoint.resume` means, verified, and notes on those passed over.

    auto: the newest that verifies, if any; must: the same, and none is an error; never: none, and none may
    be there; else a path, where a run without checkpoints begins.
    """
    if resume == "never":
        if present := store.all_steps(checkpoints):
            # Its later steps would outlive the new run's first ones, and the next resume would take them.
            raise store.CheckpointError(
                f"checkpoint.resume is 'never', but {checkpoints} holds {present[-1].name} of an earlier run: use"
                " another run.directory, or move that folder away"
            )
        return None, []
    if resume not in ("auto", "must"):
        return _choose_named(Path(resume), checkpoints, verify)
    folder, skipped = store.newest_verified(checkpoints, verify)
    if folder is None and (resume == "must" or skipped):
        # Starting anew beside damaged checkpoints would silently throw a run away.
        why = "; ".join(skipped) or f"{checkpoints} holds none"
        raise store.CheckpointError(
            f"checkpoint.resume is {resume!r}, but no checkpoint can be used: {why}."
            " To start anew use another run.directory; to start from elsewhere set checkpoint.resume to a folder"
        )
    return folder, skipped


def _choose_named(named: Path, checkpoints: Path, verify: store.Verify) -> tuple[Path, list[str]]:
    """Where a run begins that has no checkpoints yet; or one of its own, to go back to."""
    own = named.resolve().is_relative_to(checkpoints.resolve())
    if not own:
        newest, skipped = store.newest_verified(checkpoints, verify)
        if newest is not None:  # the same command, started again after a stop, goes on
            return newest, [*skipped, f"{named}: this run has checkpoints of its own by now"]
        if skipped:
            raise store.CheckpointError(
                f"checkpoint.resume names {named}, but this run has checkpoints of its own, and none can be used:"
                f" {'; '.join(skipped)}. To start from {named} anew use another run.directory"
            )
    if not named.is_dir():
        raise store.CheckpointError(f"checkpoint.resume names {named}, which is not a folder")
    verify(named)
    if own:
        step = store.read_manifest(named).step
        if later := [path for path in store.all_steps(checkpoints) if store.step_of(path) > step]:
            # They would outlive what is trained from here, and the next resume would take them.
            raise store.CheckpointError(
                f"checkpoint.resume goes back to {named}, but {checkpoints} holds {later[-1].name}, which the next"
                " resume would take: move the later ones away first, or begin another run.directory; to go on from the"
                " newest one use checkpoint.resume=auto"
            )
    return named, []


@dataclass(frozen=True)
class Loaded:
    """An open checkpoint: read it by parameter."""

    folder: Path
    state: TrainingState
    weights: huggingface.Weights
    slices: SliceReader
    tensors_read: set[str] = field(default_factory=set)  # parameters of which this rank took something

    def weight(self, extent: Extent, dtype: torch.dtype) -> Tensor:
        """As computed with, [elements]: the master, rounded. What was computed with in this type is stored so."""
        self.tensors_read.add(extent.spec.name)
        if self.weights.dtype != dtype and "master" in self.slices.kinds:
            return self.slices.piece("master", extent).to(dtype)
        return self.weights.piece(extent).to(dtype)

    def state_of(self, kind: str, extent: Extent) -> Tensor:
        """"master" or a moment, fp32 [elements]; an fp32 run's weights are its masters, and stored once."""
        if kind == "master" and "master" not in self.slices.kinds:
            return self.weights.piece(extent).float()
        return self.slices.piece(kind, extent)

    @property
    def bytes_read(self) -> int:
        return self.weights.bytes_read + self.slices.bytes_read

    @property
    def bytes_there(self) -> int:
        return sum(record["size"] for record in store.read_manifest(self.folder).files.values())


class Checkpoint(huggingface.HuggingFace):
    """One of ours as a source of conversions."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "model")
        loaded = open_checkpoint(folder, self.model)
        self._loaded, self.updates = loaded, loaded.state.updates
        self.kinds = tuple(sorted(loaded.slices.kinds))

    def state(self, kind: str, spec: Spec) -> Tensor:
        return self._loaded.slices.read(kind, spec)


@dataclass(frozen=True)
class WeightsOnly:
    """A Hugging Face folder that a run begins with: masters are made of its weights, moments are zeros."""

    weights: huggingface.HuggingFace

    def weight(self, extent: Extent, dtype: torch.dtype) -> Tensor:
        return self.weights.piece(extent).to(dtype)

    def state_of(self, kind: str, extent: Extent) -> Tensor:
        return self.weights.piece(extent).float() if kind == "master" else torch.zeros(extent.elements)


def open_weights(folder: Path, model: ModelConfig) -> WeightsOnly:
    """Weights to begin a run with; another model's are refused."""
    weights = huggingface.HuggingFace(folder)
    _check_same_model(folder, weights.model, model)
    return WeightsOnly(weights)


def _check_same_model(folder: Path, stored: ModelConfig, model: ModelConfig) -> None:
    if name := first_difference(stored, model):
        raise store.CheckpointError(
            f"{folder} holds a model with {name} {getattr(stored, name)}, the configuration asks for"
            f" {getattr(model, name)}: use its configuration, or another run.directory"
        )


def open_checkpoint(folder: Path, model: ModelConfig) -> Loaded:
    """Read state and headers, and refuse another model's."""
    _check_same_model(folder, huggingface.read_model_config(folder / "model"), model)
    try:
        state = TrainingState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise store.CheckpointError(f"{folder / 'state.json'} can't be used: {error}") from None
    return Loaded(
        folder, state, huggingface.Weights(folder / "model", model), SliceReader(folder / "optimizer")
    )

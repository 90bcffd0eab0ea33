"""Which checkpoint to start from, and what is in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megagpt2.checkpoint import store
from megagpt2.checkpoint.formats import huggingface
from megagpt2.checkpoint.save import TrainingState
from megagpt2.checkpoint.shards import SliceReader
from megagpt2.config.schema import ModelConfig
from megagpt2.model.parameters import Spec

_SHAPE_FIELDS = ("layers", "width", "heads", "vocabulary", "context", "inner", "norm")


def choose(resume: str, checkpoints: Path) -> tuple[Path | None, list[str]]:
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
        folder = Path(resume)
        if not folder.is_dir():
            raise store.CheckpointError(f"checkpoint.resume names {folder}, which is not a folder")
        store.verify(folder)
        if not folder.resolve().is_relative_to(checkpoints.resolve()):
            own, skipped = store.newest_verified(checkpoints)
            if own is not None:  # the same command, started again after a stop, goes on
                return own, [*skipped, f"{folder}: this run has checkpoints of its own by now"]
        elif later := [path for path in store.all_steps(checkpoints) if path.name > folder.name]:
            # They would outlive what is trained from here, and the next resume would take them.
            raise store.CheckpointError(
                f"checkpoint.resume goes back to {folder}, but {checkpoints} holds {later[-1].name}, which the next"
                " resume would take: move the later ones away first, or begin another run.directory"
            )
        return folder, []
    folder, skipped = store.newest_verified(checkpoints)
    if folder is None and (resume == "must" or skipped):
        # Starting anew beside damaged checkpoints would silently throw a run away.
        why = "; ".join(skipped) or f"{checkpoints} holds none"
        raise store.CheckpointError(
            f"checkpoint.resume is {resume!r}, but no checkpoint can be used: {why}."
            " To start anew use another run.directory; to start from elsewhere set checkpoint.resume to a folder"
        )
    return folder, skipped


@dataclass(frozen=True)
class Loaded:
    """An open checkpoint: read it by parameter."""

    folder: Path
    state: TrainingState
    weights: huggingface.Weights
    slices: SliceReader

    def master(self, spec: Spec) -> Tensor:
        """This rank's fp32 master; an fp32 run's weights are its masters, and stored once."""
        if "master" in self.slices.kinds:
            return self.slices.local_value("master", spec)
        return self.weights.local_value(spec)

    def moment(self, kind: str, spec: Spec) -> Tensor:
        return self.slices.local_value(kind, spec)


def open_checkpoint(folder: Path, model: ModelConfig) -> Loaded:
    """Read state and headers, and refuse another model's."""
    stored = huggingface.read_model_config(folder / "model")
    for name in _SHAPE_FIELDS:
        if getattr(stored, name) != getattr(model, name):
            raise store.CheckpointError(
                f"{folder} holds a model with {name} {getattr(stored, name)}, the configuration asks for"
                f" {getattr(model, name)}: use its configuration, or another run.directory"
            )
    try:
        state = TrainingState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise store.CheckpointError(f"{folder / 'state.json'} can't be used: {error}") from None
    return Loaded(
        folder, state, huggingface.Weights(folder / "model", model), SliceReader(folder / "optimizer")
    )

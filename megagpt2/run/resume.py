"""What all ranks must agree on before they train, and the state they start from and save."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megagpt2.checkpoint import store
from megagpt2.checkpoint.load import Loaded, WeightsOnly, choose, open_checkpoint, open_weights
from megagpt2.checkpoint.shards import Slices
from megagpt2.checkpoint.snapshot import Snapshot, TrainingState
from megagpt2.config import Config, ConfigError
from megagpt2.config.load import dump_config
from megagpt2.config.rules import Plan
from megagpt2.model.initialize import Initial
from megagpt2.parallel.memory import return_freed_memory
from megagpt2.parallel.messages import broadcast_text, gather_texts
from megagpt2.run.material import Material
from megagpt2.training.engine import Engine
from megagpt2.training.loop import Progress
from megagpt2.training.masters import MOMENTS, extents, fragments, set_values, weight_extents, weight_stretches


def agree_on_request(config: Config, plan: Plan, material: Material, device: torch.device) -> None:
    """Refuse to train ranks together whose requests differ (a stale file on one node, another processor)."""
    text = f"{dump_config(config)}{plan}{material.identity(config)}"
    every = gather_texts(hashlib.sha256(text.encode()).hexdigest(), device)
    other = [rank for rank, theirs in enumerate(every) if theirs != every[0]]
    if other:
        raise ConfigError(
            f"ranks {other} were asked for something else than rank 0: compare their configuration files, corpora and"
            " processors (training.precision auto depends on them)"
        )


def on_rank_0(action, device: torch.device, others: Callable[[], None] = lambda: None) -> str | None:
    """Run `action` on rank 0, and `others` beside it on the others; its text on every rank, and its ConfigError on
    every rank."""
    answer = None
    if dist.get_rank():
        others()
    else:
        try:
            text = action()
            answer = None if text is None else f"ok:{text}"
        except (ConfigError, store.CheckpointError, OSError, ValueError) as error:
            answer = f"error:{error}"
    answer = broadcast_text(answer, device)
    status, _, text = (answer or "").partition(":")
    if status == "error":
        raise ConfigError(text)
    return text or None


def agree_on_checkpoint(
    config: Config, material: Material, device: torch.device
) -> tuple[Loaded | None, list[str]]:
    """Rank 0 looks for one, all ranks verify it together, then every rank opens it; an error is the same ConfigError
    everywhere."""
    notes: list[str] = []

    def look() -> str | None:
        folder, passed_over = choose(
            config.checkpoint.resume, config.run.directory / "checkpoints", lambda found: _verify(found, device)
        )
        notes.extend(f"passed over {note}" for note in passed_over)
        if folder is not None:
            loaded = open_checkpoint(folder, config.model)  # refuses another model's
            notes.extend(changed_data(loaded, config, material))
        return None if folder is None else str(folder)

    folder = on_rank_0(lambda: _leading(look, device), device, lambda: _following(device))
    return (None if folder is None else open_checkpoint(Path(folder), config.model)), notes


def agree_on_weights(config: Config, device: torch.device) -> WeightsOnly | None:
    """What `checkpoint.weights` names, for a run that begins; an error is the same ConfigError everywhere."""
    folder = config.checkpoint.weights
    if folder is None:
        return None
    on_rank_0(lambda: open_weights(folder, config.model) and None, device)
    return open_weights(folder, config.model)


# Rank 0 names a folder, and all verify their share of it; no folder ends that.


def _verify(folder: Path, device: torch.device) -> None:
    broadcast_text(str(folder), device)
    _verify_share(folder, device)


def _leading(look: Callable[[], str | None], device: torch.device) -> str | None:
    try:
        return look()
    finally:
        broadcast_text(None, device)


def _following(device: torch.device) -> None:
    while (folder := broadcast_text(None, device)) is not None:
        with contextlib.suppress(store.CheckpointError):
            _verify_share(Path(folder), device)


def _verify_share(folder: Path, device: torch.device) -> None:
    """Raises CheckpointError on all ranks where one finds something."""
    problem = ""
    try:
        store.verify(folder, dist.get_rank(), dist.get_world_size())
    except store.CheckpointError as error:
        problem = str(error)
    except Exception as error:  # the other ranks wait for what this one says
        problem = f"{folder} can't be verified: {type(error).__name__} {error}"
    found = [text for text in gather_texts(problem, device) if text]
    if found:
        raise store.CheckpointError(found[0])


def changed_data(loaded: Loaded, config: Config, material: Material) -> list[str]:
    """Other data than the checkpoint's: refused in a run of its own, told where a run begins from another's."""
    now = material.identity(config)
    changed = [
        f"{name} was {loaded.state.data[name]}, is {now[name]}"
        for name in now if name in loaded.state.data and loaded.state.data[name] != now[name]
    ]
    if changed and loaded.folder.resolve().is_relative_to(config.run.directory.resolve()):
        raise ConfigError(
            f"{loaded.folder} was trained on other data ({'; '.join(changed)}), so that its samples_seen means other"
            " text: restore the old values, or begin another run.directory with checkpoint.resume set to this one"
        )
    return [f"other data than the checkpoint's: {'; '.join(changed)}"] if changed else []


def load_state(engine: Engine, loaded: Loaded | None, weights: WeightsOnly | None = None) -> Progress:
    """Fill weights, masters and moments: from the checkpoint, or from given weights, or from the seed. One path for all
    (DESIGN D5)."""
    moments = engine.config.optimizer.name == "adamw"
    source = loaded or weights or Initial(engine.config.training.seed)
    progress = Progress()
    if loaded is not None:
        state = loaded.state
        progress = Progress(
            state.step, state.samples_seen, state.updates, tuple(state.losses),
            tuple((first, last) for first, last in state.skipped_samples),
        )
        engine.load_scaler(state.loss_scaler)
    # Left to itself, ZeRO 1 and 2 link names to moments when only the first group has them: create them here.
    set_values(engine.deepspeed, engine.topology, source, progress.updates if moments else None)
    return_freed_memory()
    return progress


def snapshot(engine: Engine, progress: Progress, material: Material) -> Snapshot:
    """What this rank could save: `contribution` leaves out what others save."""
    ds, grid, precision = engine.deepspeed, engine.topology, engine.plan.precision
    kinds = () if precision == "fp32" else ("master",)  # fp32 weights are the masters
    if engine.config.optimizer.name == "adamw":
        kinds += MOMENTS
    state = TrainingState(
        progress.step, progress.samples_seen, progress.updates, list(progress.losses),
        [list(pair) for pair in progress.passed_over], engine.scaler_state(), material.identity(engine.config),
    )
    return Snapshot(
        weight_extents(ds, grid), weight_stretches(ds, grid),
        Slices(kinds, extents(ds, grid), ({k: part.tensors[k] for k in kinds} for part in fragments(ds, grid))), state,
        engine.config.model, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision],
        partitioned=engine.config.parallel.zero_stage == 3, tokenizer_files=material.tokenizer_texts,
        end_of_text=material.tokenizer.end_of_text if material.tokenizer else None,
    )

"""What all ranks must agree on before they train, and the state they start from and save."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from megagpt2.checkpoint import store
from megagpt2.checkpoint.load import Loaded, choose, open_checkpoint
from megagpt2.checkpoint.save import Snapshot, TrainingState
from megagpt2.checkpoint.shards import Slices
from megagpt2.config import Config, ConfigError
from megagpt2.config.load import dump_config
from megagpt2.config.rules import Plan
from megagpt2.model.initialize import initial_value
from megagpt2.model.parameters import specified
from megagpt2.parallel.messages import broadcast_text, gather_texts
from megagpt2.run.material import Material
from megagpt2.training.engine import Engine
from megagpt2.training.loop import Progress
from megagpt2.training.masters import MOMENTS, extents, fragments, local_weights, set_values
from megagpt2.training.offload import return_freed_memory


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


def on_rank_0(action, device: torch.device) -> str | None:
    """Run `action` on rank 0; its text on every rank, and its ConfigError on every rank."""
    answer = None
    if dist.get_rank() == 0:
        try:
            text = action()
            answer = None if text is None else f"ok:{text}"
        except (ConfigError, store.CheckpointError) as error:
            answer = f"error:{error}"
    answer = broadcast_text(answer, device)
    status, _, text = (answer or "").partition(":")
    if status == "error":
        raise ConfigError(text)
    return text or None


def agree_on_checkpoint(
    config: Config, material: Material, device: torch.device
) -> tuple[Loaded | None, list[str]]:
    """Rank 0 looks and opens, then every rank does; an error is the same ConfigError everywhere."""
    notes: list[str] = []

    def look() -> str | None:
        folder, passed_over = choose(config.checkpoint.resume, config.run.directory / "checkpoints")
        notes.extend(f"passed over {note}" for note in passed_over)
        if folder is not None:
            loaded = open_checkpoint(folder, config.model)  # refuses another model's
            notes.extend(changed_data(loaded, config, material))
        return None if folder is None else str(folder)

    folder = on_rank_0(look, device)
    return (None if folder is None else open_checkpoint(Path(folder), config.model)), notes


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


def load_state(engine: Engine, loaded: Loaded | None) -> Progress:
    """Fill weights, masters and moments: from the checkpoint, or from the seed. One path for both (DESIGN D5)."""
    seed, moments = engine.config.training.seed, engine.config.optimizer.name == "adamw"
    if loaded is None:
        # Left to itself, ZeRO 1 and 2 link names to moments when only the first group has them: create them here.
        updates = 0 if moments else None
        set_values(engine.deepspeed, engine.topology, lambda spec: initial_value(spec, seed), updates)
        return_freed_memory()
        return Progress()
    state = loaded.state
    if moments:
        set_values(engine.deepspeed, engine.topology, loaded.master, state.updates, loaded.moment)
    else:
        set_values(engine.deepspeed, engine.topology, loaded.master)
    return_freed_memory()
    engine.load_scaler(state.loss_scaler)
    return Progress(state.step, state.samples_seen, state.updates, tuple(state.losses))


def snapshot(engine: Engine, progress: Progress, material: Material) -> Snapshot:
    """What this rank saves."""
    precision = engine.plan.precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    kinds = () if precision == "fp32" else ("master",)  # fp32 weights are the masters
    if engine.config.optimizer.name == "adamw":
        kinds += MOMENTS
    slices = Slices(
        kinds,
        [(extent.spec, extent.start, extent.stop) for extent in extents(engine.deepspeed, engine.topology)],
        (fragment.tensors for fragment in fragments(engine.deepspeed, engine.topology)),
    )
    state = TrainingState(
        progress.step, progress.samples_seen, progress.updates, list(progress.losses), engine.scaler_state(),
        material.identity(engine.config),
    )
    return Snapshot(
        [parameter.spec for parameter in specified(engine.module)], local_weights(engine.deepspeed), slices, state,
        engine.config.model, dtype, material.tokenizer_texts,
        material.tokenizer.end_of_text if material.tokenizer else None,
    )

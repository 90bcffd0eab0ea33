"""Saves that go wrong on one rank, and checkpoints that are damaged, as jobs for the pool."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from megagpt2.checkpoint.disk import HashedFile
from megagpt2.checkpoint.saver import Retention, Saver
from megagpt2.config import ConfigError
from megagpt2.run.material import Material
from megagpt2.run.resume import agree_on_checkpoint, load_state, snapshot
from megagpt2.training.loop import Progress
from tests.support.train import small_config, start


def choose_together(directories: list[str], resume: str, model: dict) -> list[dict]:
    """What this rank starts from in each run.directory: the checkpoint's name, or the error; and rank 0's notes."""
    config = small_config(**{f"model.{name}": value for name, value in model.items()})
    material, found = SimpleNamespace(identity=lambda config: {}), []
    for directory in directories:
        asked = config.replace({"run.directory": directory, "checkpoint.resume": resume})
        try:
            loaded, notes = agree_on_checkpoint(asked, material, torch.device("cpu"))
            found.append({"folder": loaded and loaded.folder.name, "notes": notes})
        except ConfigError as error:
            found.append({"error": str(error)})
    return found


def save_with_fault(changes: dict, folder: str, faulty: int, file: str) -> dict:
    """Save steps 1, 2 and 3, with training between them; at step 2 the disk of rank `faulty` is full when it comes to a
    file whose name contains `file`. What every save ended with on this rank, and what is in the folder then."""
    engine, step, batches = start(small_config(**changes))
    load_state(engine, None)
    group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
    saver = Saver(Path(folder), engine.topology, group, True, Retention())
    step.before_update = saver.before_update
    material = Material(SimpleNamespace(tokens=batches.tokens, manifest=None), None, None)
    write, size = HashedFile.write, engine.config.batch.global_batch

    def full(self, data) -> None:
        if file in self.path.name and engine.topology.rank == faulty:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        write(self, data)

    found = []
    for number in (1, 2, 3):
        with patch.object(HashedFile, "write", full if number == 2 else write):
            saver.save(snapshot(engine, Progress(number, number * size, number), material))
            step(batches.global_batch(number * size, size), engine.plan.accumulation, 1e-3)
            outcome = saver.outcome(wait=True)
        if dist.get_world_size() > 1:
            dist.barrier()
        found.append((outcome.error, sorted(path.name for path in Path(folder).iterdir())))
        if dist.get_world_size() > 1:
            dist.barrier()
    engine.close()
    return {"found": found}

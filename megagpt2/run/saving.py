"""How a run saves: what the loop calls, around the saver that knows nothing of engines."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megagpt2.checkpoint.saver import Retention, Saver
from megagpt2.checkpoint.snapshot import Snapshot, contribution
from megagpt2.parallel.memory import free_memory, memory_of_this_process
from megagpt2.parallel.topology import Topology
from megagpt2.run.material import Material
from megagpt2.run.resume import snapshot
from megagpt2.training.engine import Engine, agree_any
from megagpt2.training.loop import Progress, Saved

_ROOM = 1.25  # how many copies must fit into the memory that is free


@dataclass
class RunSaving:
    """The loop's `Saving`."""

    saver: Saver
    engine: Engine
    material: Material
    automatic: bool  # whether each save asks if there is room for a copy: only steps show what they take
    peak: int = 0  # bytes of this process at most, before there was a copy
    copied: bool = False

    def save(self, progress: Progress) -> None:
        began = time.perf_counter()
        state = snapshot(self.engine, progress, self.material)
        if self.automatic:
            self.peak = self.peak if self.copied else memory_of_this_process("VmHWM")
            self.saver.asynchronous = not no_room(state, self.engine.topology, self.engine.device, self.peak)
            self.copied |= self.saver.asynchronous
        self.saver.save(state, began)

    def before_update(self) -> None:
        self.saver.before_update()

    def finish(self) -> None:
        """Where the run ends by an error: let a checkpoint that is being written become complete."""
        if self.saver.busy:
            print("megagpt2: waiting for the checkpoint that is being written", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # another is on its way
                self.saver.outcome(wait=True)

    def told(self, wait: bool = False) -> Saved | None:
        outcome = self.saver.outcome(wait)
        if outcome is None:
            return None
        if outcome.folder is None:
            text = f"could not save step {outcome.step}: {outcome.error}. The checkpoints before it are whole"
            return Saved(outcome.step, text, failed=True)
        text = f"saved {outcome.folder} in {outcome.seconds:.1f} s"
        if self.saver.asynchronous:
            text += f", of which training stood still for {outcome.held:.3f} s"
        elif self.automatic:
            text += ", all of which training waited, as there was no room for a copy"
        if outcome.removed:
            text += f"; removed {', '.join(outcome.removed)}"
        return Saved(outcome.step, text if outcome.note is None else f"{text}; {outcome.note}", failed=False)


def build_saving(engine: Engine, material: Material, checkpoints: Path) -> tuple[RunSaving, str]:
    """How this run saves, and that in words. All ranks call it together."""
    config, topology = engine.config, engine.topology
    group = dist.new_group(backend="gloo") if topology.world_size > 1 else None
    problem, automatic = None, False
    if config.checkpoint.asynchronous == "never":
        problem = "checkpoint.asynchronous is 'never'"
    elif config.offload.uses_nvme:
        problem = "state on NVMe can't be copied"
    elif config.checkpoint.asynchronous == "auto":
        automatic, problem = True, no_room(snapshot(engine, Progress(), material), topology, engine.device)
    how = f"while training waits, as {problem}" if problem else "while training goes on"
    retention = Retention(config.checkpoint.keep, config.checkpoint.keep_every)
    saver = Saver(checkpoints, topology, group, problem is None, retention, cuda=engine.device.type == "cuda")
    return RunSaving(saver, engine, material, automatic), how


def no_room(state: Snapshot, topology: Topology, device: torch.device, peak: int = 0) -> str | None:
    """Why some rank can't copy its contribution to `state`, or None: beside the copy a step must be able to make this
    process as large as `peak` again. All ranks call it together."""
    need = _ROOM * contribution(state, topology).bytes()
    given_back = max(0, peak - memory_of_this_process("VmRSS"))
    room = free_memory() / int(os.environ.get("LOCAL_SIZE", topology.world_size)) - given_back
    if agree_any(need > room, device):
        return f"there is no room for a copy ({need / 2**30:.1f} GiB on a rank)"
    return None

"""Saving behind the training loop: it is held for a snapshot, if that; writing goes on while it trains.

    save(N)         the state's tensors are noted                                            at once
                    a thread copies them                                                     beside step N + 1
    before_update   the loop waits until they are copied: the update would change them       usually not at all
                    the thread hashes, writes, syncs, renames, removes old checkpoints       beside later steps
    outcome()       what became of it: the loop asks after every step

Forward and backward passes change no weight and no optimizer state, so that there is as much time for the copy as they
take (Mohan et al. 2021, "CheckFreq", section 4.1). State that is no tensor in memory (ZeRO-Infinity's files) is written
at once, piece by piece. The thread talks to other ranks' threads in a process group of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megagpt2.checkpoint import store
from megagpt2.checkpoint.save import Ranks, SaveError, save_checkpoint, wait_for
from megagpt2.checkpoint.snapshot import Snapshot, contribution
from megagpt2.parallel.topology import Topology


@dataclass(frozen=True)
class Outcome:
    """What became of a save."""

    step: int
    folder: Path | None  # None: it failed
    error: str | None
    removed: tuple[str, ...]  # older checkpoints that retention removed
    note: str | None  # what went wrong after the checkpoint was safe
    held: float  # seconds that the training loop stood still for it
    seconds: float  # until it was complete


@dataclass(frozen=True)
class Retention:
    """Which older checkpoints stay: the newest so many (None: all), and those of every so manieth step."""

    keep: int | None = None
    keep_every: int | None = None


class Saver:
    """One rank's part in saving a run's checkpoints, one at a time."""

    def __init__(
        self, checkpoints: Path, topology: Topology, group: dist.ProcessGroup | None, asynchronous: bool,
        retention: Retention = Retention(), cuda: bool = False,
    ) -> None:
        """group: all ranks on the CPU, for this alone; None for one rank. cuda: the state is on a GPU."""
        self.checkpoints, self.topology, self.group = checkpoints, topology, group
        self.asynchronous, self.retention, self.cuda = asynchronous, retention, cuda
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._done: Outcome | BaseException | None = None
        self._held = 0.0

    def save(self, snapshot: Snapshot, began: float | None = None) -> None:
        """Begin to write a checkpoint. What became of the one before must be known: one at a time.

        began: since when (time.perf_counter) the loop has stood still for it.
        """
        assert self._done is None and self._thread is None, "what became of the last save was not asked for"
        began = time.perf_counter() if began is None else began
        mine = contribution(snapshot, self.topology)
        if not self.asynchronous:
            self._held = 0.0
            self._write(mine.state.step, lambda: mine, began)
            return
        mine = mine.noted()
        device = torch.cuda.current_device() if self.cuda else None
        ready = torch.cuda.Event() if device is not None else None
        if ready is not None:  # the last update's kernels may still run
            ready.record()
        self._copied.clear()
        self._thread = threading.Thread(
            target=self._write, args=(mine.state.step, lambda: self._copy(mine, device, ready), began),
            name="checkpoint", daemon=True,
        )
        self._held = time.perf_counter() - began
        self._thread.start()

    def before_update(self) -> None:
        """Wait until weights and optimizer state may change."""
        if not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self._held += time.perf_counter() - began

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def outcome(self, wait: bool = False) -> Outcome | None:
        """What became of the last save, once; None while it is written. wait: until it is."""
        began = time.perf_counter()
        if self._thread is not None and (wait or not self._thread.is_alive()):
            self._thread.join()
            self._thread = None
        if self._thread is not None or self._done is None:
            return None
        done, self._done = self._done, None
        if isinstance(done, BaseException):
            raise done
        return replace(done, held=done.held + time.perf_counter() - began)

    # In the thread.

    def _copy(self, snapshot: Snapshot, device: int | None, ready: torch.cuda.Event | None) -> Snapshot:
        """Raises OSError where there is no memory for it."""
        try:
            if device is None:
                return snapshot.copied()
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_event(ready)
                copy = snapshot.copied()
                torch.cuda.current_stream().synchronize()
                return copy
        except (MemoryError, RuntimeError) as error:  # the second is torch's for the first
            raise OSError(f"no memory for a copy of the state: {str(error).partition(chr(10))[0]}") from None
        finally:
            self._copied.set()

    def _write(self, step: int, take: Callable[[], Snapshot], began: float) -> None:
        try:
            self._done = self._outcome(step, take, began)
        except BaseException as error:  # noqa: BLE001 - it is raised where the loop asks
            self._done = error

    def _outcome(self, step: int, take: Callable[[], Snapshot], began: float) -> Outcome:
        ranks = Ranks(self.topology, self.group)
        folder, problem, note, removed = None, None, None, ()
        try:
            folder = save_checkpoint(self.checkpoints, ranks.together(take), ranks)
        except SaveError as error:
            problem = str(error)
        if folder is not None and self.retention.keep is not None:
            removed, note = self._retain(folder, ranks)
        seconds = time.perf_counter() - began
        held = self._held if self.asynchronous else seconds
        return Outcome(step, folder, problem, removed, note, held, seconds)

    def _retain(self, newest: Path, ranks: Ranks) -> tuple[tuple[str, ...], str | None]:
        """Remove old ones, once the new one has been read back: it is the newest that verifies."""
        removed = []
        try:
            ranks.together(lambda: self._read_back(newest))
            if self.topology.rank == 0:
                keep, keep_every = self.retention.keep, self.retention.keep_every
                for folder in store.superfluous(self.checkpoints, newest, keep, keep_every):
                    store.remove(folder)
                    removed.append(folder.name)
        except (SaveError, OSError, ValueError) as error:  # the new checkpoint is there: too many are no reason to stop
            return tuple(removed), f"could not remove old checkpoints: {error}"
        return tuple(removed), None

    def _read_back(self, folder: Path) -> None:
        wait_for(folder)
        try:
            store.verify(folder, self.topology.rank, self.topology.world_size)
        except store.CheckpointError as error:
            raise OSError(str(error)) from None

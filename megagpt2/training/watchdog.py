"""What asks a run to stop: signals, and the end of its launcher. It finishes its step, saves, and all ranks leave
together."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

import psutil

STOP_AND_RESUME = 75  # exit code: stopped on a signal after saving, start me again


def parents(count: int) -> list[int]:
    """Process ids of this process's parent, its parent's parent, ..."""
    found = []
    process = psutil.Process()
    for _ in range(count):
        process = process.parent() if process is not None else None
        found.append(process.pid if process is not None else 0)
    return found


class StopSignals:
    """Remembers that SIGTERM (a scheduler's), SIGUSR1 (a time limit's) or SIGINT (a person's) came.

    A second SIGINT interrupts at once. A SIGTERM to the `deepspeed` command reaches no rank: it ends, and its ranks get
    another parent, which counts as a signal too (`launcher_processes`: how many generations to watch). Signals reach
    ranks at different moments: whoever acts on `received` must first agree with the others (engine.agree_any).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, launcher_processes: int = 0) -> None:
        self._signal: str | None = None
        self._previous: dict[int, object] = {}
        self._parents = parents(launcher_processes)

    @property
    def received(self) -> str | None:
        """What asks to stop, or None."""
        if self._signal is None and self._parents and parents(len(self._parents)) != self._parents:
            self._signal = "the end of the launcher"
        return self._signal

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

"""Signals that ask a run to stop: it finishes its step, saves, and all ranks leave together."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

STOP_AND_RESUME = 75  # exit code: stopped on a signal after saving, start me again


class StopSignals:
    """Remembers that SIGTERM (a scheduler's), SIGUSR1 (a time limit's) or SIGINT (a person's) came.

    A second SIGINT interrupts at once. Signals reach ranks at different moments: whoever acts on `received`
    must first agree with the others (engine.agree_any).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

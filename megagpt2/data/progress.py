"""How far along: a bar on a terminal, one plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """Bytes done of a total, MB/s, tokens/s and the time left.

        with Progress("tokenizing", total_bytes) as progress:
            progress.update(bytes_done, tokens_done)

    On a terminal a rich bar; elsewhere a line every `interval` seconds. Writes to stderr, so that results
    on stdout can be piped.
    """

    def __init__(self, title: str, total: int, interval: float = 10.0, stream: TextIO | None = None) -> None:
        self._title, self._total, self._interval = title, max(total, 1), interval
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            self._bar = _make_bar(self._stream)
            self._task = self._bar.add_task(self._title, total=self._total, tokens="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, tokens: int = 0) -> None:
        """Show that `done` bytes in total, and `tokens`, are done."""
        done = min(done, self._total)
        seconds = max(time.monotonic() - self._start, 1e-3)
        speed = f"{tokens / seconds / 1000:,.0f}k tokens/s" if tokens else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, tokens=speed)
            return
        now = time.monotonic()
        if now - self._last_line >= self._interval:
            self._last_line = now
            left = (self._total - done) * seconds / done if done else 0
            parts = [
                f"{self._title}: {100 * done / self._total:.0f}%",
                f"{done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB",
                f"{done / seconds / 1e6:,.1f} MB/s",
                speed,
                f"{left:,.0f} s left" if done else "",
            ]
            print(", ".join(part for part in parts if part), file=self._stream, flush=True)


def _make_bar(stream: TextIO) -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TextColumn("{task.fields[tokens]}"),
        progress.TimeRemainingColumn(),
        console=Console(file=stream),
    )

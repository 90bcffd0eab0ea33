"""The run as its user sees it: a header, the progress, validations and samples, and a summary at the end.

Progress is a line every few steps:

    step 120/2000 | loss 4.1234 | 12,345 tokens/s | left 0:31:20 | validation 4.3010 | lr 3.00e-04 | ...

A terminal shows the first five fields, and below the lines a live one that follows every step. Elsewhere (a
Slurm log, a pipe) the lines are whole and plain.
"""

import math
import os
import statistics
import sys
import time
from collections import deque
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from megagpt2.training.monitor import Sink, StepRow, ValidationRow


class Console(Sink):
    """Shows the run on a terminal, or as plain lines.

    Args:
        total_steps: the step at which the run ends.
        every: steps between lines. The first step of this start and the last of the run, and steps that were
            skipped or whose loss isn't finite, always get one.
        stream: where to; stdout by default.
    """

    def __init__(self, total_steps: int, every: int = 10, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.every = every
        stream = stream or sys.stdout
        # said outright, or FORCE_COLOR in the environment of a batch job would fill its log with live lines
        terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._console = RichConsole(file=stream, force_terminal=terminal, highlight=False, emoji=False)
        self._progress: Progress | None = None
        self._started = time.monotonic()
        self._tally = Tally(total_steps)

    def start(
        self, header: dict[str, Any], config_yaml: str, start_step: int, start_tokens: int | None
    ) -> None:
        self._started = time.monotonic()
        self._tally = Tally(self.total_steps)
        self._show_pairs(header, title="megagpt2")
        if start_step > 0:
            self._line(f"resumed after step {start_step}")
        if self._console.is_terminal:
            self._progress = make_progress(self._console)
            self._progress.add_task("", total=self.total_steps, completed=start_step, numbers="")
            self._progress.start()

    def step(self, row: StepRow) -> None:
        first = self._tally.steps == 0
        self._tally.step(row)
        unusual = row.skipped or not math.isfinite(row.loss)
        if first or unusual or row.step % self.every == 0 or row.step == self.total_steps:
            # a terminal is narrow, a log is searched
            short = self._progress is not None and not unusual
            self._line(self._tally.short_line(row) if short else self._tally.line(row))
        if self._progress is not None:
            numbers = escape(self._tally.short_line(row))
            self._progress.update(self._progress.task_ids[0], completed=row.step, numbers=numbers)

    def validation(self, row: ValidationRow) -> None:
        self._tally.validation(row)
        bits = "" if row.bits_per_byte is None else f" | {row.bits_per_byte:.4f} bits per byte"
        self._line(f"step {row.step} | validation {row.loss:.4f} | perplexity {row.perplexity:,.2f}{bits}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        prompt, text = printable(prompt), printable(text)
        if self._progress is not None:
            content = f"[bold]{escape(prompt)}[/]{escape(text)}"
            self._console.print(Panel(content, title=f"sample at step {step}"))
            return
        self._line(f"step {step} | sample:")
        for line in (prompt + text).splitlines():
            self._line("    " + line)

    def event(self, step: int, message: str) -> None:
        self._line(f"step {step} | {message}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._tally.steps > 0:
            self._show_pairs(self._tally.summary(time.monotonic() - self._started), title="summary")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)  # a wrapped line is hard to search in

    def _show_pairs(self, pairs: dict[str, Any], title: str) -> None:
        if not self._console.is_terminal:
            width = max((len(name) for name in pairs), default=0)
            self._line(f"{title}:")
            for name, value in pairs.items():
                self._line(f"  {name:<{width}}  {value}")
            return
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in pairs.items():
            table.add_row(escape(name), escape(str(value)))
        self._console.print(table)


class Tally:
    """What the lines and the summary need of the steps since the start, in constant memory."""

    RECENT = 20
    """The time left is the median step of so many: neither the first, slow step nor one pause moves it."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.steps = 0
        self.skipped = 0
        self.last: StepRow | None = None
        self.last_validation: ValidationRow | None = None
        self.best_validation: ValidationRow | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=self.RECENT)  # seconds, tokens per second

    def step(self, row: StepRow) -> None:
        self.steps += 1
        self.skipped += row.skipped
        self.last = row
        self._recent.append((row.seconds_step, row.tokens_per_second))

    def validation(self, row: ValidationRow) -> None:
        self.last_validation = row
        best = self.best_validation
        if math.isfinite(row.loss) and (best is None or row.loss < best.loss):
            self.best_validation = row

    def left(self, row: StepRow) -> str:
        """The time that the remaining steps take, as h:mm:ss. Validations and saves aren't in it."""
        seconds = statistics.median(seconds for seconds, _ in self._recent)
        return duration(seconds * max(0, self.total_steps - row.step))

    def short_line(self, row: StepRow) -> str:
        """Step, loss, tokens per second, time left and last validation loss: what fits on a terminal."""
        parts = [
            f"step {row.step}/{self.total_steps}",
            f"loss {row.loss:.4f}",
            f"{row.tokens_per_second:,.0f} tokens/s",
            f"left {self.left(row)}",
        ]
        if self.last_validation is not None:
            parts.append(f"validation {self.last_validation.loss:.4f}")
        return " | ".join(parts)

    def line(self, row: StepRow) -> str:
        """The short line and the rest of what one looks for when something is wrong."""
        parts = [
            self.short_line(row),
            f"lr {row.learning_rate:.2e}",
            f"gradient norm {row.gradient_norm:.3f}",
            f"{row.model_tflops:.3g} TFLOP/s",
        ]
        if row.mfu is not None:
            parts.append(f"MFU {row.mfu:.1%}")
        if row.loss_scale is not None:
            parts.append(f"loss scale {row.loss_scale:g}")
        if row.skipped:
            parts.append("SKIPPED: a gradient wasn't finite")
        return " | ".join(parts)

    def summary(self, seconds: float) -> dict[str, str]:
        """What the run came to, for the table at its end. Needs at least one step."""
        row = self.last
        assert row is not None
        pairs = {
            "steps": f"{self.steps:,} in {duration(seconds)}, up to {row.step}/{self.total_steps}",
            "tokens": f"{row.tokens:,}",
            "loss": f"{row.loss:.4f}",
        }
        if self.last_validation is not None:
            last = self.last_validation
            pairs["validation"] = f"{last.loss:.4f}, perplexity {last.perplexity:,.2f} (step {last.step})"
        if self.best_validation is not None:
            best = self.best_validation
            pairs["best"] = f"{best.loss:.4f}, perplexity {best.perplexity:,.2f} (step {best.step})"
        speed = statistics.median(speed for _, speed in self._recent)
        pairs["speed"] = f"{speed:,.0f} tokens/s (median of the last {len(self._recent)} steps)"
        pairs["peak memory"] = f"{row.memory_bytes / 2**30:.2f} GiB"
        if self.skipped:
            pairs["skipped"] = f"{self.skipped:,} steps, because a gradient wasn't finite"
        return pairs


def make_progress(console: RichConsole) -> Progress:
    """The live line. The bar takes what the numbers leave."""
    return Progress(
        TextColumn("{task.fields[numbers]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:.0f}%"),
        console=console,
        refresh_per_second=4,
        expand=True,
    )


def printable(text: str) -> str:
    """`text` without what would move the cursor or change colours: an untrained model writes any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front where there are any; "unknown" where `seconds` isn't finite."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "unknown"

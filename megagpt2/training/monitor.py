"""The record of a run: what is worth knowing of each step, and the places it goes to.

    loop --StepRow, ValidationRow, samples, events--> Monitor --> JsonLines    RUN/log.jsonl
                                                              --> TensorBoard  RUN/tensorboard/
                                                              --> Console      (training/console.py)

Pure recording: nothing here knows an engine, a model or a rank. Rank 0 builds a Monitor with sinks, every
other rank a `Monitor([])`, so that the loop needs no conditions.

Two rules hold for every sink. A number that isn't finite is shown, never dropped: a NaN that vanishes from
the log hides the one step that matters. And after a resume at step k, what was recorded for later steps is
gone from every sink, because those steps are run again.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class StepRow:
    """One optimizer step. `step`, `samples` and `tokens` count from the start of the run, this step in it."""

    step: int
    samples: int
    tokens: int
    loss: float
    """Mean cross-entropy in nats per token, before the update."""
    gradient_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    loss_scale: float | None
    """None unless the run is fp16."""
    skipped: bool
    """True where the optimizer didn't step, because a gradient wasn't finite."""
    tokens_per_second: float
    model_tflops: float
    """Model TFLOP/s over all devices; recomputation isn't counted."""
    mfu: float | None
    """Model FLOPs utilization as a fraction; None where the device's peak is unknown."""
    seconds_data: float
    seconds_forward_backward: float
    seconds_optimizer: float
    seconds_step: float
    memory_bytes: int
    """Peak so far: allocated device memory on CUDA, resident memory of the process on CPU."""
    global_batch: int


@dataclass(frozen=True)
class ValidationRow:
    """One evaluation on the validation set, after `step` optimizer steps."""

    step: int
    samples: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    """None where the number of bytes behind the tokens isn't known."""


class Sink:
    """A place that a run is recorded in. A method may be left out, and may raise: `Monitor` contains it."""

    def start(
        self, header: dict[str, Any], config_yaml: str, start_step: int, start_tokens: int | None
    ) -> None:
        """Opens the sink; `start_step` steps and `start_tokens` tokens of the run are already done."""

    def step(self, row: StepRow) -> None:
        """Records one optimizer step."""

    def validation(self, row: ValidationRow) -> None:
        """Records one validation."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Records a text that the model wrote after `prompt`."""

    def event(self, step: int, message: str) -> None:
        """Records what happened besides training: a save, a resume, a signal, a skipped range of data."""

    def close(self) -> None:
        """Flushes and closes."""


class Monitor:
    """Hands every record to every sink. A sink that fails is reported once, on stderr, and training goes on.

    The sink is offered the following records all the same: a full disk may have room again an hour later.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)
        self._failed: set[int] = set()

    def start(
        self, header: dict[str, Any], config_yaml: str, start_step: int = 0, start_tokens: int | None = None
    ) -> None:
        """Begins the record, or goes on with it after `start_step` steps.

        Args:
            header: what identifies the run, in the order in which the console shows it: model, parameters,
                layout, batch, precision, devices, ...
            config_yaml: the resolved configuration.
            start_step: steps done before; what sinks hold of later ones is dropped.
            start_tokens: tokens seen in those steps; without it, records against tokens aren't cut back.
        """
        self._each("start", header, config_yaml, start_step, start_tokens)

    def step(self, row: StepRow) -> None:
        """Records one optimizer step."""
        self._each("step", row)

    def validation(self, row: ValidationRow) -> None:
        """Records one validation."""
        self._each("validation", row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Records a text that the model wrote after `prompt`."""
        self._each("sample", step, prompt, text)

    def event(self, step: int, message: str) -> None:
        """Records what happened besides training."""
        self._each("event", step, message)

    def close(self) -> None:
        """Closes the sinks. A second call does nothing."""
        self._each("close")
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, method: str, *arguments: Any) -> None:
        for number, sink in enumerate(self._sinks):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:  # whatever a sink raises, training is worth more than its record
                if number not in self._failed:
                    self._failed.add(number)
                    print(
                        f"megagpt2: recording to {type(sink).__name__} failed in {method}: "
                        f"{type(error).__name__}: {error}. Training goes on; further failures of this sink "
                        "aren't reported.",
                        file=sys.stderr,
                        flush=True,
                    )


def visible(value: Any) -> Any:
    """`value` as JSON can hold it: what isn't finite becomes the string "nan", "inf" or "-inf"."""
    if isinstance(value, dict):
        return {str(name): visible(inner) for name, inner in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    return str(value)


class JsonLines(Sink):
    """The lasting record: one JSON object per line, on disk as soon as it is recorded.

    Each line has `kind` ("step", "validation", "sample" or "event"), `step`, `time` (seconds since 1970) and
    the fields of its record; a start is an event with the header in it. A write that fails half-way (disk
    full) is cut off again, so that the file keeps to whole lines.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._size = 0  # bytes of whole lines

    def start(
        self, header: dict[str, Any], config_yaml: str, start_step: int, start_tokens: int | None
    ) -> None:
        self.resume_at(start_step)
        message = "started" if start_step == 0 else f"resumed after step {start_step}"
        self._write("event", start_step, {"message": message, "header": header})

    def resume_at(self, step: int) -> None:
        """Drops the rows of later steps, and torn lines; at step 0 every row. The file changes atomically."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(self.path, "rb") as old, open(temporary, "wb") as new:
            new.writelines(line for line in old if step > 0 and is_row_up_to(line, step))
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)

    def step(self, row: StepRow) -> None:
        self._write("step", row.step, asdict(row))

    def validation(self, row: ValidationRow) -> None:
        self._write("validation", row.step, asdict(row))

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._write("sample", step, {"prompt": prompt, "text": text})

    def event(self, step: int, message: str) -> None:
        self._write("event", step, {"message": message})

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        row = visible({"kind": kind, "step": step, "time": round(time.time(), 3), **fields})
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            self._size = os.fstat(self._descriptor).st_size
        written = os.pwrite(self._descriptor, line, self._size)
        if written < len(line):
            os.ftruncate(self._descriptor, self._size)
            raise OSError(f"only {written} of {len(line)} bytes fit into {self.path}")
        self._size += written


def is_row_up_to(line: bytes, step: int) -> bool:
    """Whether this line of a log is whole and belongs to `step` or an earlier one."""
    if not line.endswith(b"\n"):
        return False
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class TensorBoard(Sink):
    """Scalars and texts for TensorBoard, against steps.

    Validation loss against tokens, which is what runs of other batch sizes are compared by, lies in the
    subfolder `by_tokens`: TensorBoard shows it as a run of its own. In one and the same folder, a resume at
    step k would drop every point with more than k tokens, since TensorBoard's mark for a restart knows only
    one axis.
    """

    SCALARS = {
        "loss": "train/loss",
        "gradient_norm": "train/gradient_norm",
        "learning_rate": "train/learning_rate",
        "loss_scale": "train/loss_scale",
        "global_batch": "train/global_batch",
        "tokens_per_second": "speed/tokens_per_second",
        "model_tflops": "speed/model_tflops",
        "mfu": "speed/mfu",
        "seconds_data": "time/data",
        "seconds_forward_backward": "time/forward_backward",
        "seconds_optimizer": "time/optimizer",
        "seconds_step": "time/step",
        "memory_bytes": "memory/peak_bytes",
    }

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._writers: list[Any] = []

    def start(
        self, header: dict[str, Any], config_yaml: str, start_step: int, start_tokens: int | None
    ) -> None:
        # imported here: it takes a second, and ranks without this sink don't need it
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writers = [
            SummaryWriter(str(self.directory), purge_step=first_new(start_step), flush_secs=10),
            SummaryWriter(
                str(self.directory / "by_tokens"),
                purge_step=first_new(start_tokens) if start_step else 0,
                flush_secs=10,
            ),
        ]
        table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in header.items())]
        self._by_step.add_text("run", "\n".join(table), start_step)
        self._by_step.add_text("config", code_block(config_yaml), start_step)
        self._by_step.flush()

    def step(self, row: StepRow) -> None:
        for field, tag in self.SCALARS.items():
            value = getattr(row, field)
            if value is not None:
                self._by_step.add_scalar(tag, value, row.step)

    def validation(self, row: ValidationRow) -> None:
        self._by_step.add_scalar("validation/loss", row.loss, row.step)
        self._by_step.add_scalar("validation/perplexity", row.perplexity, row.step)
        if row.bits_per_byte is not None:
            self._by_step.add_scalar("validation/bits_per_byte", row.bits_per_byte, row.step)
        self._writers[1].add_scalar("validation/loss_by_tokens", row.loss, row.tokens)

    def sample(self, step: int, prompt: str, text: str) -> None:
        markdown = f"**prompt**\n\n{code_block(prompt)}\n\n**text**\n\n{code_block(text)}"
        self._by_step.add_text("sample", markdown, step)

    def event(self, step: int, message: str) -> None:
        self._by_step.add_text("event", message, step)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers = []

    @property
    def _by_step(self) -> Any:
        return self._writers[0]


def first_new(done: int | None) -> int | None:
    """The first position of an axis that `done` doesn't cover; 0 where nothing is done, None if unknown."""
    return done + 1 if done else done


def code_block(text: str) -> str:
    """`text` as a markdown code block. Indented rather than fenced, so that no text can end it."""
    return "\n".join("    " + line for line in text.splitlines())

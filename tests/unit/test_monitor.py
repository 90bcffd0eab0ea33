"""The record of a run: complete, the same in every sink, honest about NaNs, and cut back at a resume."""

import contextlib
import io
import json
import math
import os
import pty
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

from megagpt2.training.console import Console, Tally, duration
from megagpt2.training.monitor import (
    JsonLines,
    Monitor,
    Sink,
    StepRow,
    TensorBoard,
    ValidationRow,
    code_block,
)

HEADER = {"model": "GPT-2", "parameters": "124,439,808", "layout": "TP2 x PP2 x DP1", "batch": 8}
CONFIG = "model:\n  layers: 12\n"
TOKENS_PER_STEP = 8 * 1024
SCALAR_OF_FIELD = {
    "loss": "train/loss",
    "gradient_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "loss_scale": "train/loss_scale",
    "tokens_per_second": "speed/tokens_per_second",
    "model_tflops": "speed/model_tflops",
    "mfu": "speed/mfu",
    "seconds_data": "time/data",
    "seconds_forward_backward": "time/forward_backward",
    "seconds_optimizer": "time/optimizer",
    "seconds_step": "time/step",
    "memory_bytes": "memory/peak_bytes",
}


def step_row(step: int, **changes: Any) -> StepRow:
    noise = random.Random(step)
    row = StepRow(
        step=step,
        samples=8 * step,
        tokens=TOKENS_PER_STEP * step,
        loss=11.0 - 0.1 * step,
        gradient_norm=noise.uniform(0.5, 2.0),
        learning_rate=1e-4 * step,
        loss_scale=None,
        skipped=False,
        tokens_per_second=noise.uniform(10_000, 20_000),
        model_tflops=noise.uniform(0.1, 0.2),
        mfu=0.25,
        seconds_data=0.01,
        seconds_forward_backward=0.5,
        seconds_optimizer=0.1,
        seconds_step=0.61,
        memory_bytes=3 * 2**30,
        global_batch=8,
    )
    return replace(row, **changes)


def validation_row(step: int, loss: float = 5.5) -> ValidationRow:
    return ValidationRow(step, 8 * step, TOKENS_PER_STEP * step, loss, math.exp(loss), None)


def read_log(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def read_tensorboard(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={TENSORS: 0})
    events.Reload()
    return events


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(scalar.step, scalar.value) for scalar in events.Scalars(tag)]


def text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def record(directory: Path, first: int, last: int, validate_at: tuple[int, ...] = ()) -> None:
    """What one start of a run records, that is one life of its process."""
    with Monitor([JsonLines(directory / "log.jsonl"), TensorBoard(directory / "tensorboard")]) as monitor:
        monitor.start(HEADER, CONFIG, first - 1, TOKENS_PER_STEP * (first - 1))
        for step in range(first, last + 1):
            monitor.step(step_row(step))
            if step in validate_at:
                monitor.validation(validation_row(step))


def test_tensorboard_holds_the_numbers_of_the_log(tmp_path: Path) -> None:
    record(tmp_path, 1, 6, validate_at=(3, 6))
    log = read_log(tmp_path / "log.jsonl")
    steps = [row for row in log if row["kind"] == "step"]
    events = read_tensorboard(tmp_path / "tensorboard")

    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for field, tag in SCALAR_OF_FIELD.items():
        expected = [(row["step"], row[field]) for row in steps if row[field] is not None]
        if not expected:
            assert tag not in events.Tags()["scalars"], f"{field} is None in every row"
            continue
        # event files hold float32
        assert points(events, tag) == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]

    validations = [row for row in log if row["kind"] == "validation"]
    assert [(row["step"], row["bits_per_byte"]) for row in validations] == [(3, None), (6, None)]
    for field in ("loss", "perplexity"):
        expected = [(row["step"], pytest.approx(row[field], rel=1e-6)) for row in validations]
        assert points(events, f"validation/{field}") == expected
    by_tokens = read_tensorboard(tmp_path / "tensorboard" / "by_tokens")
    assert points(by_tokens, "validation/loss_by_tokens") == [(row["tokens"], 5.5) for row in validations]


def test_texts_reach_log_and_tensorboard_unchanged(tmp_path: Path) -> None:
    prompt, sample = "Once\n", "```upon``` a <b>time</b> \u00e9\n# no heading"
    with Monitor([JsonLines(tmp_path / "log.jsonl"), TensorBoard(tmp_path / "tensorboard")]) as monitor:
        monitor.start(HEADER, CONFIG)
        monitor.sample(4, prompt, sample)
        monitor.event(5, "saved")
    log = read_log(tmp_path / "log.jsonl")
    events = read_tensorboard(tmp_path / "tensorboard")

    assert [row["kind"] for row in log] == ["event", "sample", "event"]
    assert log[0]["header"] == HEADER
    assert (log[1]["step"], log[1]["prompt"], log[1]["text"]) == (4, prompt, sample)
    assert (log[2]["step"], log[2]["message"]) == (5, "saved")
    assert code_block(CONFIG) == "    model:\n      layers: 12"
    assert text(events, "config") == code_block(CONFIG)
    assert code_block(prompt) in text(events, "sample")
    assert code_block(sample) in text(events, "sample")
    assert text(events, "event") == "saved"


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_is_not_finite_stays_visible(tmp_path: Path, value: float, shown: str) -> None:
    stream = io.StringIO()
    sinks = [JsonLines(tmp_path / "log.jsonl"), TensorBoard(tmp_path / "tb"), Console(100, 10, stream)]
    with Monitor(sinks) as monitor:
        monitor.start(HEADER, CONFIG)
        monitor.step(step_row(1))
        monitor.step(step_row(2, loss=value, gradient_norm=value, loss_scale=1024.0, skipped=True))
        monitor.validation(validation_row(2, loss=math.nan))
    step = read_log(tmp_path / "log.jsonl")[2]

    assert (step["loss"], step["gradient_norm"], step["skipped"]) == (shown, shown, True)
    logged = points(read_tensorboard(tmp_path / "tb"), "train/loss")[1]
    assert logged[0] == 2 and str(logged[1]) == shown
    # step 2 isn't a multiple of 10, and is shown all the same
    assert re.search(rf"step 2/100 \| loss {shown} .*loss scale 1024 .*SKIPPED", stream.getvalue())
    assert "validation nan" in stream.getvalue()


@pytest.mark.parametrize("resume_at", [1, 4, 7])
def test_resume_leaves_each_step_once(tmp_path: Path, resume_at: int) -> None:
    """A run that died after step 7 and went on from an older checkpoint reads like one that never died."""
    record(tmp_path / "whole", 1, 10, validate_at=(2, 6, 9))
    record(tmp_path / "died", 1, 7, validate_at=(2, 6))
    record(tmp_path / "died", resume_at + 1, 10, validate_at=(2, 6, 9))

    def rows(run: str) -> list[dict[str, Any]]:
        log = [row for row in read_log(tmp_path / run / "log.jsonl") if row["kind"] != "event"]
        return [{name: value for name, value in row.items() if name != "time"} for row in log]

    assert rows("died") == rows("whole")
    for folder in ("tensorboard", "tensorboard/by_tokens"):
        died = read_tensorboard(tmp_path / "died" / folder)
        whole = read_tensorboard(tmp_path / "whole" / folder)
        assert died.Tags()["scalars"] == whole.Tags()["scalars"]
        for tag in whole.Tags()["scalars"]:
            assert points(died, tag) == points(whole, tag), tag


def test_resume_without_the_tokens_keeps_what_is_recorded_against_them(tmp_path: Path) -> None:
    record(tmp_path, 1, 4, validate_at=(2, 4))
    with Monitor([TensorBoard(tmp_path / "tensorboard")]) as monitor:
        monitor.start(HEADER, CONFIG, 4)
    by_tokens = read_tensorboard(tmp_path / "tensorboard" / "by_tokens")
    assert len(points(by_tokens, "validation/loss_by_tokens")) == 2


def test_a_restart_from_nothing_drops_everything(tmp_path: Path) -> None:
    record(tmp_path, 1, 5, validate_at=(2,))
    record(tmp_path, 1, 2)
    assert [row["kind"] for row in read_log(tmp_path / "log.jsonl")] == ["event", "step", "step"]
    events = read_tensorboard(tmp_path / "tensorboard")
    assert [step for step, _ in points(events, "train/loss")] == [1, 2]


def test_a_torn_line_is_gone_after_a_resume(tmp_path: Path) -> None:
    """Killed in the middle of a write: the half line must not join the first line of the next start."""
    record(tmp_path, 1, 3)
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    record(tmp_path, 4, 5)
    assert [row["step"] for row in read_log(path) if row["kind"] == "step"] == [1, 2, 4, 5]


def test_a_full_disk_tears_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short write, which is what a full disk gives, is cut off; with room again the log goes on."""
    real = os.pwrite
    room = [True]

    def limited(descriptor: int, data: bytes, offset: int) -> int:
        return real(descriptor, data if room[0] else data[:10], offset)

    monkeypatch.setattr(os, "pwrite", limited)
    with Monitor([JsonLines(tmp_path / "log.jsonl")]) as monitor:
        monitor.start(HEADER, CONFIG)
        for step, room[0] in [(1, True), (2, False), (3, False), (4, True)]:
            monitor.step(step_row(step))
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [0, 1, 4]


def test_a_failing_sink_is_reported_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Sink):
        def step(self, row: StepRow) -> None:
            raise OSError(28, "No space left on device")

    with Monitor([Full(), JsonLines(tmp_path / "log.jsonl")]) as monitor:
        monitor.start(HEADER, CONFIG)
        for step in (1, 2, 3):
            monitor.step(step_row(step))
    reports = capsys.readouterr().err.splitlines()
    assert len(reports) == 1 and "Full" in reports[0] and "No space left on device" in reports[0]
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3]


def test_interrupts_are_not_swallowed() -> None:
    class Interrupted(Sink):
        def step(self, row: StepRow) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Monitor([Interrupted()]).step(step_row(1))


def test_ranks_without_sinks_record_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor([]) as monitor:
        monitor.start(HEADER, CONFIG)
        monitor.step(step_row(1))
        monitor.validation(validation_row(1))
    assert capsys.readouterr() == ("", "")


def test_plain_console_shows_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Monitor([Console(total_steps=3610, every=10, stream=stream)]) as monitor:
        monitor.start({**HEADER, "precision": "[bf16] :smile:"}, CONFIG)
        for step in range(1, 26):
            monitor.step(step_row(step, tokens_per_second=12_345.6, seconds_step=1.0))
            if step == 5:
                monitor.validation(validation_row(5, loss=5.25))
        monitor.sample(25, "Once", " upon\x1b[2J a time")
        monitor.event(25, "saved runs/a/checkpoints/step_00000025")
    lines = stream.getvalue().splitlines()

    assert any(line.split() == ["precision", "[bf16]", ":smile:"] for line in lines)
    steps = [line for line in lines if re.match(r"step \d+/", line)]
    assert [line.split()[1] for line in steps] == ["1/3610", "10/3610", "20/3610"]
    # 3590 steps of one second are left
    expected = "step 20/3610 | loss 9.0000 | 12,346 tokens/s | left 0:59:50 | validation 5.2500 | lr "
    assert steps[2].startswith(expected)
    assert "validation" not in steps[0]
    assert any(line.startswith("step 5 | validation 5.2500 | perplexity 190.57") for line in lines)
    assert any(line == "    Once upon\N{REPLACEMENT CHARACTER}[2J a time" for line in lines)
    assert "step 25 | saved runs/a/checkpoints/step_00000025" in lines
    assert "\x1b" not in stream.getvalue()
    assert re.fullmatch(r"  steps +25 in 0:00:\d\d, up to 25/3610", lines[lines.index("summary:") + 1])


def terminal_output(leader: int) -> Iterator[bytes]:
    """What was written to a pseudo-terminal, until its other side is closed, which Linux tells as an error."""
    with open(leader, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while data := terminal.read(1 << 16):
            yield data


def test_terminal_shows_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    leader, follower = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=lambda: shown.extend(terminal_output(leader)))
    reader.start()  # beside the writer: a terminal takes some 4 KB, and the slower this runs the more often it redraws
    with (
        open(follower, "w", encoding="utf-8") as stream,
        Monitor([Console(total_steps=100, every=10, stream=stream)]) as monitor,
    ):
        monitor.start(HEADER, CONFIG)
        monitor.validation(validation_row(0, loss=5.25))
        monitor.step(step_row(40, tokens_per_second=12_345.6, seconds_step=1.0))
    reader.join()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(shown).decode())
    assert "step 40/100 | loss 7.0000 | 12,346 tokens/s | left 0:01:00 | validation 5.2500" in text


def test_time_left_ignores_single_slow_steps() -> None:
    tally = Tally(total_steps=110)
    for step in range(1, 11):
        tally.step(step_row(step, seconds_step=60.0 if step in (1, 5) else 1.0))
    assert tally.left(step_row(10)) == "0:01:40"
    assert duration(math.nan) == "unknown"
    assert duration(100_000) == "1 day, 3:46:40"


def test_best_validation_is_the_lowest_finite_one() -> None:
    tally = Tally(total_steps=10)
    tally.step(step_row(1))
    for step, loss in enumerate([math.nan, 5.0, 4.0, 4.5], start=1):
        tally.validation(validation_row(step, loss))
    summary = tally.summary(seconds=1.0)
    assert summary["best"].startswith("4.0000") and summary["validation"].startswith("4.5000")

"""tools/quickstart.py in miniature: two ranks, a model of 32, thirty files of the library; then once more."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

from megagpt2.checkpoint import store
from megagpt2.config import Config, load_config
from megagpt2.config.load import save_config
from megagpt2.data.indexed import IndexedCorpus
from megagpt2.data.tokenizer import Tokenizer
from tests.support.runs import ROOT, Ended, Process, end_all, log_rows, scalars, steps

SMALL = {
    "model.layers": 2, "model.width": 32, "model.heads": 2, "model.vocabulary": 512, "model.context": 32,
    "batch.global_batch": 8, "batch.micro_batch": 4, "parallel.tensor_parallel": 1,
    "optimizer.learning_rate": 1e-2, "schedule.warmup_steps": 3, "training.steps": 40,
    "validation.every": 20, "validation.batches": 4, "checkpoint.every": 20,
    "monitor.sample_every": 40, "monitor.sample_tokens": 8,
}


def quickstart(folder: Path, *arguments: str) -> Ended:
    """From another working directory, with its configuration named from there."""
    command = [sys.executable, ROOT / "tools/quickstart.py", "--config", "quick.yaml", "--ranks", "2", "--files", "30"]
    (end,) = end_all([Process([*command, *arguments], {}, cwd=folder)])
    return end


def modified(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Config, Ended]:
    folder = tmp_path_factory.mktemp("quickstart")
    places = {
        "data.train": folder / "corpus_train", "data.valid": folder / "corpus_valid",
        "data.tokenizer": folder / "tokenizer", "run.directory": folder / "run",
    }
    config = load_config(ROOT / "configs/quickstart.yaml").replace(SMALL | places)
    save_config(config, folder / "quick.yaml")
    end = quickstart(folder, "--gain", "-9")
    assert end.code == 0, end
    return config, end


def table(end: Ended) -> dict[str, list[float]]:
    """Rows of the result: name -> nats per token, perplexity, bits per byte."""
    rows = {}
    for name in ("before training", "unigram model", "after training"):
        line = next(line for line in end.output.splitlines() if name in line)
        rows[name] = [float(cell.replace(",", "")) for cell in re.findall(r"[\d,]+\.\d+", line)]
    return rows


def test_the_table_compares_with_the_log_and_a_unigram_model(done):
    config, end = done
    rows, validations = table(end), log_rows(config.run.directory, "validation")
    for name, row in (("before training", validations[0]), ("after training", validations[-1])):
        expected = [row["loss"], row["perplexity"], row["bits_per_byte"]]
        assert rows[name] == pytest.approx(expected, abs=0.06, rel=1e-3)
    # The unigram model's loss on the same 32 windows, counted anew.
    train, valid = (IndexedCorpus(prefix).tokens.tolist() for prefix in (config.data.train, config.data.valid))
    targets = valid[1 : 32 * 32 + 1]
    assert "held-out text, 32 windows of 32 tokens" in end.output
    nats = [-math.log((train.count(token) + 1) / (len(train) + 512)) for token in set(targets)]
    unigram = sum(n * targets.count(t) for n, t in zip(nats, set(targets), strict=True)) / len(targets)
    assert rows["unigram model"][0] == pytest.approx(unigram, abs=6e-4)
    gain = unigram - validations[-1]["loss"]
    assert f"beats the unigram model by {gain:.2f} nats per token after 40 steps, 10,240 tokens" in end.output
    assert rows["after training"][0] < rows["before training"][0] - 0.5


def test_everything_it_names_is_there(done):
    config, end = done
    named = dict(re.findall(r"^(run|checkpoint)  +(\S+)", end.output, re.MULTILINE))
    assert Path(named["run"]) == config.run.directory
    store.verify(Path(named["checkpoint"]))
    assert Path(named["checkpoint"]).name == "step_00000040"
    shown = re.search(r"--logdir (\S+)", end.output)[1]
    assert [step for step, _ in scalars(Path(shown))["train/loss"]] == list(range(1, 41))
    for program in re.findall(r"^(?:tensorboard|sample more)  +(\S+)", end.output, re.MULTILINE):
        assert (ROOT / program).exists()
    assert Tokenizer.load(config.data.tokenizer).vocabulary_size == 512


def test_its_parts_come_in_order(done):
    _, end = done
    # rfind: samples while training begin like the one at the end
    places = [end.output.rfind(part) for part in (
        "1. tokenizer and corpus", "512 ids from", "2. training on 2 processes", "step 40/40", "3. what it learned",
        "\n    def", "sample more",
    )]
    assert -1 not in places and places == sorted(places)


def test_a_second_time_it_reuses_everything(done):
    config, end = done
    folder = config.run.directory.parent
    kept = [folder / "tokenizer", config.run.directory / "checkpoints"]
    before = modified(*kept) | {path: path.stat().st_mtime_ns for path in folder.glob("corpus_*")}
    again = quickstart(folder, "--gain", "9")
    assert again.code == 1  # nobody beats it by that much, and it says so
    assert "nats per token are fewer than the 9.0 expected" in again.errors
    assert modified(*kept) | {path: path.stat().st_mtime_ns for path in folder.glob("corpus_*")} == before
    assert steps(config.run.directory) == list(range(1, 41))
    assert table(again) == table(end)

"""Whole runs, as a user starts them: a corpus, a configuration, processes with time limits, and what they left."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt2.config import Config
from megagpt2.config.load import save_config
from megagpt2.data.indexed import IndexedCorpus, IndexedWriter
from megagpt2.data.tokenizer import Tokenizer
from megagpt2.parallel.launch import free_port
from tests.support.fork import Forked

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
PRETRAIN = ROOT / "launch/pretrain.py"
LIMIT = 150.0  # seconds for anything here; on two idle cores a run takes 5 to 15
VOCABULARY = 300
_SENTENCE = "the cat dog sat ran on under mat hill house and then it was seen by old man who said that all is well"
# What a launcher around pytest may have left: none of it may reach the processes that the tests start.
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI_", "MPI_", "OMPI_", "TORCHELASTIC_", "CROSS_")
_OF_TESTS = "MEGAGPT2_OPERATORS"  # a user's run takes the operators that are faster


# -- what a run reads ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A tokenizer and two corpora that it made: `PREFIX_train` and `PREFIX_valid`."""

    tokenizer: Path
    train: Path
    valid: Path


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], vocabulary: int) -> Path:
    with IndexedWriter(prefix, vocabulary_size=vocabulary) as writer:
        writer.manifest = {"vocabulary_size": vocabulary}
        for tokens in documents:
            writer.append(tokens)
    return prefix


def write_text(folder: Path) -> Text:
    """Sentences of few words: 28,000 tokens to train on, 4,000 to validate on."""
    draw, words = random.Random(0), _SENTENCE.split()
    texts = [" ".join(draw.choices(words, k=draw.randint(30, 90))) + ".\n" for _ in range(300)]
    tokenizer = Tokenizer.train(texts, VOCABULARY)
    tokenizer.save(folder / "tokenizer")
    documents = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
    train = write_corpus(folder / "text_train", documents[:260], VOCABULARY)
    valid = write_corpus(folder / "text_valid", documents[260:], VOCABULARY)
    return Text(folder / "tokenizer", train, valid)


def tiny_config(text: Text, directory: Path, **changes) -> Config:
    """2 layers, 32 wide, 2 heads, dropout 0.1, fp32: a step takes some hundredths of a second."""
    config = Config.model_validate({
        "model": {
            "layers": 2, "width": 32, "heads": 2, "vocabulary": VOCABULARY, "context": 32,
            "embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1,
        },
        "data": {"train": text.train, "valid": text.valid, "tokenizer": text.tokenizer},
        "batch": {"global_batch": 4, "micro_batch": 2},
        "optimizer": {"learning_rate": 1e-2, "epsilon": 1e-5},
        "schedule": {"decay_steps": 40},  # not training.steps: runs of any length are then the same run
        "training": {"steps": 8, "precision": "fp32", "device": "cpu"},
        "run": {"directory": directory},
    })
    return config.replace(changes)


# -- processes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A process that ended: exit code (negative: by that signal), and what it printed."""

    code: int
    output: str
    errors: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- output\n{self.output[-3000:]}\n--- errors\n{self.errors[-5000:]}"


class Process:
    """One started process in a session of its own, killed with all its children if it outlives its limit."""

    def __init__(
        self, command: Sequence[str | Path], environment: Mapping[str, str], forked: bool = False, **options
    ) -> None:
        """forked: `python PROGRAM ...` on the CPU, which need not import torch itself (tests/support/fork.py)."""
        # Files, not pipes: nobody has to read while the process runs. _ended closes them.
        self._output, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        command = [str(part) for part in command]
        common = {"env": clean_environment() | dict(environment), "stdout": self._output, "stderr": self._errors}
        if forked:
            self._popen = Forked(command, **common, **options)
        else:
            options = {"stdin": subprocess.DEVNULL, **options}
            self._popen = subprocess.Popen(command, start_new_session=True, **common, **options)

    def running(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        self._popen.send_signal(signal.SIGKILL)  # nothing where it has ended; else it may not lead its session yet
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def end(self, deadline: float) -> Ended:
        """Wait until `deadline` (time.monotonic); whatever is left then is killed, and that fails the test."""
        try:
            self._popen.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            self._popen.wait()
            raise AssertionError(f"{self._popen.args} did not end in time\n{self._ended()}") from None
        finally:
            self.kill()  # children that it left behind
        return self._ended()

    def _ended(self) -> Ended:
        texts = []
        for file in (self._output, self._errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
            file.close()
        return Ended(self._popen.returncode, *texts)


def clean_environment() -> dict[str, str]:
    """This process's environment without a launcher's variables; one thread, and the package importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith((*_FOREIGN, _OF_TESTS))}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def end_all(processes: Sequence[Process], limit: float = LIMIT) -> list[Ended]:
    """Wait for all; one that fails takes the others, which may wait for it, along after some seconds."""
    deadline = time.monotonic() + limit
    while any(process.running() for process in processes) and time.monotonic() < deadline:
        if any(not p.running() and p._popen.returncode for p in processes):
            deadline = min(deadline, time.monotonic() + 60.0)
        time.sleep(0.02)
    try:
        return [process.end(deadline) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, **options) -> Ended:
    """Start, wait, and return whatever came out. Options are Process's."""
    return end_all([Process(command, environment or {}, **options)])[0]


def pretrain_command(config: Config) -> list[str | Path]:
    """`python launch/pretrain.py --config FILE`, the file beside the run's folder (which must not exist yet)."""
    file = config.run.directory.with_name(f"{config.run.directory.name}.yaml")
    save_config(config, file)
    return [sys.executable, PRETRAIN, "--config", file]


def start_pretrain(config: Config, ranks: int = 1) -> list[Process]:
    """The ranks of one run, each a process of its own as a launcher would start it."""
    return start_ranks([pretrain_command(config)] * ranks, forked=config.training.device == "cpu")


def start_ranks(commands: Sequence[Sequence[str | Path]], forked: bool = True) -> list[Process]:
    """One process for each command: alone, or the ranks of one world on this machine."""
    if len(commands) == 1:
        return [Process(commands[0], {}, forked)]
    size = str(len(commands))
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Process(command, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, forked)
        for rank, command in enumerate(commands)
    ]


def pretrain(*runs: tuple[Config, int]) -> list[list[Ended]]:
    """Several runs (configuration, ranks) at once; each must end with exit code 0."""
    started = [start_pretrain(config, ranks) for config, ranks in runs]
    ended = iter(end_all([process for ranks in started for process in ranks]))
    grouped = [[next(ended) for _ in ranks] for ranks in started]
    for (config, _), ranks in zip(runs, grouped, strict=True):
        for rank, end in enumerate(ranks):
            assert end.code == 0, f"{config.run.directory}, rank {rank}: {end}"
    return grouped


def wait_until(condition: Callable[[], bool], processes: Sequence[Process], limit: float = LIMIT) -> None:
    """Poll; fails when a process ends first, or the time is over."""
    deadline = time.monotonic() + limit
    while not condition():
        ended = [process for process in processes if not process.running()]
        if ended or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            state = [str(process.end(time.monotonic() + 5)) for process in processes]
            raise AssertionError("it did not come that far:\n" + "\n".join(state))
        time.sleep(0.005)


# -- what a run leaves -----------------------------------------------------------------------------


def log_rows(directory: Path, kind: str = "step") -> list[dict]:
    """Rows of log.jsonl; the last line may be in the making."""
    path = directory / "log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def steps(directory: Path) -> list[int]:
    return [row["step"] for row in log_rows(directory)]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in log_rows(directory)]


def events(directory: Path) -> list[str]:
    return [row["message"] for row in log_rows(directory, "event")]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars: tag -> (step, value)."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def checkpoint(directory: Path, step: int) -> Path:
    return directory / "checkpoints" / f"step_{step:08d}"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, keyed by its file and its name there."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}:{name}": t for f in files for name, t in load_file(f).items()}


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Weights, masters, moments and counters, bit by bit."""
    a, b = tensors(found), tensors(expected)
    assert a.keys() == b.keys() and any("exp_avg_sq/" in name for name in a)
    different = [name for name in a if not (a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]))]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:5]}"
    assert (found / "state.json").read_text() == (expected / "state.json").read_text()


def assert_same_record(found: Path, expected: Path) -> None:
    """What a run computed, bit by bit: losses, norms, rates and samples of each step, each step once."""
    fields = ("step", "samples", "loss", "gradient_norm", "learning_rate", "global_batch")
    a, b = ([tuple(row[field] for field in fields) for row in log_rows(folder)] for folder in (found, expected))
    assert a == b
    assert [row[0] for row in a] == list(range(1, len(a) + 1))


def window_losses(model, corpus: IndexedCorpus, length: int, count: int) -> list[float]:
    """Mean loss of each of the corpus's first `count` windows, by a model of transformers."""
    values = []
    with torch.no_grad():
        for start in range(0, count * length, length):
            window = torch.tensor(corpus.tokens[start : start + length + 1].astype("int64"))
            logits = model(window[None, :-1]).logits[0].double()
            values.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    assert all(map(math.isfinite, values))
    return values

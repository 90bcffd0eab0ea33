"""Runs that are interrupted: what goes on afterwards is the uninterrupted run, bit by bit (invariant I3).

How far a run is when a signal reaches it depends on the machine. So the interrupted run is given more steps than it
can make, and the uninterrupted one is started afterwards, as long as the resumed one.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from megagpt2.checkpoint import store
from megagpt2.config import Config
from megagpt2.config.batching import ramped_batch
from megagpt2.data.batches import Batches
from megagpt2.data.indexed import IndexedCorpus
from megagpt2.data.order import Order
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.initialize import initial_value
from megagpt2.model.layers import DenseBuilder
from megagpt2.training.schedule import learning_rate
from tests.support.runs import (
    assert_same_checkpoint,
    assert_same_record,
    checkpoint,
    end_all,
    events,
    log_rows,
    losses,
    pretrain,
    start_pretrain,
    steps,
    tiny_config,
    wait_until,
)

ENDLESS = {"training.steps": 100_000}
TP2_PP2 = {"parallel.tensor_parallel": 2, "parallel.pipeline_parallel": 2, "training.precision": "bf16"}


def interrupt(config: Config, ranks: int, after_step: int, signal_number: int) -> list[int]:
    """Start a run without end, signal all its ranks once the log has that step; their exit codes."""
    saved = config.run.directory / "checkpoints"
    before = set(store.all_steps(saved))
    processes = start_pretrain(config.replace(ENDLESS), ranks)
    wait_until(lambda: after_step in steps(config.run.directory), processes)
    if config.checkpoint.every:  # written behind training: it may be some steps late
        wait_until(lambda: set(store.all_steps(saved)) - before, processes)
    for process in processes:
        process.signal(signal_number)
    ended = end_all(processes)
    for end in ended:
        assert end.code in (-signal_number, 75), end
    return [end.code for end in ended]


def newest(config: Config) -> int:
    folder, skipped = store.newest_verified(config.run.directory / "checkpoints")
    assert not skipped
    return int(folder.name.removeprefix("step_"))


def copy_run(config: Config, directory: Path, **changes) -> Config:
    shutil.copytree(config.run.directory, directory)
    return config.replace({"run.directory": directory, **changes})


# -- killed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(text, tmp_path_factory) -> tuple[Config, int, Config]:
    """(a run killed with SIGKILL and resumed, the step it resumed from, the same run uninterrupted)."""
    folder = tmp_path_factory.mktemp("killed")
    config = tiny_config(text, folder / "killed", **{"checkpoint.every": 4})
    interrupt(config, 1, 5, signal.SIGKILL)
    resumed_from = newest(config)
    config = config.replace({"training.steps": steps(config.run.directory)[-1] + 3})
    straight = config.replace({"run.directory": folder / "straight"})
    pretrain((config, 1), (straight, 1))
    return config, resumed_from, straight


def test_a_killed_run_goes_on_bit_by_bit(killed):
    config, resumed_from, straight = killed
    assert resumed_from >= 4
    assert f"resumed after step {resumed_from}" in events(config.run.directory)
    assert_same_record(config.run.directory, straight.run.directory)
    last = config.training.steps
    assert last > resumed_from + 1
    assert_same_checkpoint(checkpoint(config.run.directory, last), checkpoint(straight.run.directory, last))


# -- stopped by a signal, on four ranks ------------------------------------------------------------


def test_ranks_that_are_told_to_stop_save_and_go_on(text, tmp_path):
    """TP2 x PP2 in bf16: SIGTERM, then SIGKILL, against the uninterrupted run."""
    config = tiny_config(text, tmp_path / "stopped", **TP2_PP2)
    assert interrupt(config, 4, 2, signal.SIGTERM) == [75] * 4
    stopped_at = steps(config.run.directory)[-1]
    assert newest(config) == stopped_at  # checkpoint.every is 0: it saved because of the signal
    assert {"stopping on SIGTERM", "stopping on another rank"} & set(events(config.run.directory))

    config = config.replace({"checkpoint.every": stopped_at + 2})
    interrupt(config, 4, stopped_at + 3, signal.SIGKILL)
    resumed_from = newest(config)
    assert resumed_from >= stopped_at + 2
    config = config.replace({"training.steps": steps(config.run.directory)[-1] + 2})
    pretrain((config, 4))
    assert f"resumed after step {resumed_from}" in events(config.run.directory)

    straight = config.replace({"run.directory": tmp_path / "straight", "checkpoint.every": 0})
    pretrain((straight, 4))
    assert_same_record(config.run.directory, straight.run.directory)
    last = config.training.steps
    assert_same_checkpoint(checkpoint(config.run.directory, last), checkpoint(straight.run.directory, last))


# -- which checkpoint ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def continued(finished, tmp_path_factory):
    """Two copies of a finished run, started again: one as it is, one with a damaged newest checkpoint."""
    folder = tmp_path_factory.mktemp("continued")
    whole = copy_run(finished[0], folder / "whole")
    changes = {"checkpoint.every": 1, "checkpoint.keep": 1, "training.steps": 12}
    damaged = copy_run(finished[0], folder / "damaged", **changes)
    file = next((checkpoint(damaged.run.directory, 20) / "optimizer").iterdir())
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # one bit of one number
    file.write_bytes(data)
    before = modified(whole.run.directory / "checkpoints")
    _, (end,) = pretrain((whole, 1), (damaged, 1))
    return whole, before, damaged, file, end


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(continued, finished):
    config, before, *_ = continued
    assert modified(config.run.directory / "checkpoints") == before
    assert log_rows(config.run.directory) == log_rows(finished[0].run.directory)


def test_a_damaged_checkpoint_is_passed_over(continued):
    """And what is saved below it is kept, though only one checkpoint is to be."""
    *_, config, file, end = continued
    damaged = checkpoint(config.run.directory, 20)
    assert f"passed over step_00000020: {file} has changed since it was written" in end.output
    loaded = f"loaded {checkpoint(config.run.directory, 10)}: step 10, 40 samples seen; rank 0 took 28 of 28 tensors, "
    assert loaded in end.output
    (first,) = (event for event in events(config.run.directory) if event.startswith("first loss after resuming"))
    assert ", the checkpoint's last 8 are " in first and "warning" not in first
    assert steps(config.run.directory) == list(range(1, 13))
    assert store.all_steps(config.run.directory / "checkpoints") == [checkpoint(config.run.directory, 12), damaged]


@pytest.fixture(scope="module")
def refused(finished, text, tmp_path_factory):
    """Requests that only a look at checkpoints can refuse, at once: name -> (how it ended, the run's folder)."""
    config, _ = finished
    folder = tmp_path_factory.mktemp("refused")
    other = checkpoint(config.run.directory, 20)
    requests = {
        "must": {"checkpoint.resume": "must"},
        "other": {"checkpoint.resume": str(other), "model.layers": 3, "parallel.tensor_parallel": 2},
        "damaged": {},
    }
    configs = {name: tiny_config(text, folder / name, **changes) for name, changes in requests.items()}
    (checkpoint(configs["damaged"].run.directory, 4)).mkdir(parents=True)
    started = {name: start_pretrain(config, config.parallel.tensor_parallel) for name, config in configs.items()}
    ended = iter(end_all([process for ranks in started.values() for process in ranks]))
    return {name: ([next(ended) for _ in started[name]], configs[name].run.directory) for name in requests}


def test_must_needs_a_checkpoint(refused):
    (end,), directory = refused["must"]
    assert end.code == 2, end
    assert "checkpoint.resume is 'must'" in end.errors and f"{directory / 'checkpoints'} holds none" in end.errors
    assert "set checkpoint.resume to" in end.errors.lower() and "Traceback" not in end.errors
    assert not directory.exists()


def test_another_models_checkpoint_is_refused_on_every_rank(refused):
    ends, directory = refused["other"]
    assert [end.code for end in ends] == [2, 2], "\n".join(map(str, ends))
    assert "holds a model with layers 2, the configuration asks for 3" in ends[0].errors
    assert "Traceback" not in ends[0].errors + ends[1].errors
    assert not ends[1].errors.strip()  # said once
    assert not directory.exists()


def test_nothing_is_begun_anew_beside_damaged_checkpoints(refused):
    (end,), directory = refused["damaged"]
    assert end.code == 2, end
    assert "step_00000004" in end.errors and "is not a complete checkpoint" in end.errors
    assert [path.name for path in directory.iterdir()] == ["checkpoints"]


# -- batch ramp-up ---------------------------------------------------------------------------------

RAMP = {
    "batch.global_batch": 8, "batch.micro_batch": 1, "batch.ramp_up": {"start": 2, "increment": 2, "samples": 20},
    "training.steps": 9,
}


def plain_torch(config: Config) -> list[float]:
    """The same run without DeepSpeed: each step's gradient is the mean over all samples of its batch."""
    model = GPT2(config.model, DenseBuilder(config.training.seed))
    for parameter in model.parameters():
        parameter.data.copy_(initial_value(parameter.spec, config.training.seed))
    groups = [
        {"params": [p for p in model.parameters() if p.spec.decay is decay], "weight_decay": rate}
        for decay, rate in ((True, config.optimizer.weight_decay), (False, 0.0))
    ]
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.optimizer.epsilon)
    tokens = IndexedCorpus(config.data.train).tokens
    batches = Batches(tokens, Order(len(tokens), 32, config.training.seed), 1, 0, 1, config.model.vocabulary)
    found, seen = [], 0
    for step in range(config.training.steps):
        size = ramped_batch(config.batch.ramp_up, config.batch.global_batch, seen)
        rate = learning_rate(config.schedule, config.optimizer.learning_rate, step, config.decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, targets, samples = (torch.cat(part) for part in zip(*batches.global_batch(seen, size), strict=True))
        loss = model(tokens, samples, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        found.append(loss.item())
        seen += size
    return found


@pytest.fixture(scope="module")
def ramped(text, tmp_path_factory) -> dict[str, Config]:
    folder = tmp_path_factory.mktemp("ramped")
    plain = tiny_config(text, folder / "plain", **RAMP)
    pipeline = plain.replace({"run.directory": folder / "pipeline", "parallel.pipeline_parallel": 2})
    pretrain((plain, 1), (pipeline, 2))
    return {"plain": plain, "pipeline": pipeline}


@pytest.mark.parametrize("engine", ["plain", "pipeline"])
def test_the_batch_ramps_up(ramped, engine):
    config = ramped[engine]
    sizes, seen = [], 0
    for _ in range(config.training.steps):
        sizes.append(ramped_batch(config.batch.ramp_up, config.batch.global_batch, seen))
        seen += sizes[-1]
    assert sizes[0] == 2 and sizes[-1] == 8 and len(set(sizes)) == 4  # the run sees the whole ramp
    rows = log_rows(config.run.directory)
    assert [row["global_batch"] for row in rows] == sizes
    assert [row["samples"] for row in rows] == [sum(sizes[: n + 1]) for n in range(len(sizes))]


@pytest.mark.parametrize("engine", ["plain", "pipeline"])
def test_a_ramped_step_is_the_mean_over_all_its_samples(ramped, engine):
    """Were a micro-batch left out, or weighted as before the rise, losses would leave plain torch's."""
    config = ramped[engine]
    assert losses(config.run.directory) == pytest.approx(plain_torch(config), rel=1e-5)


def test_a_pipelines_stages_are_told_at_the_start(ramped):
    """With their blocks and their share of the time; a run without a pipeline has none."""
    found = {}
    for engine, config in ramped.items():
        lines = (config.run.directory / "log.jsonl").read_text().splitlines()
        [header] = [row["header"] for row in map(json.loads, lines) if "header" in row]
        found[engine] = header.get("stages")
    # Forward FLOPs a token: a block 24 w^2 + 2 w s = 26,624, the head 2 w V = 19,200.
    assert found == {"plain": None, "pipeline": "wte .. h.0 (1 block, 36.7 %); h.1 .. head (1 block, 63.3 %)"}

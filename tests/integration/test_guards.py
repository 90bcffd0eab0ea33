"""What keeps a run from training on the wrong thing, beside another run, or on after its launcher's end."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch.pretrain import main
from megagpt2.data.batches import Batches
from megagpt2.data.indexed import IndexedWriter
from megagpt2.data.order import Order
from megagpt2.parallel.launch import free_port
from tests.support.runs import (
    PRETRAIN,
    PROGRAMS,
    ROOT,
    Process,
    checkpoint,
    end_all,
    events,
    pretrain,
    pretrain_command,
    run,
    start_pretrain,
    start_ranks,
    steps,
    tiny_config,
    wait_until,
)


def test_a_second_run_in_the_same_folder_is_refused(text, tmp_path):
    config = tiny_config(text, tmp_path / "run", **{"training.steps": 100_000})
    [first] = start_pretrain(config)
    try:
        wait_until(lambda: len(steps(config.run.directory)) > 1, [first])
        [second] = end_all(start_pretrain(config))
        assert second.code == 2 and "another process is training in" in second.errors, second
        assert first.running()
    finally:
        first.signal(signal.SIGTERM)
        assert end_all([first])[0].code == 75


def test_ranks_with_different_requests_do_not_train_together(text, tmp_path):
    command = pretrain_command(tiny_config(text, tmp_path / "run", **{"parallel.tensor_parallel": 2}))
    ended = end_all(start_ranks([command, [*command, "optimizer.beta2=0.9"]]))
    assert [end.code for end in ended] == [2, 2]
    assert "ranks [1] were asked for something else than rank 0" in ended[0].errors
    assert not (tmp_path / "run").exists()


def test_the_end_of_the_launcher_stops_its_ranks(text, tmp_path):
    """SIGTERM to the `deepspeed` command reaches no rank: they notice that it is gone, save and leave."""
    config = tiny_config(text, tmp_path / "run", **{"training.steps": 100_000})
    _, script, *rest = pretrain_command(config)
    start = [sys.executable, PROGRAMS / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    launcher = Process([*start, script, *rest], {})
    directory = config.run.directory
    wait_until(lambda: len(steps(directory)) > 1, [launcher])
    launcher._popen.send_signal(signal.SIGTERM)
    launcher._popen.wait(30)
    deadline = time.monotonic() + 60
    while not any("saved" in event for event in events(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        assert "stopping on the end of the launcher" in events(directory)
        assert checkpoint(directory, steps(directory)[-1]).is_dir()
    finally:
        launcher.kill()


def test_resuming_on_other_data_is_refused(finished, text, tmp_path, capsys):
    config, _ = finished
    arguments = ["--config", str(config.run.directory / "config.yaml"), "training.seed=5", "training.steps=30"]
    [ended] = end_all(start_ranks([[sys.executable, PRETRAIN, *arguments]]))
    assert ended.code == 2 and "seed was 1234, is 5" in ended.errors, ended
    # begun from it in another folder, it is allowed, and told
    other = tiny_config(text, tmp_path / "run", **{
        "training.seed": 5, "training.steps": 21, "checkpoint.resume": str(checkpoint(config.run.directory, 20)),
    })
    pretrain((other, 1))
    assert any("other data than the checkpoint's: seed was 1234, is 5" in event for event in events(tmp_path / "run"))
    state = json.loads((checkpoint(tmp_path / "run", 21) / "state.json").read_text())
    assert state["data"]["seed"] == 5 and state["samples_seen"] == 84


def foreign_corpus(prefix: Path, tokens: np.ndarray) -> Path:
    """As another program writes it: no manifest beside it."""
    with IndexedWriter(prefix, vocabulary_size=1000) as writer:
        writer.append(tokens)
    Path(f"{prefix}.json").unlink(missing_ok=True)
    return prefix


def test_a_foreign_corpus_with_other_ids_is_refused(text, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    prefix = foreign_corpus(tmp_path / "foreign", np.r_[np.zeros(5000, int), 310, np.zeros(500, int)])
    changes = {"data.train": prefix, "data.valid": None, "data.tokenizer": None, "validation.every": 0}
    command = pretrain_command(tiny_config(text, tmp_path / "run", **changes))
    assert main([str(part) for part in command[2:]]) == 2
    assert "data.train" in (said := capsys.readouterr().err) and "holds token 310, model.vocabulary is 300" in said


def test_a_wrong_id_in_a_batch_is_an_error_not_a_loss():
    """Embeddings have rows past the last word: without the check, id 300 of 300 words would train."""
    tokens = np.zeros(100, dtype=np.uint16)
    tokens[37] = 300
    batches = Batches(tokens, Order(100, 10, 0, shuffle=False), 1, 0, 1, vocabulary=300)
    with pytest.raises(ValueError, match="hold token 300, the vocabulary has 300"):
        list(batches.global_batch(0, 9))


def test_fresh_removes_nothing_that_it_did_not_make(text, tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    ended = run([sys.executable, ROOT / "tools/quickstart.py", "--fresh", f"run.directory={tmp_path}"])
    assert ended.code == 2 and "removes only what is in" in ended.errors
    assert thesis.exists()

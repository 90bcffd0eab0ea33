"""Requests that can't be fulfilled: exit code 2, the field, its value and the remedy; nothing is written or joined.

The programs' main functions are called here: a request dies before anything is started, so nothing needs a process.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from launch import generate, pretrain
from megagpt2.config.load import save_config
from megagpt2.data.tokenizer import Tokenizer
from tests.support.runs import checkpoint, tiny_config, write_corpus

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def refused(text, tmp_path, monkeypatch, capsys):
    """Ask launch/pretrain.py; returns what it said. Overrides are those of the command line."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["pretrain.py"])

    def joined(*_, **__):
        raise AssertionError("a process group was asked for")

    monkeypatch.setattr(dist, "init_process_group", joined)
    file = tmp_path / "config.yaml"
    save_config(tiny_config(text, tmp_path / "run"), file)

    def ask(*overrides: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = pretrain.main(["--config", str(file), *overrides])
        said = capsys.readouterr()
        assert (code, said.out) == (2, ""), said
        assert said.err.startswith("megagpt2: ")
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return ask


def test_an_unknown_key_names_the_nearest(refused):
    said = refused("batch.micro_bach=4", "optimiser.learning_rate=1e-3")
    assert "batch.micro_bach: unknown key; did you mean batch.micro_batch?" in said
    assert "optimiser: unknown key; did you mean optimizer" in said  # all at once


def test_a_run_needs_a_corpus(refused):
    said = refused("data.train=null")
    assert "data.train is not set" in said and "tools/prepare_corpus.py" in said


@pytest.mark.parametrize("field", ["data.train", "data.valid"])
def test_a_corpus_must_be_there(refused, tmp_path, field):
    said = refused(f"{field}={tmp_path / 'nowhere'}", "validation.every=5")
    assert f"{field}: {tmp_path / 'nowhere.bin'} does not exist" in said and "tools/prepare_corpus.py" in said


def test_a_half_corpus_is_refused(refused, text, tmp_path):
    shutil.copy(f"{text.train}.bin", tmp_path / "half.bin")
    assert f"data.train: {tmp_path / 'half.idx'} does not exist" in refused(f"data.train={tmp_path / 'half'}")


def test_a_corpus_of_more_words_than_the_model(refused, tmp_path):
    """Ids are read long after the start: without this check the run dies, or trains on nonsense, much later."""
    write_corpus(tmp_path / "large", [list(range(200))], 50257)
    said = refused(f"data.train={tmp_path / 'large'}")
    assert f"data.train: {tmp_path / 'large'} was tokenized with a vocabulary of 50257" in said
    assert "model.vocabulary is 300: set model.vocabulary to 50257" in said


def test_a_corpus_of_another_tokenizer(refused, text, tmp_path):
    other = Tokenizer.train(["some other text, some other words, some other tokens"] * 3, 262)
    other.save(tmp_path / "other")
    prefix = write_corpus(tmp_path / "corpus", [list(range(200))], 262)
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(manifest | {"tokenizer_sha256": other.sha256}))
    said = refused(f"data.train={prefix}")
    assert f"data.tokenizer: {text.tokenizer}" in said and f"made {prefix} (sha256 {other.sha256[:12]})" in said
    assert "name that one, or prepare the corpus again" in said


def test_a_validation_corpus_of_less_than_one_micro_batch(refused, tmp_path):
    write_corpus(tmp_path / "short", [list(range(3 * 32 + 1))], 300)
    said = refused(f"data.valid={tmp_path / 'short'}", "validation.every=5", "batch.micro_batch=4")
    assert f"data.valid: {tmp_path / 'short'} has 3 sequences of 32 tokens" in said
    assert "use a smaller batch.micro_batch, or validation.every=0" in said


def test_a_corpus_of_less_than_one_sequence(refused, tmp_path):
    write_corpus(tmp_path / "short", [list(range(32))], 300)
    said = refused(f"data.train={tmp_path / 'short'}")
    assert "data.train: a corpus of 32 tokens has no window of sequence_length 32 + 1" in said
    assert "use a sequence_length of at most 31" in said


def test_an_illegal_layout_dies_before_the_other_ranks_are_met(refused, monkeypatch):
    """This is rank 0 of three, and the other two don't exist: waiting for them would take 30 minutes."""
    for name, value in zip(LAUNCHED, ("0", "3", "0", "3", "3", "127.0.0.1", "29999"), strict=True):
        monkeypatch.setenv(name, value)
    said = refused("parallel.tensor_parallel=3", "batch.global_batch=6")
    assert "parallel.tensor_parallel: 3 was asked, but the model has 2 heads" in said
    assert "nearest legal value: 1" in said


@pytest.mark.parametrize("place", ["run", "run/below"])
def test_a_file_where_the_run_should_be(refused, tmp_path, place):
    (tmp_path / "run").write_text("mine")
    said = refused(f"run.directory={tmp_path / place}")
    assert f"run.directory: {tmp_path / place} can't be written, {tmp_path / 'run'} is a file" in said
    assert (tmp_path / "run").read_text() == "mine"


def test_a_missing_configuration_names_its_neighbour(refused, tmp_path, capsys):
    assert pretrain.main(["--config", str(tmp_path / "confg.yaml")]) == 2
    assert f"no such file; did you mean {tmp_path / 'config.yaml'}?" in capsys.readouterr().err


# -- launch/generate.py ----------------------------------------------------------------------------


def generation_refused(capsys, *arguments: str) -> str:
    """Exit code 2, nothing on standard output; what it said."""
    try:
        code = generate.main(list(arguments))
    except SystemExit as end:  # argparse
        code = end.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, ""), said
    return said.err


def test_generate_needs_a_model(tmp_path, capsys):
    assert "is not a folder" in generation_refused(capsys, "--checkpoint", str(tmp_path / "nothing"))
    said = generation_refused(capsys, "--checkpoint", str(tmp_path))
    assert f"{tmp_path / 'config.json'} does not exist" in said and "is not a Hugging Face model folder" in said
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "has no n_layer, n_embd" in generation_refused(capsys, "--checkpoint", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'} is not valid JSON" in generation_refused(capsys, "--checkpoint", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    assert "has no usable checkpoint" in generation_refused(capsys, "--checkpoint", str(tmp_path))


def test_generate_needs_a_tokenizer_and_an_undamaged_model(finished, tmp_path, capsys):
    source = checkpoint(finished[0].run.directory, 20)
    for path in (source / "model").iterdir():
        if "token" not in path.name and path.name not in ("vocab.json", "merges.txt"):
            shutil.copy(path, tmp_path)
    said = generation_refused(capsys, "--checkpoint", str(tmp_path))
    assert "found none of tokenizer.json" in said and f"copy the tokenizer's files into {tmp_path}" in said
    shutil.copytree(source, tmp_path / "step")
    (tmp_path / "step/model/merges.txt").write_text("#version: 0.2\n")
    said = generation_refused(capsys, "--checkpoint", str(tmp_path / "step"))
    assert f"{tmp_path / 'step/model/merges.txt'} has" in said and "the manifest says" in said


@pytest.mark.parametrize("arguments, said", [
    (["--top-p", "1.5"], "top_p 1.5 is outside (0, 1]"),
    (["--top-p", "0"], "top_p 0.0 is outside (0, 1]"),
    (["--top-k", "-1"], "top_k -1 is negative"),
    (["--temperature", "-1"], "temperature -1.0"),
    (["--temperature", "nan"], "temperature nan"),
    (["--tokens", "0"], "--tokens 0: use at least 1"),
    (["--samples", "0"], "--samples 0: use at least 1"),
])
def test_generate_names_an_illegal_number(tmp_path, capsys, arguments, said):
    assert said in generation_refused(capsys, "--checkpoint", str(tmp_path), *arguments)

"""launch/generate.py on a trained checkpoint: the seed decides, greedy is transformers' greedy, pipes work."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from launch import generate
from megagpt2.kernels.extension import Extension
from tests.support.runs import ROOT, Process, checkpoint, end_all

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(finished):
    return checkpoint(finished[0].run.directory, 20)


@pytest.fixture
def say(folder, capsys):
    """What it prints for these arguments."""

    def ask(*arguments: str, of=folder) -> str:
        capsys.readouterr()
        assert generate.main(["--checkpoint", str(of), "--tokens", "12", *arguments]) == 0
        return capsys.readouterr().out

    return ask


def test_the_seed_decides(say):
    first = say("--prompt", "the cat", "--seed", "7")
    assert first == say("--prompt", "the cat", "--seed", "7")
    assert first != say("--prompt", "the cat", "--seed", "8")
    assert first.startswith("the cat")


def test_a_run_its_newest_checkpoint_and_the_model_folder_are_the_same(finished, folder, say):
    texts = {say("--prompt", "the", of=place) for place in (finished[0].run.directory, folder, folder / "model")}
    assert len(texts) == 1


@pytest.mark.parametrize("prompt", ["the cat sat", "house and", ""])
def test_temperature_zero_is_transformers_greedy_search(folder, say, prompt):
    """Token by token, until the context is full."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    count = 32 - len(ids)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=count,
            pad_token_id=tokenizer.eos_token_id,
        )[0, len(ids) :].tolist()
    if tokenizer.eos_token_id in expected:
        expected = expected[: expected.index(tokenizer.eos_token_id)]
    ours, own = generate.load(folder / "model", torch.device("cpu"))
    assert say("--prompt", prompt, "--temperature", "0", "--tokens", str(count)) == prompt + own.decode(expected) + "\n"


def test_text_goes_on_past_the_context(say):
    """100 tokens from a model of 32: what falls out of its view changes nothing that was said before."""
    short, long = (say("--prompt", "the", "--temperature", "0", "--tokens", n) for n in ("29", "100"))
    assert long.startswith(short.removesuffix("\n"))


def test_samples_differ_and_are_numbered(say):
    text = say("--prompt", "the", "--samples", "3")
    parts = [part.split("\n", 1) for part in text.split("--- sample ")[1:]]
    assert [number for number, _ in parts] == ["1", "2", "3"]
    assert len({body for _, body in parts}) == 3
    assert all(body.startswith("the") for _, body in parts)


def test_top_k_of_one_is_greedy(say):
    greedy = say("--prompt", "the cat", "--temperature", "0")
    assert say("--prompt", "the cat", "--top-k", "1") == greedy
    assert say("--prompt", "the cat", "--top-p", "1e-6") == greedy


def test_a_prompt_from_a_pipe_is_the_prompt(say, monkeypatch):
    """`echo` ends its line: that end is not part of the prompt, the ones before it are."""
    expected = say("--prompt", "the\ncat")
    monkeypatch.setattr("sys.stdin", io.StringIO("the\ncat\n"))
    assert say("--prompt", "-") == expected


def test_a_tokenizer_of_fewer_words_than_the_model(folder, tmp_path, say, monkeypatch):
    """GPT-2's 50257 words in a model of 50304: what no text stands for is never drawn."""
    ours = generate.load

    def wider(*arguments):
        model, tokenizer = ours(*arguments)
        forward = model.forward
        model.forward = lambda *inputs: torch.nn.functional.pad(forward(*inputs), (0, 47), value=1e3)
        return model, tokenizer

    expected = say("--prompt", "the")
    monkeypatch.setattr(generate, "load", wider)
    assert say("--prompt", "the") == expected


def test_the_program_itself(folder, say, tmp_path):
    """The one test that starts it: with its arguments and its input redirected, as a user does."""
    command = [sys.executable, ROOT / "launch/generate.py", "--checkpoint", folder, "--prompt", "-", "--tokens", "12"]
    (tmp_path / "prompt").write_text("the cat\n")
    with (tmp_path / "prompt").open() as prompt:
        (end,) = end_all([Process(command, {}, stdin=prompt)])
    assert end.code == 0, end
    assert end.output == say("--prompt", "the cat")


def test_a_gpu_without_operators_is_named_before_anything_is_read(monkeypatch, capsys):
    """Unless plain torch is allowed: then it is told, and goes on to what is wrong next."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(generate, "EXTENSION", Extension(True))
    assert generate.main(["--checkpoint", "nowhere"]) == 2
    assert "can't be used on this GPU" in (errors := capsys.readouterr().err) and "--allow-reference" in errors
    assert generate.main(["--checkpoint", "nowhere", "--allow-reference"]) == 2
    assert "operators: reference (" in (errors := capsys.readouterr().err) and "nowhere is not a folder" in errors

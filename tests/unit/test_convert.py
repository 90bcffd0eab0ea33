"""Checkpoints of other programs become ours and ours theirs, bit by bit (tests/support/foreign.py lays theirs out)."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from megagpt2.checkpoint.convert import write_checkpoint
from megagpt2.checkpoint.formats.deepspeed import DeepSpeed
from megagpt2.checkpoint.formats.huggingface import HuggingFace
from megagpt2.checkpoint.formats.llmc import LlmC
from megagpt2.checkpoint.formats.megatron import Megatron
from megagpt2.checkpoint.formats.nanogpt import NanoGPT
from megagpt2.checkpoint.formats.openai import OpenAI
from megagpt2.checkpoint.formats.source import whole_specs
from megagpt2.checkpoint.load import Checkpoint
from megagpt2.checkpoint.store import CheckpointError
from megagpt2.model.parameters import Spec
from megagpt2.parallel.memory import memory_of_this_process
from tests.support import foreign
from tests.support.children import in_child
from tests.support.models import model_config
from tools import convert_checkpoint
from tools.convert_checkpoint import main

MODEL = model_config(layers=4, width=24, heads=4, vocabulary=301, context=16)


@pytest.fixture
def values() -> foreign.Parameters:
    return foreign.parameters(MODEL)


def assert_holds(source, values: foreign.Parameters) -> None:
    """Every parameter, bit by bit."""
    for spec in whole_specs(MODEL):
        assert torch.equal(source.read(spec), values[spec.name]), spec.name


def convert(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2), (4, 4, 1)])
@pytest.mark.parametrize("names", ["first", "encoder", "norm", "core-te", "core-local"])
def test_megatrons_checkpoints_are_read(version, tensor, pipeline, virtual, names, values, tmp_path):
    foreign.write_megatron(tmp_path, values, MODEL, tensor, pipeline, virtual, version, names)
    source = Megatron(tmp_path, vocabulary=MODEL.vocabulary)
    assert (source.model.layers, source.model.heads, source.model.context) == (4, 4, 16)
    assert_holds(source, values)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("layers", ["te", "local"])
def test_to_megatron_and_back(tensor, pipeline, layers, values, tmp_path, capsys):
    foreign.write_openai(tmp_path / "openai", values, MODEL)
    assert not convert("--from", "openai", "--to", "huggingface", tmp_path / "openai", tmp_path / "hf")
    assert not convert(
        "--from", "huggingface", "--to", "megatron", "--tensor-parallel", tensor, "--pipeline-parallel", pipeline,
        "--megatron-layers", layers, tmp_path / "hf", tmp_path / "megatron",
    )
    assert_holds(Megatron(tmp_path / "megatron"), values)
    assert not convert("--from", "megatron", "--to", "huggingface", tmp_path / "megatron", tmp_path / "back")
    assert_holds(HuggingFace(tmp_path / "back"), values)
    assert "transformers: largest difference" in capsys.readouterr().out
    rank = tmp_path / "megatron/iter_0000001" / ("mp_rank_00" + ("_000" if pipeline > 1 else "")) / "model_optim_rng.pt"
    assert not [path for path in tmp_path.rglob("*") if ".staged" in path.name or ".partial" in path.name]
    assert rank.is_file()


@pytest.mark.parametrize(("bias", "compiled"), [(True, False), (True, True), (False, False)])
def test_nanogpt_with_its_moments(bias, compiled, values, tmp_path):
    state = foreign.write_nanogpt(tmp_path / "ckpt.pt", values, MODEL, bias, compiled)
    if not bias:
        for name in values:
            if name.endswith(".bias"):
                values[name] = torch.zeros_like(values[name])
    source = NanoGPT(tmp_path / "ckpt.pt", "tanh", zero_biases=not bias)
    assert_holds(source, values)
    assert source.updates == 2
    for spec in whole_specs(MODEL):
        expected = state[spec.name]["exp_avg"] if spec.name in state else torch.zeros(spec.shape)
        assert torch.equal(source.state("exp_avg", spec), expected), spec.name
    flags = [] if bias else ["--no-biases"]
    zeros = [] if bias else ["--zero-biases"]
    assert not convert(
        "--from", "nanogpt", "--activation", "tanh", *zeros, "--to", "nanogpt", *flags, tmp_path / "ckpt.pt",
        tmp_path / "again.pt",
    )
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("ckpt.pt", "again.pt"))
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in one["model"].items()}
    assert plain.keys() == other["model"].keys()
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in plain.items())
    assert one["model_args"] == other["model_args"]
    for number, state in one["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other["optimizer"]["state"][number][k]))
                   for k, v in state.items())
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]


def test_nanogpt_goes_on_as_ours(values, tmp_path):
    """Its weights and moments become a checkpoint to train on from."""
    foreign.write_nanogpt(tmp_path / "ckpt.pt", values, MODEL)
    words = tmp_path / "tokenizer"
    words.mkdir()
    (words / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (words / "merges.txt").write_text("#version: 0.2\n")
    request = ["--from", "nanogpt", "--activation", "tanh", "--to", "megagpt2", "--tokenizer", words]
    assert not convert(*request, tmp_path / "ckpt.pt", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints/step_00000002"
    assert (folder / "model/vocab.json").is_file()
    assert json.loads((folder / "model/config.json").read_text())["eos_token_id"] == 1
    assert json.loads((folder / "state.json").read_text())["updates"] == 2
    assert_holds(HuggingFace(folder / "model"), values)
    back = ["--from", "megagpt2", "--to", "nanogpt"]
    assert not convert(*back, folder, tmp_path / "back.pt")
    one, other = (NanoGPT(tmp_path / name, "tanh") for name in ("ckpt.pt", "back.pt"))
    for spec in whole_specs(MODEL):
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(one.state(kind, spec), other.state(kind, spec)), spec.name
    assert other.updates == 2


class Training:
    """A source as a bf16 run is one: weights are rounded masters."""

    model, dtype, notes, kinds, updates = MODEL, torch.bfloat16, (), ("master", "exp_avg", "exp_avg_sq"), 2

    def __init__(self, masters: foreign.Parameters) -> None:
        self.masters = masters

    def read(self, spec: Spec) -> torch.Tensor:
        return self.masters[spec.name].bfloat16()

    def state(self, kind: str, spec: Spec) -> torch.Tensor:
        return self.masters[spec.name] * {"master": 1, "exp_avg": 2, "exp_avg_sq": 3}[kind]


@pytest.mark.parametrize(
    ("target", "flags", "open_it", "rounded"),
    [
        ("nanogpt", (), lambda path: NanoGPT(path, "tanh"), False), ("huggingface", (), HuggingFace, True),
        ("huggingface", ("--dtype", "fp32"), HuggingFace, False), ("llmc", ("--dtype", "fp32"), LlmC, False),
        ("nanogpt", ("--dtype", "bf16"), lambda path: NanoGPT(path, "tanh"), True),
    ],
)
def test_masters_are_taken_where_fp32_is_written(target, flags, open_it, rounded, values, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoints", Training(values), {}, None)
    assert not convert("--from", "megagpt2", "--to", target, *flags, folder, tmp_path / "out")
    found = open_it(tmp_path / "out")
    for spec in whole_specs(MODEL):
        expected = values[spec.name].bfloat16() if rounded else values[spec.name]
        assert torch.equal(found.read(spec).float(), expected.float()), spec.name


@pytest.mark.parametrize("kind", ["huggingface", "nanogpt", "llmc"])
def test_rows_that_are_no_words_are_left_out_where_it_is_said(kind, values, tmp_path, capsys):
    """I9. Each of these may have been saved with its padding, and says not that it has."""
    padded = values | {"wte.weight": torch.cat([values["wte.weight"], torch.full((83, MODEL.width), 0.01)])}
    model = MODEL.model_copy(update={"vocabulary": MODEL.vocabulary + 83})
    foreign.write_nanogpt(tmp_path / "nanogpt", padded, model)  # trained some steps
    trained = {spec.name: NanoGPT(tmp_path / "nanogpt", "tanh").read(spec) for spec in whole_specs(model)}
    trained["wte.weight"] = trained["wte.weight"][: MODEL.vocabulary]
    known, source = [], tmp_path / kind
    if kind == "nanogpt":
        known = ["--activation", "tanh"]
    else:
        assert not convert("--from", "nanogpt", "--activation", "tanh", "--to", kind, tmp_path / "nanogpt", source)
    request = ["--from", kind, *known, "--vocabulary"]
    assert not convert(*request, MODEL.vocabulary, "--to", "huggingface", source, tmp_path / "out")
    assert_holds(HuggingFace(tmp_path / "out"), trained)
    assert HuggingFace(tmp_path / "out").model.vocabulary == MODEL.vocabulary
    assert convert(*request, 500, "--to", "huggingface", source, tmp_path / "more") == 2
    assert "--vocabulary 500: the embedding has 384 rows" in capsys.readouterr().err
    if kind == "nanogpt":  # with its moments
        assert not convert(*request, MODEL.vocabulary, "--to", "megagpt2", source, tmp_path / "ours")
        moments = Checkpoint(tmp_path / "ours/step_00000002").state("exp_avg", whole_specs(MODEL)[0])
        assert torch.equal(moments, NanoGPT(source, "tanh").state("exp_avg", whole_specs(model)[0])[: MODEL.vocabulary])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads", "4"], "--heads says nothing with --from huggingface: it is for megatron, deepspeed"),
        (["--qkv", "thirds"], "--qkv says nothing with --from huggingface"),
        (["--tensor-parallel", "2"], "--tensor-parallel says nothing with --to llmc: it is for megatron"),
        (["--no-biases"], "--no-biases says nothing with --to llmc"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(flags, message, tmp_path, capsys):
    assert convert("--from", "huggingface", "--to", "llmc", *flags, tmp_path / "a", tmp_path / "b") == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_several_types_is_read_in_the_widest(values, tmp_path):
    """Some keep norms in fp32 beside bf16: nothing is rounded."""
    foreign.write_openai(tmp_path / "openai", values, MODEL)
    assert not convert("--from", "openai", "--to", "huggingface", tmp_path / "openai", tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    mixed = {n: t if "ln_" in n else t.bfloat16() for n, t in load_file(path).items()}
    save_file(mixed, path, {"format": "pt"})
    assert not convert("--from", "huggingface", "--to", "nanogpt", tmp_path / "hf", tmp_path / "out")
    rounded = {name: value if "ln_" in name else value.bfloat16().float() for name, value in values.items()}
    assert_holds(NanoGPT(tmp_path / "out", "tanh"), rounded)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_llmc_both_ways(dtype, values, tmp_path):
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    foreign.write_llmc(tmp_path / "model.bin", values, MODEL, kind)
    rounded = {name: tensor.to(kind) for name, tensor in values.items()}
    assert_holds(LlmC(tmp_path / "model.bin"), rounded)
    assert not convert("--from", "llmc", "--to", "huggingface", tmp_path / "model.bin", tmp_path / "hf")
    assert_holds(HuggingFace(tmp_path / "hf"), rounded)
    assert not convert("--from", "huggingface", "--to", "llmc", tmp_path / "hf", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("mlp", [("dense_h_to_4h", "dense_4h_to_h"), ("linear1", "linear2")])
def test_gpt_neoxs_layer_files_are_read(tensor, mlp, values, tmp_path):
    """They hold no arguments: heads and vocabulary have to be said."""
    foreign.write_neox(tmp_path, values, MODEL, tensor, mlp)
    known = {"vocabulary": MODEL.vocabulary, "heads": MODEL.heads}
    source = DeepSpeed(tmp_path, activation="tanh", **known)
    assert_holds(source, values)
    assert source.kinds == ()
    with pytest.raises(CheckpointError, match="which GELU .* give --activation"):
        DeepSpeed(tmp_path, **known)
    with pytest.raises(CheckpointError, match="rows, padding included, .* give --vocabulary"):
        DeepSpeed(tmp_path, activation="tanh", heads=MODEL.heads)


@pytest.mark.parametrize("tensor", [1, 2])
def test_query_key_value_in_thirds_is_read_where_it_is_said(tensor, values, tmp_path):
    foreign.write_neox(tmp_path, values, MODEL, tensor, ("dense_h_to_4h", "dense_4h_to_h"), version=0.0)
    known = {"activation": "tanh", "vocabulary": MODEL.vocabulary, "heads": MODEL.heads}
    assert_holds(DeepSpeed(tmp_path, qkv="thirds", **known), values)
    with pytest.raises(AssertionError, match="c_attn"):
        assert_holds(DeepSpeed(tmp_path, qkv="heads", **known), values)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("position_embedding_type", "rope"), ("normalization", "RMSNorm"), ("swiglu", True), ("add_bias_linear", False),
        ("untie_embeddings_and_output_weights", True), ("num_experts", 8), ("bias_gelu_fusion", False),
        ("apply_layernorm_1p", True),
    ],
)
def test_another_architecture_is_refused_by_its_argument(argument, value, values, tmp_path, capsys):
    foreign.write_megatron(tmp_path / "m", values, MODEL, **{argument: value})
    assert convert("--from", "megatron", "--to", "huggingface", tmp_path / "m", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert (argument in told or "GELU" in told) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_experts", [1]), ("normalization", "layernorm"), ("position_embedding_type", "absolute")],
)
def test_what_other_ages_call_gpt2s_is_read(argument, value, values, tmp_path):
    """Megatron-DeepSpeed's defaults."""
    foreign.write_megatron(tmp_path, values, MODEL, **{argument: value})
    assert_holds(Megatron(tmp_path, vocabulary=MODEL.vocabulary), values)


@pytest.mark.parametrize("target", ["llmc", "megatron", "huggingface", "nanogpt"])
def test_weights_are_rounded_where_it_is_asked_for(target, values, tmp_path):
    """And transformers' logits are compared with those of the weights that it reads."""
    foreign.write_openai(tmp_path / "openai", values, MODEL)
    assert not convert("--from", "openai", "--to", "huggingface", tmp_path / "openai", tmp_path / "hf")
    request = ["--from", "huggingface", "--to", target, "--dtype", "bf16"]
    assert not convert(*request, tmp_path / "hf", tmp_path / "out")


def test_a_tensor_that_gpt2_has_not_is_refused(values, tmp_path):
    foreign.write_megatron(tmp_path, values, MODEL)
    (path,) = tmp_path.glob("*/*/model_optim_rng.pt")
    content = torch.load(path, weights_only=False)
    content["model"]["language_model"]["encoder"]["layers.1.self_attention.q_norm.weight"] = torch.ones(6)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"q_norm.weight. It is another architecture"):
        Megatron(tmp_path)


def test_a_distributed_folder_is_refused_with_the_command(tmp_path, capsys):
    folder = tmp_path / "iter_0000005"
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert convert("--from", "megatron", "--to", "huggingface", tmp_path, tmp_path / "out") == 2
    assert "--ckpt-convert-format torch --ckpt-convert-save DIR" in capsys.readouterr().err


def test_models_that_differ_are_not_left(values, tmp_path, monkeypatch, capsys):
    """A writer that swaps two tensors is caught by the logits, and nothing stands at DESTINATION."""
    foreign.write_llmc(tmp_path / "a.bin", values, MODEL, torch.float32)
    read = LlmC.read
    swapped = {"h.0.attn.c_proj.weight": "h.1.attn.c_proj.weight"}

    def wrong(self, spec):
        if self.path.name == "a.bin":
            return read(self, spec)
        return read(self, replace(spec, name=swapped.get(spec.name, spec.name)))

    monkeypatch.setattr(LlmC, "read", wrong)
    assert convert("--from", "llmc", "--to", "llmc", tmp_path / "a.bin", tmp_path / "b.bin") == 1
    assert "the two sides differ: nothing is left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_a_vocabulary_that_is_none_is_refused(text, values, tmp_path, capsys):
    foreign.write_openai(tmp_path / "openai", values, MODEL)
    (tmp_path / "openai/encoder.json").write_text(text)
    assert convert("--from", "openai", "--to", "huggingface", tmp_path / "openai", tmp_path / "out") == 2
    assert "the tokenizer's vocabulary (vocab.json, encoder.json) is none: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_destination_that_is_there_is_left_alone(values, tmp_path, capsys):
    foreign.write_llmc(tmp_path / "a.bin", values, MODEL, torch.float32)
    (tmp_path / "b").mkdir()
    assert convert("--from", "llmc", "--to", "huggingface", tmp_path / "a.bin", tmp_path / "b") == 2
    assert "is there already" in capsys.readouterr().err
    assert convert("--from", "llmc", "--to", "megagpt2", tmp_path / "a.bin", tmp_path / "c") == 2
    assert "holds no optimizer state" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_transformers_reads_the_tokenizer_of_openais_release(values, tmp_path):
    """vocab.json and merges.txt are OpenAI's files under other names."""
    transformers = pytest.importorskip("transformers")
    foreign.write_openai(tmp_path / "124M", values, MODEL)
    words = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["\u0120", "ab", "<|endoftext|>"]
    (tmp_path / "124M/encoder.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (tmp_path / "124M/vocab.bpe").write_text("#version: 0.2\na b\n")
    assert not convert("--from", "openai", "--to", "huggingface", tmp_path / "124M", tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("ab c")["input_ids"] == [27, 26, 2]


def test_openais_release_is_read(values, tmp_path):
    foreign.write_openai(tmp_path / "124M", values, MODEL)
    source = OpenAI(tmp_path / "124M")
    assert source.model.layers == 4 and source.model.layer_norm_epsilon == 1e-5
    assert_holds(source, values)


def most_held(action: Callable[[], int]) -> int:
    """Bytes by which a child's own memory (mapped files are not) grows at most while it does `action`, which returns an
    exit code of 0."""
    reader, writer = os.pipe()

    def measured() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what the parent had and freed would be used first
        done, before, most = threading.Event(), memory_of_this_process("RssAnon"), [0]

        def watch() -> None:
            while not done.wait(0.001):
                most[0] = max(most[0], memory_of_this_process("RssAnon"))

        watching = threading.Thread(target=watch)
        watching.start()
        assert action() == 0
        done.set()
        watching.join()
        os.write(writer, str(most[0] - before).encode())

    in_child(measured)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return int(pipe.read())


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A Hugging Face folder of 164 MB whose largest tensor has 4 MB."""
    torch.optim.AdamW([torch.nn.Parameter(torch.empty(0))])  # the first one imports half of torch
    folder = tmp_path_factory.mktemp("large")
    model = model_config(layers=12, width=512, heads=8, vocabulary=2000, context=64)
    foreign.write_llmc(folder / "model.bin", foreign.parameters(model), model, torch.float32)
    with patch.object(convert_checkpoint, "transformers_logits", lambda *_: None):
        assert not convert("--from", "llmc", "--to", "huggingface", folder / "model.bin", folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("target", ["huggingface", "megatron", "nanogpt", "llmc"])
def test_one_tensor_at_a_time_is_in_memory(target, large, tmp_path):
    """The layer whose logits are compared has 13 MB; the rest is what Python and torch take on the way."""
    there, back = [tmp_path / "there", tmp_path / "back"]
    known = ["--activation", "tanh"] if target == "nanogpt" else []

    def both_ways() -> int:
        one = convert("--from", "huggingface", "--to", target, large, there)
        return one or convert("--from", target, *known, "--to", "huggingface", there, back)

    with patch.object(convert_checkpoint, "transformers_logits", lambda *_: None):  # it has all of the model in memory
        assert most_held(both_ways) < 80e6
    assert sum(path.stat().st_size for path in large.glob("*.safetensors")) > 150e6

"""The model against transformers' GPT-2 and GPT-1 (I4), its initial weights (D5), recomputation, attention."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from launch.generate import load
from megagpt2.checkpoint.formats.huggingface import foreign_name, read_model_config, transpose_if_projection
from megagpt2.checkpoint.store import CheckpointError
from megagpt2.config import load_config
from megagpt2.config.schema import Recomputation
from megagpt2.data.tokenizer import BYTE_OF, Tokenizer
from megagpt2.kernels.philox import key_of, random_normal
from megagpt2.model import initialize
from megagpt2.model.attention import ATTENTION, automatic
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.initialize import initial_value
from megagpt2.model.layers import DenseBuilder, Dropout
from megagpt2.model.parameters import Spec
from tests.support.models import dense_model, dropped, gradients, model_config, random_tokens, save_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
THEIRS = {"pre": GPT2LMHeadModel, "post": OpenAIGPTLMHeadModel}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def assert_same_model(ours: GPT2, theirs, config) -> None:
    """Logits within 1e-4 (I4), the loss and each gradient within 1e-4 of the largest: fp32 sums in another order."""
    tokens, targets, samples = random_tokens(config)
    logits = theirs(tokens).logits
    assert logits.shape == (*tokens.shape, config.vocabulary)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, samples), logits, rtol=0, atol=1e-4)
    assert logits.std() > 0.5  # else 1e-4 would say nothing
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    our_loss, our_gradients = gradients(ours, tokens, targets, samples)
    assert abs(our_loss - loss.detach()) < 1e-5
    parameters = dict(theirs.named_parameters())
    assert {foreign_name(name, config) for name in our_gradients} == set(parameters)
    for name, gradient in our_gradients.items():
        if name == "wte.weight":
            assert (gradient[config.vocabulary :] == 0).all()
            gradient = gradient[: config.vocabulary]
        expected = parameters[foreign_name(name, config)].grad
        assert error(transpose_if_projection(name, gradient), expected) < 1e-4, name


@pytest.mark.parametrize("fields", [{"norm": "pre"}, {"norm": "pre", "feed_forward": 40}, {"norm": "post"}], ids=str)
def test_transformers_opens_what_we_save(fields, tmp_path):
    config = model_config(layer_norm_epsilon=1e-3, **fields)  # not their default: it must be told
    model = dense_model(config)
    theirs = THEIRS[config.norm].from_pretrained(save_model(model, config, tmp_path) / "model").eval()
    assert theirs.dtype == torch.float32
    assert_same_model(model, theirs, config)


def their_model(norm: str):
    """One of theirs with weights large enough to matter, no dropout."""
    common = {"vocab_size": 301, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3, "initializer_range": 0.2,
              "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "layer_norm_epsilon": 1e-3}
    torch.manual_seed(3)
    config = GPT2Config(n_inner=40, **common) if norm == "pre" else OpenAIGPTConfig(**common)
    return THEIRS[norm](config).eval()


def add_tokenizer(folder: Path) -> None:
    """Bytes and the end of text: a folder that launch/generate.py accepts."""
    Tokenizer({token: number for number, token in enumerate([*BYTE_OF, "<|endoftext|>"])}, []).save(folder)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_we_open_what_transformers_saves(norm, shard_size, tmp_path):
    theirs = their_model(norm)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    add_tokenizer(tmp_path)
    model, _ = load(tmp_path, torch.device("cpu"))
    assert_same_model(model, theirs, read_model_config(tmp_path))


def test_we_open_a_base_model_without_the_prefix(tmp_path):
    theirs = their_model("pre")
    theirs.transformer.save_pretrained(tmp_path)
    assert isinstance(theirs.transformer, GPT2Model)
    add_tokenizer(tmp_path)
    assert_same_model(load(tmp_path, torch.device("cpu"))[0], theirs, read_model_config(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"tie_word_embeddings": False},
     {"activation_function": "relu"}, {"model_type": "llama"}],
    ids=str,
)
def test_other_arithmetic_is_refused(change, tmp_path):
    their_model("pre").config.save_pretrained(tmp_path)
    read_model_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=str(list(change.values())[0])):
        read_model_config(tmp_path)


def parameter_specs(config) -> dict[str, Spec]:
    with torch.device("meta"):
        model = GPT2(config, DenseBuilder(0))
    specs = {parameter.spec.name: parameter.spec for parameter in model.parameters()}
    assert len(specs) == len(list(model.parameters()))
    return specs


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_presets_have_the_parameters_that_they_say(path):
    """The built model against the formula, which tests/unit/test_presets.py compares with the papers."""
    config = load_config(path).model
    assert sum(math.prod(spec.shape) for spec in parameter_specs(config).values()) == config.parameters()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_initial_weights_are_gpt2s(norm):
    """Standard deviations of n normals: within 5 of their sampling error, sigma / sqrt(2 n)."""
    config = model_config(norm=norm, layers=3, width=96, context=64, initial_std=0.02)
    scale = 1 / math.sqrt(2 * 3) if norm == "pre" else 1.0
    for name, spec in parameter_specs(config).items():
        value = initial_value(spec, seed=1)
        if spec.padding:
            assert (value[-spec.padding :] == 0).all()
            value = value[: -spec.padding]
        if value.dim() == 1:
            expected = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            assert (value == expected).all() and not spec.decay, name
            continue
        std = 0.01 if name == "wpe.weight" else 0.02 * (scale if name.endswith("c_proj.weight") else 1.0)
        assert abs(value.std().item() / std - 1) < 5 / math.sqrt(2 * value.numel()), name
        assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel()), name
        assert spec.decay, name
    values = [initial_value(spec, 1) for name, spec in parameter_specs(config).items() if "c_fc.weight" in name]
    assert not torch.equal(values[0], values[1])  # a stream for each name


@st.composite
def partial_specs(draw) -> Spec:
    """A part of a matrix or a vector: some ranges of one dimension, in order, with gaps, empty ones too."""
    shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=2)))
    dim = draw(st.integers(0, len(shape) - 1))
    edges = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=6).filter(lambda e: len(e) % 2 == 0)))
    ranges = tuple(zip(edges[::2], edges[1::2], strict=True))
    padding = draw(st.integers(0, 3)) if dim == 0 else 0
    constant = draw(st.sampled_from([None, 1.0]))
    if constant is not None:
        return Spec("a", shape, constant=constant, dim=dim, ranges=ranges, padding=padding)
    return Spec("a", shape, standard_deviation=0.02, dim=dim, ranges=ranges, padding=padding)


@given(partial_specs(), st.integers(0, 2**63), st.sampled_from([1, 16, 1 << 24]))
def test_initial_value_of_a_shard_is_the_slice_of_the_whole(spec, seed, chunk):
    """Bit by bit: D5. Small chunks make matrices be drawn some rows at a time."""
    whole = Spec(spec.name, spec.shape, standard_deviation=spec.standard_deviation, constant=spec.constant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialize, "_CHUNK_ELEMENTS", chunk)
        local = initial_value(spec, seed)
    assert local.shape == spec.local_shape
    expected = initial_value(whole, seed)
    assert torch.equal(local, spec.local(expected))
    if spec.constant == 0.0:  # the default: the weight is drawn, element by element in its stream's order
        drawn = random_normal(key_of(seed, "initialize", "a"), 0, expected.numel()).view(spec.shape)
        assert torch.equal(expected, drawn * 0.02)


@pytest.mark.parametrize("sequence", [1, 2, 33])
def test_every_attention_is_the_same(sequence):
    """All fp32, sums of 33 in another order, values of size 1: 1e-5; and gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, 3, sequence, 8, generator=generator).requires_grad_() for _ in range(4))
    results = {}
    for name, attend in ATTENTION.items():
        y = attend(q, k, v, torch.arange(2), Dropout(0.0, (0, 0)))
        results[name] = (y, *torch.autograd.grad((y * weight).sum(), (q, k, v)))
    for name, found in results.items():
        for one, other in zip(found, results["reference"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("device", "size", "length", "training", "dropped", "chosen"),
    [
        ("cpu", 4, 16, True, False, "sdpa"), ("cpu", 2, 1024, True, False, "sdpa"),
        ("cpu", 2, 256, True, False, "fused_softmax"), ("cpu", 2, 256, False, False, "sdpa"),
        ("cuda", 2, 256, True, False, "sdpa"), ("cuda", 2, 1024, True, True, "fused_softmax"),
    ],
)
def test_auto_takes_the_faster_attention(device, size, length, training, dropped, chosen):
    assert automatic(device, size, length, training, dropped) == chosen


def test_auto_is_what_it_says_it_takes():
    """In training and in evaluation, of a module that would drop nothing."""
    drop = Dropout(0.0, (0, 0))
    q, k, v = torch.randn(3, 1, 2, 9, 8).bfloat16()
    samples = torch.zeros(1, dtype=torch.int64)
    for training, name in ((True, "fused_softmax"), (False, "sdpa")):
        drop.train(training)
        found, expected = (ATTENTION[way](q, k, v, samples, drop) for way in ("auto", name))
        assert torch.equal(found, expected)
    assert not torch.equal(found, ATTENTION["fused_softmax"](q, k, v, samples, drop))  # another order of rounding


def test_every_attention_that_drops_draws_one_mask():
    """The masks are functions of the coordinate: implementations may round differently, not drop differently."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3))
    drop, samples = Dropout(0.5, (1, 2)), torch.tensor([3, 2**40])
    expected = ATTENTION["reference"](q, k, v, samples, drop)
    for name in ("auto", "fused_softmax"):
        torch.testing.assert_close(ATTENTION[name](q, k, v, samples, drop), expected, rtol=1e-5, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="fused_softmax"):
        ATTENTION["sdpa"](q, k, v, samples, drop)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_recomputation_changes_no_bit(norm):
    config = dropped(model_config(norm=norm))
    batch = random_tokens(config)
    results = [gradients(dense_model(config, recompute), *batch) for recompute in get_args(Recomputation)]
    for loss, by_name in results[1:]:
        assert torch.equal(loss, results[0][0])
        for name, gradient in by_name.items():
            assert torch.equal(gradient, results[0][1][name]), name
    _, still = gradients(dense_model(model_config(norm=norm)), *batch)
    for name, gradient in results[0][1].items():
        assert (gradient - still[name]).abs().max() > 1e-3, name  # dropout was on


def test_full_offload_keeps_the_blocks_inputs_on_the_cpu_and_nothing_else(monkeypatch):
    moved = []

    def recorder(pin_memory):
        assert not pin_memory  # of a CPU tensor there is nothing to pin
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: moved.append(tensor) or tensor, lambda it: it)

    monkeypatch.setattr("megagpt2.model.block.save_on_cpu", recorder)
    config = dropped(model_config())
    tokens, targets, samples = random_tokens(config)
    gradients(dense_model(config, "full_offload"), tokens, targets, samples)
    hidden = [tensor for tensor in moved if tensor.shape == (*tokens.shape, config.width)]
    assert len(hidden) == config.layers
    assert sum(tensor.numel() for tensor in moved) == config.layers * (hidden[0].numel() + len(samples))


def test_a_token_does_not_see_the_future():
    """Changing the last tokens changes no bit before them: the same kernels on the same shapes."""
    config = model_config()
    model, (tokens, _, samples) = dense_model(config).eval(), random_tokens(config)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % config.vocabulary
    with torch.no_grad():
        a, b = model(tokens, samples), model(changed, samples)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


def test_dropout_follows_the_sample_not_its_place_in_the_batch():
    """The same samples in another order: their logits in that order. fp32 products in other places of a batch: 1e-5."""
    config = dropped(model_config())
    model, (tokens, _, samples) = dense_model(config), random_tokens(config)
    with torch.no_grad():
        straight, reversed_ = model(tokens, samples), model(tokens.flip(0), samples.flip(0))
        other = model(tokens, samples + 1)
    torch.testing.assert_close(reversed_.flip(0), straight, rtol=1e-5, atol=1e-5)
    assert error(other, straight) > 0.01  # another sample number is another mask


def test_evaluation_drops_nothing():
    config = dropped(model_config())
    tokens, _, samples = random_tokens(config)
    with torch.no_grad():
        evaluated = dense_model(config).eval()(tokens, samples)
        assert torch.equal(evaluated, dense_model(model_config()).eval()(tokens, samples))

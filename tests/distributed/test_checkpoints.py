"""A checkpoint does not know the layout that wrote it: heads that don't divide, stages, ZeRO's stretches."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megagpt2.checkpoint import store
from megagpt2.checkpoint.convert import fixed_input, logits_of
from megagpt2.checkpoint.formats.huggingface import HuggingFace, Weights
from megagpt2.checkpoint.shards import SliceReader
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.layers import DenseBuilder
from megagpt2.model.parameters import Spec
from tests.support.train import small_config

TP, PP, SP, ZERO = (
    "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel", "parallel.zero_stage",
)
JOB = "tests.support.train:go_on_from"
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "pp2": (2, {PP: 2}),
    "tp2-pp2": (4, {TP: 2, PP: 2}),
    "dp2-zero1": (2, {ZERO: 1}),
    "dp2-zero2": (2, {ZERO: 2}),
    "dp2-zero3": (2, {ZERO: 3}),
    "dp4-zero1": (4, {ZERO: 1}),
    "dp2-tp2-sp": (4, {TP: 2, SP: True}),
    "dp2-tp2-sp-zero3": (4, {TP: 2, SP: True, ZERO: 3}),
}
STEPS = 3
NEXT = dict(zip(LAYOUTS, [*list(LAYOUTS)[1:], "one"], strict=True))
FAST = {target: list(dict.fromkeys(["one", target, NEXT[target]])) for target in LAYOUTS}  # the other sources are slow


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint of the small model: weights, and optimizer state by kind."""
    return contents_of(folder, {})


def contents_of(folder: Path, changes: dict) -> dict[str, torch.Tensor]:
    """The same of a changed model."""
    config = small_config(**changes)
    weights, slices = Weights(folder / "model", config.model), SliceReader(folder / "optimizer")
    tensors = {}
    for parameter in GPT2(config.model, DenseBuilder(0)).parameters():
        spec = Spec(parameter.spec.name, parameter.spec.shape)
        tensors[spec.name] = weights.read(spec)
        tensors |= {f"{kind}/{spec.name}": slices.read(kind, spec) for kind in slices.kinds}
    return tensors


def assert_same(folder: Path, other: Path, changes: dict | None = None) -> None:
    """All tensors are, bit by bit."""
    expected, found = contents_of(other, changes or {}), contents_of(folder, changes or {})
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.fixture(scope="module")
def begun(pool, tmp_path_factory):
    """{layout: what every rank says of two steps from the seed and a checkpoint}."""
    folder = tmp_path_factory.mktemp("begun")
    return {
        name: pool.run(JOB, ranks, changes=changes, sources=[None], folder=str(folder / name), steps=2)
        for name, (ranks, changes) in LAYOUTS.items()
    }


def go_on(pool, begun, folder: Path, sources: dict[str, list[str]]) -> dict[str, dict[str, list[dict]]]:
    """{layout: {layout that wrote the checkpoint: what every rank says of going on from it}}."""
    found = {}
    for name, (ranks, changes) in LAYOUTS.items():
        files = [begun[source][0][0]["saved"][1] for source in sources[name]]
        parts = pool.run(JOB, ranks, changes=changes, sources=files, folder=str(folder / name), steps=STEPS)
        found[name] = {source: [part[n] for part in parts] for n, source in enumerate(sources[name])}
    return found


@pytest.fixture(scope="module")
def continued(pool, begun, tmp_path_factory):
    return go_on(pool, begun, tmp_path_factory.mktemp("continued"), FAST)


@pytest.fixture(scope="module")
def continued_from_others(pool, begun, tmp_path_factory):
    others = {target: [source for source in LAYOUTS if source not in FAST[target]] for target in LAYOUTS}
    return go_on(pool, begun, tmp_path_factory.mktemp("continued_from_others"), others)


@pytest.mark.parametrize(("source", "target"), [(source, target) for target in LAYOUTS for source in FAST[target]])
def test_a_layout_goes_on_where_another_stopped(begun, continued, source, target):
    assert_goes_on(begun, continued[target][source], continued["one"]["one"][0], source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"), [(source, target) for target in LAYOUTS for source in LAYOUTS if source not in FAST[target]]
)
def test_any_layout_goes_on_where_any_other_stopped(begun, continued, continued_from_others, source, target):
    assert_goes_on(begun, continued_from_others[target][source], continued["one"]["one"][0], source)


def assert_goes_on(begun, here: list[dict], alone: dict, source: str) -> None:
    """What was loaded is bit-equal to what was saved, each rank read what it holds and no more, the next losses are
    those of one process on one process's checkpoint, and the samples are the next ones, each once."""
    store.verify(Path(here[0]["saved"][0]))
    assert_same(Path(here[0]["saved"][0]), Path(begun[source][0][0]["saved"][1]))
    for part in here:
        assert part["read"][0] == part["read"][1]
        np.testing.assert_allclose(part["losses"], alone["losses"], rtol=1e-5)
    for step in range(STEPS):
        size = small_config().batch.global_batch
        replicas = {tuple(part["samples"][step]) for part in here}
        assert sorted(chain.from_iterable(replicas)) == list(range((2 + step) * size, (3 + step) * size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout_goes_on_bit_by_bit(pool, continued, layout, tmp_path):
    """I3: two steps, a checkpoint and three steps are five steps."""
    ranks, changes = LAYOUTS[layout]
    straight = pool.run(JOB, ranks, changes=changes, sources=[None], folder=str(tmp_path), steps=2 + STEPS)[0][0]
    resumed = continued[layout][layout][0]
    assert resumed["losses"] == straight["losses"][2:]
    assert_same(Path(resumed["saved"][1]), Path(straight["saved"][1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_opens_what_any_layout_wrote(begun, layout):
    """I4: its logits are ours."""
    from transformers import AutoModelForCausalLM

    folder = Path(begun[layout][0][0]["saved"][1]) / "model"
    tokens = fixed_input(small_config().model.vocabulary, small_config().model.context)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    torch.testing.assert_close(theirs, logits_of(HuggingFace(folder), tokens), rtol=0, atol=1e-4)


def test_bf16_checkpoints_keep_fp32_masters(pool, tmp_path):
    """model/ holds bf16; the masters beside it are fp32 and not the rounded weights; going on is bitwise, and in fp32
    the masters go on, not the rounded weights."""
    changes = {"training.precision": "bf16", TP: 2, PP: 2}

    def run(name: str, source: str | None, steps: int, ranks: int = 4, changes: dict = changes) -> dict:
        return pool.run(JOB, ranks, changes=changes, sources=[source], folder=str(tmp_path / name), steps=steps)[0][0]

    straight, first = run("straight", None, 4), run("first", None, 2)
    second = run("second", first["saved"][1], 2)
    assert first["losses"] + second["losses"] == straight["losses"]
    assert_same(Path(second["saved"][1]), Path(straight["saved"][1]))
    one = contents(Path(straight["saved"][1]))
    name = "h.0.mlp.c_fc.weight"
    assert one[name].dtype == torch.bfloat16
    assert torch.equal(one[f"master/{name}"].bfloat16(), one[name])
    assert not torch.equal(one[f"master/{name}"], one[name].float())
    model = load_file(sorted((Path(second["saved"][1]) / "model").glob("*.safetensors"))[0])
    assert {t.dtype for t in model.values()} == {torch.bfloat16}
    exact = contents(Path(run("fp32", straight["saved"][1], 0, 1, {})["saved"][0]))
    assert torch.equal(exact[name], one[f"master/{name}"])


STATES, PRECISION = "offload.optimizer", "training.precision"
BENEATH = {  # where and in which type state lies that training goes on to change while it is copied
    "tp2-pp2-offload": (4, {TP: 2, PP: 2, STATES: "cpu"}),
    "dp2-zero2-offload": (2, {ZERO: 2, STATES: "cpu"}),
    "dp2-zero3-offload": (2, {ZERO: 3, STATES: "cpu", "offload.parameters": "cpu"}),
    "dp2-zero2-bf16": (2, {ZERO: 2, PRECISION: "bf16"}),
    "dp2-zero3-bf16": (2, {ZERO: 3, PRECISION: "bf16"}),
    "dp2-zero2-fp16": (2, {ZERO: 2, PRECISION: "fp16"}),
    "pp2-fp16": (2, {PP: 2, PRECISION: "fp16"}),
}


@pytest.mark.parametrize("layout", BENEATH)
def test_a_save_holds_what_was_there_when_it_began(pool, layout, tmp_path):
    """(What LAYOUTS has not: `begun` and `continued` save so too.)"""
    ranks, changes = BENEATH[layout]

    def run(name: str, source: str | None, steps: int) -> dict:
        return pool.run(JOB, ranks, changes=changes, sources=[source], folder=str(tmp_path / name), steps=steps)[0][0]

    first = run("first", None, 2)
    second = run("second", first["saved"][1], 1)
    assert_same(Path(second["saved"][0]), Path(first["saved"][1]))
    name = "h.3.mlp.c_proj.weight"
    trained, loaded = (contents(Path(path))[f"exp_avg/{name}"] for path in reversed(second["saved"]))
    assert not torch.equal(trained, loaded)


@pytest.mark.parametrize("layout", ["tp2-pp2", "dp2-tp2-sp-zero3", *(name for name in BENEATH if "pp2-o" not in name)])
def test_training_begins_with_given_weights(pool, begun, layout, tmp_path):
    """Masters are the weights given, in fp32, not what they are rounded to; weights are what they are rounded to;
    moments and steps are zero. ZeRO-3's gathered copies are of these weights: the first loss is."""
    ranks, changes = (LAYOUTS | BENEATH)[layout]
    source = begun["one"][0][0]["saved"][1]
    given = contents(Path(source))
    weights = {name: tensor for name, tensor in given.items() if "/" not in name}

    def run(folder: str, ranks: int, changes: dict) -> dict:
        return pool.run(JOB, ranks, changes=changes, sources=[source], folder=str(tmp_path / folder), steps=1,
                        weights_alone=True)[0][0]

    found = run("there", ranks, changes)
    saved = Path(found["saved"][0])
    assert store.read_manifest(saved).step == 0
    held = contents(saved)
    for name, weight in weights.items():
        assert torch.equal(held[name], weight.to(held[name].dtype)), name
        assert torch.equal(held.get(f"master/{name}", held[name]), weight), name
        assert not held[f"exp_avg/{name}"].any() and not held[f"exp_avg_sq/{name}"].any(), name
    alone = run("alone", 1, {key: value for key, value in changes.items() if key == PRECISION})
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-5 if PRECISION not in changes else 2e-3)

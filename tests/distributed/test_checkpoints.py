"""A checkpoint does not know the layout that wrote it: heads that don't divide, stages, ZeRO's stretches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megagpt2.checkpoint import store
from megagpt2.checkpoint.formats.huggingface import Weights
from megagpt2.checkpoint.shards import SliceReader
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.layers import DenseBuilder
from tests.support.train import small_config

TP, PP, SP, ZERO = (
    "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel", "parallel.zero_stage",
)
JOB = "tests.support.train:save_and_go_on"
LAYOUTS = {
    "tp2": (2, {TP: 2}),
    "tp2-pp2": (4, {TP: 2, PP: 2}),
    "pp2-dp2": (4, {PP: 2}),
    "dp2-zero2": (2, {ZERO: 2}),
    "tp2-dp2-zero3-sp": (4, {TP: 2, SP: True, ZERO: 3}),
}


@pytest.fixture(scope="module")
def straight(pool, tmp_path_factory):
    """Six steps of one process: losses, and the checkpoint after the second one."""
    folder = str(tmp_path_factory.mktemp("straight"))
    first = pool.run(JOB, 1, changes={}, folder=folder, steps=2)[0]
    rest = pool.run(JOB, 1, changes={}, folder=folder, steps=4, load=first["saved"])[0]
    return first["losses"] + rest["losses"], Path(first["saved"])


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint of the small model: weights, and optimizer state by kind."""
    return contents_of(folder, {})


def contents_of(folder: Path, changes: dict) -> dict[str, torch.Tensor]:
    """The same of a changed model."""
    config = small_config(**changes)
    weights, slices = Weights(folder / "model", config.model), SliceReader(folder / "optimizer")
    tensors = {}
    for parameter in GPT2(config.model, DenseBuilder(0)).parameters():
        spec = parameter.spec
        tensors[spec.name] = weights.read(spec)
        tensors |= {f"{kind}/{spec.name}": slices.read(kind, spec) for kind in slices.kinds}
    return tensors


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_goes_on_where_another_stopped(pool, straight, tmp_path, name):
    ranks, layout = LAYOUTS[name]
    losses, begun = straight
    # one process -> layout -> one process: state is bit-equal on the way, losses are those of one process
    here = pool.run(JOB, ranks, changes=layout, folder=str(tmp_path / "same"), steps=0, load=str(begun))
    same = Path(here[0]["saved"])
    store.verify(same)
    expected, found = contents(begun), contents(same)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    middle = pool.run(JOB, ranks, changes=layout, folder=str(tmp_path / "middle"), steps=2, load=str(same))
    for part in middle:
        np.testing.assert_allclose(part["losses"], losses[2:4], rtol=1e-5)
    end = pool.run(JOB, 1, changes={}, folder=str(tmp_path / "end"), steps=2, load=middle[0]["saved"])
    np.testing.assert_allclose(end[0]["losses"], losses[4:6], rtol=1e-5)


def test_bf16_checkpoints_keep_fp32_masters(pool, tmp_path):
    """model/ holds bf16; the masters beside it are fp32 and not the rounded weights; going on is bitwise."""
    changes = {"training.precision": "bf16", TP: 2, PP: 2}
    straight = pool.run(JOB, 4, changes=changes, folder=str(tmp_path / "straight"), steps=4)[0]
    first = pool.run(JOB, 4, changes=changes, folder=str(tmp_path / "parts"), steps=2)[0]
    second = pool.run(JOB, 4, changes=changes, folder=str(tmp_path / "parts"), steps=2, load=first["saved"])[0]
    assert first["losses"] + second["losses"] == straight["losses"]
    one, other = contents(Path(straight["saved"])), contents(Path(second["saved"]))
    for key, tensor in one.items():
        assert torch.equal(other[key], tensor), key
    name = "h.0.mlp.c_fc.weight"
    assert one[name].dtype == torch.bfloat16
    assert torch.equal(one[f"master/{name}"].bfloat16(), one[name])
    assert not torch.equal(one[f"master/{name}"], one[name].float())
    model = load_file(sorted((Path(second["saved"]) / "model").glob("*.safetensors"))[0])
    assert {t.dtype for t in model.values()} == {torch.bfloat16}

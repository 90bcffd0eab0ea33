"""Checkpoints that DeepSpeed wrote become ours, weights and Adam's state bit by bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagpt2.checkpoint.formats.deepspeed import DeepSpeed
from megagpt2.checkpoint.formats.huggingface import transpose_if_projection
from megagpt2.checkpoint.formats.source import whole_specs
from megagpt2.checkpoint.store import CheckpointError
from tests.support.deepspeed_peer import STEPS
from tests.support.foreign import megatron_rank
from tests.support.models import model_config
from tools.convert_checkpoint import main

FIELDS = {"layers": 4, "width": 24, "heads": 4, "vocabulary": 301, "context": 16}
MODEL = model_config(**FIELDS)
KINDS = ("weight", "master", "exp_avg", "exp_avg_sq")


def read(source: DeepSpeed, kind: str) -> dict[str, torch.Tensor]:
    """{our name: weight or state}."""
    specs = whole_specs(MODEL)
    return {spec.name: source.read(spec) if kind == "weight" else source.state(kind, spec) for spec in specs}


def of_rank(values: dict[str, torch.Tensor], rank: int, tensor: int) -> dict[str, torch.Tensor]:
    """What a tensor-parallel rank of Megatron-DeepSpeed's pipeline holds of them, by DeepSpeed's names."""
    language = megatron_rank(values, MODEL, rank, tensor, 3.0, "encoder", 0, MODEL.layers)["language_model"]
    found = {f"tied_modules.embed.{name}.weight": part["weight"] for name, part in language["embedding"].items()}
    for name, value in language["encoder"].items():
        first, *rest = name.removeprefix("layers.").split(".")
        norm = first.startswith("final_")
        found[f"{MODEL.layers + 2}.{rest[0]}" if norm else f"{int(first) + 2}.{'.'.join(rest)}"] = value
    return found


def assert_same(found: dict[str, torch.Tensor], state: dict, kind: str) -> None:
    """Bit by bit, for all that a rank holds; the rows of the vocabulary's padding are left out."""
    compared = 0
    for name, values in state.items():
        rows = len(found[name]) if "word_embeddings" not in name else None
        expected, tensor = torch.from_numpy(values[kind]), found[name].float()
        if rows is None:  # padding is made up by megatron_rank
            real = (tensor != 0.01).any(dim=1)
            expected, tensor = expected[real], tensor[real]
        assert torch.equal(tensor, expected), (name, kind)
        compared += 1
    assert compared


@pytest.mark.parametrize(
    ("ranks", "tensor", "stages", "precision"),
    [(1, 1, 1, "fp32"), (2, 1, 2, "bf16"), (4, 2, 2, "fp32"), (4, 2, 1, "bf16"), (4, 1, 2, "fp32")],
)
def test_a_pipelines_folder(pool, ranks, tensor, stages, precision, tmp_path):
    job = {"fields": MODEL.model_dump(), "folder": str(tmp_path), "tensor": tensor, "stages": stages}
    told = pool.run("tests.support.deepspeed_peer:pipeline", ranks, precision=precision, zero=1, **job)
    source = DeepSpeed(tmp_path)
    assert source.updates == STEPS and set(source.kinds) == set(KINDS[1:])
    for kind in KINDS:
        values = read(source, kind)
        for part in told:
            assert_same(of_rank(values, part["rank"], tensor), part["state"], kind)


@pytest.mark.parametrize(
    ("ranks", "zero", "precision"), [(2, 1, "fp32"), (2, 2, "bf16"), (2, 3, "bf16"), (3, 3, "fp32")]
)
def test_a_plain_engines_folder(pool, ranks, zero, precision, tmp_path):
    """Its module has transformers' names and orientation."""
    job = {"fields": MODEL.model_dump(), "folder": str(tmp_path), "precision": precision, "zero": zero}
    told = pool.run("tests.support.deepspeed_peer:plain", ranks, **job)
    source = DeepSpeed(tmp_path, heads=4)
    assert source.updates == STEPS
    for kind in KINDS:
        values = {f"transformer.{n}": transpose_if_projection(n, v) for n, v in read(source, kind).items()}
        assert_same(values, told[0]["state"], kind)
    request = ["--from", "deepspeed", "--to", "megagpt2", "--heads", "4", str(tmp_path), str(tmp_path / "ours")]
    assert main(request) == 0
    assert (tmp_path / "ours/step_00000002/manifest.json").is_file()


@pytest.mark.parametrize("kind", ["pipeline", "plain"])
def test_a_universal_checkpoint(pool, kind, tmp_path):
    """Made by DeepSpeed's own tool, of two tensor-parallel ranks and of two replicas."""
    job = {"fields": MODEL.model_dump(), "folder": str(tmp_path), "precision": "fp32", "zero": 1}
    extra = {"tensor": 2, "stages": 1} if kind == "pipeline" else {}
    pool.run(f"tests.support.deepspeed_peer:{kind}", 2, **job, **extra)
    tag = tmp_path / f"global_step{STEPS}"
    universal = tmp_path / "universal"
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", tag, "--output_folder",
        universal, "--num_extract_workers", "1", "--num_merge_workers", "1",
        *([] if extra else ["--inject_missing_state"]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    heads = {} if extra else {"heads": 4}
    source, original = DeepSpeed(universal, **heads), DeepSpeed(tag, **heads)
    assert source.model.model_dump() == original.model.model_dump() and source.updates == STEPS
    for spec in whole_specs(MODEL):
        assert torch.equal(source.read(spec), original.read(spec)), spec.name
        for name in KINDS[1:]:
            assert torch.equal(source.state(name, spec), original.state(name, spec)), (spec.name, name)


@pytest.mark.parametrize(("precision", "zero"), [("bf16", 2), ("fp32", 1)])
@pytest.mark.parametrize("target", ["megagpt2", "huggingface"])
def test_files_of_another_step_do_not_pass(pool, precision, zero, target, tmp_path, capsys):
    """Every master is compared with its weight."""
    job = {"fields": MODEL.model_dump(), "folder": str(tmp_path), "precision": precision, "zero": zero}
    pool.run("tests.support.deepspeed_peer:plain", 2, **job)
    (path,) = tmp_path.glob("global_step2/mp_rank_00_model_states.pt")
    content = torch.load(path, weights_only=False)
    content["module"]["transformer.h.1.mlp.c_fc.weight"][0, 0] += 1
    torch.save(content, path)
    request = ["--from", "deepspeed", "--to", target, "--heads", "4", str(tmp_path), str(tmp_path / "ours")]
    assert main(request) == 2
    assert "the master of h.1.mlp.c_fc.weight is not its weight" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_missing_rank_is_named(pool, tmp_path):
    job = {"fields": MODEL.model_dump(), "folder": str(tmp_path), "precision": "fp32", "zero": 1}
    pool.run("tests.support.deepspeed_peer:plain", 2, **job)
    Path(tmp_path / "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks optimizer files of mp_rank 0: it has \[1\]"):
        DeepSpeed(tmp_path, heads=4)

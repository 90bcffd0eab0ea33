"""The same run on a GPU. Not part of `make test`: it needs a CUDA device (`make test-slow`, where there is one)."""

from __future__ import annotations

import pytest

from megagpt2.config import Config
from tests.support.runs import (
    assert_same_checkpoint,
    assert_same_record,
    checkpoint,
    events,
    log_rows,
    pretrain,
    tiny_config,
)

pytestmark = pytest.mark.gpu

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}  # of a loss near 5.7: TF32 off; three and ten bits of mantissa


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_gpu_trains_what_a_cpu_trains(text, tmp_path, precision, zero_stage):
    """Initial weights, data and dropout masks are the same numbers everywhere (D5): only rounding may differ."""
    changes = {"training.steps": 5, "parallel.zero_stage": zero_stage}
    cpu = tiny_config(text, tmp_path / "cpu", **changes)
    gpu = tiny_config(
        text, tmp_path / "gpu",
        **{**changes, "training.device": "cuda", "training.precision": precision, "training.initial_loss_scale": 1024},
    )
    pretrain((cpu, 1), (gpu, 1))
    expected, found = log_rows(cpu.run.directory), log_rows(gpu.run.directory)
    assert not any(row["skipped"] for row in found)
    assert all((row["loss_scale"] == 1024) == (precision == "fp16") for row in found)
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=TOLERANCE[precision])


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fp16_finds_its_loss_scale(text, tmp_path, zero_stage):
    """From 2**30 gradients overflow: steps are skipped, each halves the scale and is named, then training goes on."""
    run = tiny_config(
        text, tmp_path / "run",
        **{
            "training.steps": 40, "parallel.zero_stage": zero_stage, "training.device": "cuda",
            "training.precision": "fp16", "training.initial_loss_scale": 2**30,
        },
    )
    pretrain((run, 1))
    rows = log_rows(run.run.directory)
    skipped = [row["skipped"] for row in rows]
    count = sum(skipped)
    assert 0 < count < 30 and skipped == [True] * count + [False] * (40 - count)
    assert [row["loss_scale"] for row in rows[: count + 1]] == [2.0 ** (30 - n) for n in range(count + 1)]
    told = [event for event in events(run.run.directory) if "overflowed" in event]
    assert len(told) == count and all("on rank 0 (stage 0, replica 0, shard 0), samples " in event for event in told)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_full_offload_takes_less_memory_than_full(text, tmp_path):
    """What the blocks keep waits on the host: the device's peak falls by about layers x hidden states."""
    peaks = {}
    for recompute in ("full", "full_offload"):
        run = tiny_config(
            text, tmp_path / recompute,
            **{
                "model.layers": 24, "model.width": 256, "training.steps": 2, "training.device": "cuda",
                "training.precision": "fp32", "parallel.activation_checkpointing": recompute,
                "batch.global_batch": 64, "batch.micro_batch": 64,
            },
        )
        pretrain((run, 1))
        peaks[recompute] = log_rows(run.run.directory)[-1]["memory_bytes"]
    hidden = 64 * 32 * 256 * 4
    assert peaks["full"] - peaks["full_offload"] > 12 * hidden


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_offload_is_full_bit_by_bit(text, tmp_path, precision):
    """What waited in the CPU's memory comes back unchanged: losses, norms and every saved tensor are those of "full",
    with dropout and several micro-batches, so that copies of several blocks and batches are under way at once."""

    def run(name: str, recompute: str) -> Config:
        return tiny_config(
            text, tmp_path / name,
            **{
                "model.layers": 6, "training.steps": 4, "training.device": "cuda", "training.precision": precision,
                "parallel.activation_checkpointing": recompute,
            },
        )

    runs = [run("full", "full"), run("again", "full"), run("offloaded", "full_offload")]
    pretrain(*((config, 1) for config in runs))
    full, again, offloaded = (config.run.directory for config in runs)
    assert_same_record(full, again)  # the control: the device repeats itself
    assert_same_record(full, offloaded)
    assert_same_checkpoint(checkpoint(full, 4), checkpoint(offloaded, 4))

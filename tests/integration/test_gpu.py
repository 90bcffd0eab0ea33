"""The same run on a GPU. Not part of `make test`: it needs a CUDA device (`make test-slow`, where there is one)."""

from __future__ import annotations

import pytest
import torch

from tests.support.runs import log_rows, pretrain, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

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

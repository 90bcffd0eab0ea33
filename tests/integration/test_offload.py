"""Runs with state on NVMe: killed and resumed; refused where the folder won't do; and the 1542M model within the memory
of a 24 GiB machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megagpt2.checkpoint import store
from megagpt2.parallel.nvme import file_system
from tests.support.nvme import need_nvme
from tests.support.runs import (
    ROOT,
    assert_same_checkpoint,
    assert_same_record,
    checkpoint,
    end_all,
    pretrain,
    start_pretrain,
    steps,
    tiny_config,
    wait_until,
)

GIB = 1 << 30
MEMORY, DISK = 17 * GIB, 48 * GIB  # its peak with room to spare; files for states, and the checkpoint at the end


def available_memory() -> int:
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))


def nvme_config(text, directory: Path, **changes):
    """Wide enough that DeepSpeed really swaps: it leaves what is below 1 MiB in memory."""
    return tiny_config(text, directory, **{
        "model.width": 270, "parallel.zero_stage": 3, "offload.optimizer": "nvme", "offload.parameters": "nvme",
        "offload.nvme_path": directory.parent / "nvme", "checkpoint.every": 2, **changes,
    })


def test_a_killed_run_goes_on_bit_by_bit_and_cleans_up(text, tmp_path):
    need_nvme()
    config = nvme_config(text, tmp_path / "killed", **{"training.steps": 100_000})
    (process,) = start_pretrain(config)
    wait_until(lambda: 3 in steps(config.run.directory), [process])
    process.signal(signal.SIGKILL)
    end_all([process])
    files = tmp_path / "nvme"
    assert list(files.rglob("*.swp"))
    assert store.newest_verified(config.run.directory / "checkpoints")[0] is not None
    last = steps(config.run.directory)[-1] + 2
    config = config.replace({"training.steps": last})
    straight = config.replace({"run.directory": tmp_path / "straight"})
    pretrain((config, 1), (straight, 1))
    assert_same_record(config.run.directory, straight.run.directory)
    assert_same_checkpoint(checkpoint(config.run.directory, last), checkpoint(straight.run.directory, last))
    assert not list(files.iterdir())


def test_a_folder_that_takes_no_files_is_refused(text, tmp_path):
    """Before anything is written: a new run.directory is gone again, an earlier run's keeps its configuration."""
    need_nvme()
    (tmp_path / "nvme").write_text("a file")
    config, earlier = nvme_config(text, tmp_path / "run"), tmp_path / "earlier"
    (earlier / "checkpoints").mkdir(parents=True)
    (earlier / "config.yaml").write_text("kept")
    for directory in (config.run.directory, earlier):
        [ended] = end_all(start_pretrain(config.replace({"run.directory": directory})))
        assert ended.code == 2 and "offload.nvme_path" in ended.errors and "can't be written" in ended.errors, ended
    assert not config.run.directory.exists()
    assert (earlier / "config.yaml").read_text() == "kept" and (earlier / "checkpoints").is_dir()


def test_a_folder_in_memory_is_refused(text, tmp_path):
    need_nvme()
    if file_system(Path("/dev/shm")) != "tmpfs" or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm in memory here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        [ended] = end_all(start_pretrain(nvme_config(text, tmp_path / "run", **{"offload.nvme_path": folder})))
        assert not list(Path(folder).iterdir())
    assert ended.code == 2 and f"{folder} can't be used: it is in memory (tmpfs)" in ended.errors, ended
    assert "name a folder on a local disk" in ended.errors


def test_the_kind_of_a_file_system(tmp_path):
    """The innermost mount counts, the later one of two at a place, and blanks are escaped."""
    mounts = tmp_path / "mounts"
    blank = tmp_path / "with blank"
    blank.mkdir()
    (tmp_path / "inner").mkdir()
    escaped = str(blank).replace(" ", "\\040")
    twice = (f"c {escaped} xfs rw 0 0", f"d {escaped} ramfs rw 0 0")
    mounts.write_text("\n".join(("a / ext4 rw 0 0", f"b {tmp_path}/inner tmpfs rw 0 0", *twice)))
    found = [file_system(folder, mounts) for folder in (tmp_path, tmp_path / "inner", blank / "below")]
    assert found == ["ext4", "tmpfs", "ramfs"]
    assert file_system(tmp_path, tmp_path / "none") == ""


@pytest.mark.slow
def test_1542m_takes_a_step_within_20_gib(tmp_path):
    need_nvme()
    if available_memory() < MEMORY or shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"needs {MEMORY // GIB} GiB of free memory and {DISK // GIB} GiB of free disk in {tmp_path}")
    command = [
        sys.executable, ROOT / "tools/measure_offload.py", "--config", ROOT / "configs/gpt2_1542m_offload.yaml",
        "--folder", tmp_path, "--limit", "20", "batch.global_batch=1", "batch.sequence_length=128",
        "training.steps=1", "schedule.warmup_steps=0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["parameters"] == 1_557_611_200
    assert row["peak_gib"] < 20
    (loss,) = row["losses"]
    assert 10.5 < loss < 11.5  # log(50257) = 10.8: untrained, and no number is broken

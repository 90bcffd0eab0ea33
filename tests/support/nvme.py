"""Tests of NVMe offload need DeepSpeed's operators and a folder that takes direct writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from megagpt2.config.facts import nvme_operators_built
from megagpt2.parallel.nvme import file_system


def need_nvme() -> None:
    """Skip with the reason where the operators are not built or tests' folders are in memory; where .ci/run has built
    the operators, fail."""
    if nvme_operators_built():
        if file_system(Path(tempfile.gettempdir())) not in ("tmpfs", "ramfs"):
            return
        reason = f"{tempfile.gettempdir()} is a file system in memory: set TMPDIR to a folder on a disk"
    else:
        reason = "DeepSpeed's NVMe operators are not built: install libaio's headers (libaio-dev), run make setup-nvme"
    if os.environ.get("MEGAGPT2_REQUIRE_NVME") == "1":
        pytest.fail(reason)
    pytest.skip(reason)

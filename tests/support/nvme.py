"""Tests of NVMe offload need DeepSpeed's operators and a folder that takes direct writes."""

from __future__ import annotations

import os

import pytest

from megagpt2.config.facts import nvme_operators_built


def need_nvme() -> None:
    """Skip with the reason where the operators are not built; where .ci/run has built them, fail."""
    if nvme_operators_built():
        return
    reason = "DeepSpeed's NVMe operators are not built: install libaio's headers (libaio-dev) and run make setup-nvme"
    if os.environ.get("MEGAGPT2_REQUIRE_NVME") == "1":
        pytest.fail(reason)
    pytest.skip(reason)

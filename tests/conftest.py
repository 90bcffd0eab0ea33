"""Fixtures for the whole session."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from megagpt2.kernels.extension import EXTENSION
from tests.support import cuda_kernels
from tests.support.pool import Pool

# Tests never depend on how long something takes: hypothesis' limit of 200 ms an example fails on a busy machine.
settings.register_profile("megagpt2", deadline=None)
settings.load_profile("megagpt2")

if library := os.environ.get(cuda_kernels.ENVIRONMENT):
    assert EXTENSION.compiled, EXTENSION.reason
    torch.ops.load_library(library)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() and EXTENSION.cuda):
        pytest.skip("no CUDA device, or no operators compiled for it")


@pytest.fixture(scope="session")
def pool():
    """Gloo worker processes, up to six (three replicas of two stages), started when a test first needs them."""
    workers = Pool(6)
    yield workers
    workers.stop()

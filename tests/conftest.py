"""Fixtures for the whole session."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.support.pool import Pool

# Tests never depend on how long something takes: hypothesis' limit of 200 ms an example fails on a busy machine.
settings.register_profile("megagpt2", deadline=None)
settings.load_profile("megagpt2")


@pytest.fixture(scope="session")
def pool():
    """Four gloo worker processes, started at the first use."""
    workers = Pool(4)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def wide_pool():
    """Six of them, for three replicas of two stages."""
    workers = Pool(6)
    yield workers
    workers.stop()

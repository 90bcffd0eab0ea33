"""Fixtures for the whole session."""

from __future__ import annotations

import pytest

from tests.support.pool import Pool


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

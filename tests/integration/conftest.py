"""What the integration tests share: one text, and one finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagpt2.config import Config
from tests.support.runs import Ended, Text, pretrain_command, run, tiny_config, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Text:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory) -> tuple[Config, Ended]:
    """A run of one process in fp32, started as a user does, and what it printed."""
    directory: Path = tmp_path_factory.mktemp("finished") / "run"
    changes = {
        "training.steps": 20, "validation.every": 8, "validation.batches": 3, "checkpoint.every": 10,
        "monitor.sample_every": 10, "monitor.sample_prompts": ["the cat"], "monitor.sample_tokens": 8,
    }
    config = tiny_config(text, directory, **changes)
    end = run(pretrain_command(config))
    assert end.code == 0, end
    return config, end

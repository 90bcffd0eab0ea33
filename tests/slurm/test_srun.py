"""Real srun and sbatch on a cluster of two nodes (tests/support/slurm.py): the run is that of one process."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest

from tests.support import slurm
from tests.support.runs import LIMIT, ROOT, losses, pretrain_command, run, tiny_config, write_text

pytestmark = pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not()))
STEPS = {"training.steps": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture(scope="module")
def expected(text, tmp_path_factory) -> list[float]:
    config = tiny_config(text, tmp_path_factory.mktemp("one") / "run", **STEPS)
    assert run(pretrain_command(config)).code == 0
    return losses(config.run.directory)


def started_by_slurm(command, environment, **options):
    """The variables that clean_environment takes away are what finds the cluster: they are given here."""
    return run(command, environment, cwd=ROOT, **options)


def wait_for(file: Path, text: str) -> str:
    """What is in a file once the text is."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        content = file.read_text() if file.exists() else ""
        if text in content and content.endswith("\n"):
            return content
        time.sleep(0.1)
    raise AssertionError(f"{file} never had {text!r}:\n{content}")


def test_srun_starts_a_rank_on_each_node(cluster, text, tmp_path, expected):
    config = tiny_config(text, tmp_path / "run", **STEPS, **{"parallel.tensor_parallel": 2})
    end = started_by_slurm(["srun", "--nodes=2", "--ntasks=2", *pretrain_command(config)], cluster)
    assert end.code == 0, end
    assert "2 x cpu, started by slurm" in end.output
    assert losses(config.run.directory) == pytest.approx(expected, rel=1e-5)


def test_a_job_script_needs_srun_and_then_runs_on_all_its_tasks(cluster, text, tmp_path, expected):
    config = tiny_config(
        text, tmp_path / "run", **STEPS, **{"parallel.tensor_parallel": 2, "parallel.pipeline_parallel": 2}
    )
    command = shlex.join(map(str, pretrain_command(config)))
    script, output = tmp_path / "job.sbatch", tmp_path / "job.out"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2\n{command}\necho alone $?\nsrun {command}\necho srun $?\n"
    )
    end = started_by_slurm(["sbatch", f"--output={output}", script], cluster)
    assert end.code == 0, end
    printed = wait_for(output, "\nsrun ")  # `sbatch --wait` looks for the job's end every half minute
    assert "SLURM_NTASKS is 4, but this process wasn't started with srun" in printed
    assert "alone 2\n" in printed and printed.endswith("srun 0\n")
    assert "4 x cpu, started by slurm" in printed
    assert losses(config.run.directory) == pytest.approx(expected, rel=1e-5)

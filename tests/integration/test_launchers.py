"""The same two ranks, started in four ways, are the same run (DESIGN section 7)."""

from __future__ import annotations

import itertools
import os
import socket
import sys

import pytest

from megagpt2.parallel.launch import detect, free_port
from tests.support.runs import PROGRAMS, Process, end_all, log_rows, losses, pretrain_command, tiny_config

LAUNCHERS = {"deepspeed": "deepspeed", "torchrun": "torchrun", "mpiexec": "mpi", "srun": "slurm"}  # command -> our name


def slurm_tasks(number: int) -> list[dict[str, str]]:
    """What srun tells each of its tasks on one node. The port follows from the job's number: one that is free."""
    def variables(job: int, rank: int) -> dict[str, str]:
        return {
            "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NTASKS": str(number), "SLURM_TASKS_PER_NODE": str(number), "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
        }

    for job in itertools.count(os.getpid()):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", detect(variables(job, 0)).master_port)):  # nobody answers
                return [variables(job, rank) for rank in range(number)]
    raise AssertionError


def start(launcher: str, command: list) -> list[Process]:
    """command: what one process without a launcher would be started with."""
    _, script, *arguments = command
    port = str(free_port())
    programs = {
        "deepspeed": [sys.executable, PROGRAMS / "deepspeed", "--num_accelerators", "2", "--master_port", port],
        "torchrun": [PROGRAMS / "torchrun", "--nproc-per-node", "2", "--master-port", port],
        "mpiexec": [PROGRAMS / "mpiexec", "-n", "2", sys.executable],
    }
    if launcher == "srun":
        return [Process(command, task) for task in slurm_tasks(2)]
    return [Process([*programs[launcher], script, *arguments], {})]


@pytest.fixture(scope="module")
def launched(text, tmp_path_factory):
    """All of them at once: launcher -> (the run's folder, how its processes ended)."""
    if not (PROGRAMS / "mpiexec").exists():
        pytest.skip("no mpiexec beside this python: pip install mpich")
    folder = tmp_path_factory.mktemp("launched")
    changes = {"parallel.tensor_parallel": 2, "training.steps": 3, "validation.every": 3, "validation.batches": 1}
    configs = {name: tiny_config(text, folder / name, **changes) for name in LAUNCHERS}
    started = {name: start(name, pretrain_command(config)) for name, config in configs.items()}
    ended = iter(end_all([process for processes in started.values() for process in processes]))
    return {name: (configs[name].run.directory, [next(ended) for _ in started[name]]) for name in LAUNCHERS}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launcher_starts_two_ranks_of_one_run(launched, launcher):
    directory, ends = launched[launcher]
    assert [end.code for end in ends] == [0] * len(ends), "\n".join(map(str, ends))
    output = "".join(end.output for end in ends)
    assert output.count("2 x cpu, started by") == 1  # one world of two, not two of one; rank 0 speaks
    assert f"started by {LAUNCHERS[launcher]}\n" in output
    assert "tensor 2 x pipeline 1 x data 1" in output


def test_the_launcher_changes_no_number(launched):
    expected = losses(launched["torchrun"][0])
    assert len(expected) == 3
    for launcher, (directory, _) in launched.items():
        assert losses(directory) == pytest.approx(expected, rel=1e-6), launcher
        norms = [row["gradient_norm"] for row in log_rows(directory)]
        assert norms == pytest.approx([row["gradient_norm"] for row in log_rows(launched["torchrun"][0])], rel=1e-6)


def test_a_refusal_is_the_launchers_exit_code(text, tmp_path):
    """torchrun is not asked: its own exit code is 1 whatever its ranks say."""
    config = tiny_config(text, tmp_path / "run", **{"parallel.tensor_parallel": 2, "checkpoint.resume": "must"})
    launchers = ("deepspeed", "mpiexec")
    started = [process for launcher in launchers for process in start(launcher, pretrain_command(config))]
    for launcher, end in zip(launchers, end_all(started), strict=True):
        assert end.code == 2, f"{launcher}: {end}"
        assert (end.output + end.errors).count("checkpoint.resume is 'must', but no checkpoint can be used") == 1
    assert not config.run.directory.exists()

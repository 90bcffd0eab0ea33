"""Every way of starting leads to the same RankEnvironment, and contradictions end before anything hangs."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megagpt2.parallel.launch import LOCALHOST, RankEnvironment, detect, export, free_port
from megagpt2.parallel.slurm import parse_counts, parse_nodelist

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4"}
# task 9 of `srun --ntasks=11`: 4 on node08, 4 on node09, 3 on node10
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "11",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "4(x2),3",
    "SLURM_JOB_NODELIST": "node[08-10]",
}
# python in a job script of the same allocation, without srun
SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "11",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "4(x2),3",
    "SLURM_JOB_NODELIST": "node[08-10]",
}


def test_torchrun() -> None:
    assert detect(TORCHRUN) == RankEnvironment(5, 8, 1, 4, "node7", 29400, "torchrun")


@pytest.mark.parametrize("argv", [[], ["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "-1"]])
def test_deepspeed(argv: list[str]) -> None:
    expected = RankEnvironment(1, 2, 1, 2, "127.0.0.1", 29500, "deepspeed")
    assert detect(DEEPSPEED, ["pretrain.py", "--config", "a.yaml", *argv]) == expected


def test_variables_set_by_hand_may_leave_local_rank_to_the_argument() -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "2000"}
    assert detect(variables, ["--local_rank=1"]) == RankEnvironment(1, 2, 1, 2, "a", 2000, "environment")


def test_a_world_of_one_needs_no_address() -> None:
    found = detect({"RANK": "0", "WORLD_SIZE": "1"})
    assert (found.rank, found.world_size, found.local_size) == (0, 1, 1)
    assert found.master_address == LOCALHOST and found.master_port > 0


def test_srun() -> None:
    found = detect(SRUN)
    assert (found.rank, found.world_size, found.launcher) == (9, 11, "slurm")
    assert (found.local_rank, found.local_size) == (1, 3)
    assert found.master_address == "node08"


def test_all_tasks_of_a_step_agree_and_fill_their_nodes() -> None:
    environments = []
    for rank, (node, local) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]):
        task = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(local),
            "SLURM_NODEID": str(node),
            "SLURM_NTASKS": "6",
            "SLURM_TASKS_PER_NODE": "2,1,3",
        }
        with_node = detect(SRUN | task)
        del task["SLURM_NODEID"]
        without = {name: value for name, value in SRUN.items() if name != "SLURM_NODEID"}
        assert detect(without | task) == with_node
        environments.append(with_node)
    assert len({(e.master_address, e.master_port) for e in environments}) == 1
    assert [e.local_size for e in environments] == [2, 2, 1, 3, 3, 3]


def test_slurm_ports_differ_between_jobs_and_steps_and_are_not_ephemeral() -> None:
    ports = {
        detect(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(4711, 4721)
        for step in range(4)
    }
    assert len(ports) == 40
    assert all(1024 < port < 32768 for port in ports)


def test_a_step_smaller_than_its_allocation_counts_by_itself() -> None:
    step = {
        "SLURM_NTASKS": "11",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "node[09-10]",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
    }
    found = detect(SRUN | step)
    assert (found.rank, found.world_size, found.local_size, found.master_address) == (1, 2, 1, "node09")


def test_srun_on_one_node_needs_no_name_of_it() -> None:
    one_node = {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "0"}
    assert detect(SRUN | one_node).master_address == LOCALHOST


def test_srun_with_tasks_per_node_as_an_option_only() -> None:
    variables = SRUN | {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "12"}
    del variables["SLURM_TASKS_PER_NODE"]
    assert detect(variables).local_size == 4


def test_the_users_master_wins_over_the_derived_one() -> None:
    found = detect(SRUN | {"MASTER_ADDR": "ib-node08", "MASTER_PORT": "2345"})
    assert (found.master_address, found.master_port) == ("ib-node08", 2345)


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": str(0xFFFFFFFB)}, {"SLURM_STEP_ID": str(0xFFFFFFFA)}])
def test_a_job_script_without_srun_is_told_so(step: dict[str, str]) -> None:
    """The batch script and salloc's shell are no steps of srun, also where Slurm numbers them as steps."""
    with pytest.raises(ValueError, match=r"SLURM_NTASKS is 11.*srun in front of"):
        detect(SBATCH | step)


def test_a_job_script_with_one_task_is_one_process() -> None:
    found = detect(SBATCH | {"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"})
    assert (found.world_size, found.launcher) == (1, "none")


@pytest.mark.parametrize("around", [SRUN, SBATCH, {"PMI_RANK": "0", "PMI_SIZE": "2"}])
@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED])
def test_torchrun_and_deepspeed_win_over_what_started_them(
    around: dict[str, str], launcher: dict[str, str]
) -> None:
    assert detect(around | launcher) == detect(launcher)


def test_mpiexec_inside_slurm_is_not_one_of_slurms_tasks() -> None:
    """mpiexec has srun start a daemon per node: SLURM_* count the daemons."""
    daemon = {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_NODEID": "1"}
    master = {"MASTER_ADDR": "node08", "MASTER_PORT": "2345"}
    hydra = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
    assert detect(SRUN | daemon | hydra | master) == RankEnvironment(5, 8, 1, 4, "node08", 2345, "mpi")
    openmpi = {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    }
    assert detect(SRUN | daemon | openmpi | master) == RankEnvironment(5, 8, 1, 4, "node08", 2345, "mpi")


def test_srun_with_its_own_pmi_is_slurm() -> None:
    assert detect(SRUN | {"PMI_RANK": "9", "PMI_SIZE": "11"}) == detect(SRUN)


def test_nothing_set_is_one_process() -> None:
    first = detect({})
    assert first == RankEnvironment(0, 1, 0, 1, LOCALHOST, first.master_port, "none")
    assert 1024 < first.master_port < 65536


@pytest.mark.parametrize(
    ("variables", "argv", "message"),
    [
        (TORCHRUN | {"RANK": "8"}, [], "RANK is 8 and WORLD_SIZE is 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, [], "LOCAL_RANK is 4 and LOCAL_WORLD_SIZE is 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, [], "LOCAL_WORLD_SIZE is 9 and WORLD_SIZE is 8"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, [], "MASTER_PORT is 70000"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, [], "WORLD_SIZE is 'two'"),
        (TORCHRUN, ["--local_rank=2"], "--local_rank is 2 and LOCAL_RANK is 1"),
        (TORCHRUN, ["--local_rank"], "--local_rank is ''"),
        ({"WORLD_SIZE": "2"}, [], "RANK is not set .*WORLD_SIZE is 2"),
        ({"RANK": "1"}, [], "WORLD_SIZE is not set .*RANK is 1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, [], "LOCAL_RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, [], "LOCAL_WORLD_SIZE is not set"),
        ({**DEEPSPEED, "MASTER_ADDR": ""}, [], "MASTER_ADDR is not set"),
        ({}, ["--local_rank=1"], "--local_rank is 1, but RANK and WORLD_SIZE aren't set"),
        (PMI | {"RANK": "0", "WORLD_SIZE": "1"}, [], "WORLD_SIZE is 1.*PMI_SIZE is 4"),
        (PMI | {"RANK": "0", "WORLD_SIZE": "4"}, [], "RANK is 0.*PMI_RANK is 3"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, [], "WORLD_SIZE is 1.*SLURM_NTASKS is 11"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "4(x2)"}, [], "SLURM_TASKS_PER_NODE is '4.x2.', 8 tasks"),
        (SRUN | {"SLURM_NODEID": "3"}, [], "SLURM_NODEID is 3"),
        (SRUN | {"SLURM_LOCALID": "3"}, [], "LOCAL_RANK is 3 and LOCAL_WORLD_SIZE is 3"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, [], "SLURM_PROCID is not set"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS"}, [], "srun --ntasks"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_JOB_NODELIST"}, [], "SLURM_JOB_NODELIST is not set"),
    ],
)
def test_contradictions_name_variable_and_value(
    variables: dict[str, str], argv: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        detect(variables, argv)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node7", "node7"),
        ("a,b-1.cluster", "a b-1.cluster"),
        ("node[01-03,7],gpu5-[1,2]", "node01 node02 node03 node7 gpu5-1 gpu5-2"),
        ("node[098-101]", "node098 node099 node100 node101"),
        ("rack[1-2]n[3-4]-ib", "rack1n3-ib rack1n4-ib rack2n3-ib rack2n4-ib"),
    ],
)
def test_node_lists(text: str, hosts: str) -> None:
    assert parse_nodelist(text) == hosts.split()


@pytest.mark.parametrize("text", ["", "a,,b", "n[1-3", "n1-3]", "n[[1]]", "n[3-1]", "n[a-b]", "n[]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        parse_nodelist(text)


def test_counts() -> None:
    assert parse_counts("4(x2),3") == [4, 4, 3]
    assert parse_counts("8") == [8]
    for text in ("", "4x2", "4(x)", "-1"):
        with pytest.raises(ValueError, match="list of counts"):
            parse_counts(text)


EXPORTED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

LAUNCHERS = ("SLURM_", "PMI_", "OMPI_", "MPI_", "TORCHELASTIC_", "CROSS_")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """os.environ without anything of a launcher, and as it was before afterwards."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    for name in (*EXPORTED, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what export sets
        monkeypatch.delenv(name)
    return monkeypatch


def test_export_sets_what_torch_and_deepspeed_read(environ: pytest.MonkeyPatch) -> None:
    environment = detect(SRUN)
    export(environment)
    assert [os.environ[name] for name in EXPORTED] == [
        *("9", "11", "1", "3", "3", "node08"),
        str(environment.master_port),
    ]
    again = detect(os.environ)
    assert again == replace(environment, launcher="environment")


def test_export_divides_the_cores_among_the_processes_of_a_node(environ: pytest.MonkeyPatch) -> None:
    environ.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    export(RankEnvironment(0, 6, 0, 3, LOCALHOST, 2000, "torchrun"))
    assert os.environ["OMP_NUM_THREADS"] == "5"

    environ.delenv("OMP_NUM_THREADS")
    export(RankEnvironment(0, 99, 0, 33, LOCALHOST, 2000, "torchrun"))
    assert os.environ["OMP_NUM_THREADS"] == "1"

    export(RankEnvironment(0, 1, 0, 1, LOCALHOST, 2000, "none"))
    assert os.environ["OMP_NUM_THREADS"] == "1", "what is set stays"

    environ.delenv("OMP_NUM_THREADS")
    environ.setenv("SLURM_CPUS_PER_TASK", "7")  # Slurm has divided them already
    export(RankEnvironment(0, 6, 0, 3, LOCALHOST, 2000, "slurm"))
    assert os.environ["OMP_NUM_THREADS"] == "7"


PROGRAM = """
import os, sys
from megagpt2.parallel.launch import detect, export
environment = detect(os.environ, sys.argv)
export(environment)
with open(f"rank{environment.rank}.txt", "w") as file:  # a launcher may mix up what its processes print
    print(environment, file=file)
"""


def launch(tmp_path: Path, *command: str) -> list[str]:
    """The RankEnvironments that the processes of this launcher find, in order of rank."""
    tool = Path(sys.executable).parent / command[0]
    if not tool.exists():
        pytest.skip(f"{tool} is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHERS) and name not in (*EXPORTED, "OMP_NUM_THREADS")
    }
    result = subprocess.run(
        [tool, *command[1:], tmp_path / "program.py"],
        env=variables | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [path.read_text().strip() for path in sorted(tmp_path.glob("rank*.txt"))]


def check_two_processes(lines: list[str], launcher: str) -> None:
    assert len(lines) == 2
    shared = set()
    for rank, line in enumerate(lines):
        start = f"RankEnvironment(rank={rank}, world_size=2, local_rank={rank}, local_size=2, "
        assert line.startswith(start)
        shared.add(line.removeprefix(start))
    assert len(shared) == 1
    assert re.fullmatch(rf"master_address='\S+', master_port=\d+, launcher='{launcher}'\)", shared.pop())


def test_real_mpiexec(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    check_two_processes(launch(tmp_path, "mpiexec", "-n", "2", sys.executable), "mpi")


def test_real_mpiexec_with_one_process(tmp_path: Path) -> None:
    [line] = launch(tmp_path, "mpiexec", "-n", "1", sys.executable)
    assert line.startswith("RankEnvironment(rank=0, world_size=1, local_rank=0, local_size=1, ")


def test_real_torchrun(tmp_path: Path) -> None:
    # a port of its own choice, so that tests can run side by side
    arguments = ("--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
    check_two_processes(launch(tmp_path, "torchrun", *arguments), "torchrun")


def test_real_deepspeed(tmp_path: Path) -> None:
    arguments = ("--num_accelerators=2", f"--master_port={free_port()}")
    check_two_processes(launch(tmp_path, "deepspeed", *arguments), "deepspeed")

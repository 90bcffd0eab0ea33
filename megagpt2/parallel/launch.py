"""Which process this is, whoever started it: one RankEnvironment out of six ways of launching.

    RANK, WORLD_SIZE set   torchrun, deepspeed, or a script of the user's. They win over what is around them:
                           `srun torchrun` and `mpiexec deepspeed` start one launcher per node.
    MPI's mpiexec          PMI_* with MPI_LOCAL*, or OMPI_COMM_WORLD_*. Wins over Slurm, which mpiexec uses to
                           start its own daemons.
    Slurm's srun           SLURM_PROCID and the like. PMI_* alone beside them comes from srun too.
    nothing                one process.

The result doesn't depend on which of them it was, and `export` makes the environment say so: DeepSpeed reads
nothing of Slurm's, and would make a world of one out of every task.

No torch here: this runs before anything slow is imported.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagpt2.parallel.slurm import parse_counts, parse_nodelist

LOCALHOST = "127.0.0.1"
NOT_FROM_SRUN = 0xFFFFFFF0
"""Slurm numbers the steps that srun starts from 0; from here on they are its own (batch script, shell)."""


@dataclass(frozen=True)
class RankEnvironment:
    """The place of this process: `rank` of `world_size` in all, `local_rank` of `local_size` on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_address: str
    master_port: int
    launcher: str
    """"torchrun", "deepspeed", "environment", "mpi", "slurm" or "none"."""

    def __post_init__(self) -> None:
        """Raises ValueError where the numbers contradict each other."""
        for name, value, size_name, size in [
            ("RANK", self.rank, "WORLD_SIZE", self.world_size),
            ("LOCAL_RANK", self.local_rank, "LOCAL_WORLD_SIZE", self.local_size),
        ]:
            if not 0 <= value < size:
                raise ValueError(
                    f"{name} is {value} and {size_name} is {size} (launcher: {self.launcher}), but {name} "
                    f"counts from 0 to {size_name} - 1. Start all with one launcher: srun, mpiexec, torchrun "
                    "or deepspeed"
                )
        if self.local_size > self.world_size:
            raise ValueError(
                f"LOCAL_WORLD_SIZE is {self.local_size} and WORLD_SIZE is {self.world_size} (launcher: "
                f"{self.launcher}), but a node can't hold more than all. Unset the one that is left over"
            )
        if not 0 < self.master_port < 65536:
            raise ValueError(f"MASTER_PORT is {self.master_port}: set a free port between 1024 and 65535")


def detect(environ: Mapping[str, str], argv: Sequence[str] = ()) -> RankEnvironment:
    """Reads the place of this process from what its launcher left.

    Under mpiexec with more than one process this is a collective call: rank 0 tells the others its address.

    Args:
        environ: the environment, usually `os.environ`.
        argv: the command line; launchers append `--local_rank=N` (or `--local-rank`).

    Raises:
        ValueError: the variables contradict each other, or one is missing; or this is the script of a Slurm
            job with several tasks that wasn't started with srun.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_variables(environ, argv)
    if "OMPI_COMM_WORLD_SIZE" in environ or "MPI_LOCALNRANKS" in environ:
        return _from_mpi(environ)
    if _in_slurm_step(environ):
        return _from_slurm(environ)
    if "PMI_SIZE" in environ:
        return _from_mpi(environ)

    tasks = _optional(environ, "SLURM_NTASKS") or 1
    if tasks > 1:
        raise ValueError(
            f"SLURM_NTASKS is {tasks}, but this process wasn't started with srun and would train alone. Put "
            "srun in front of the command in the job script; for one process on purpose: srun --ntasks=1"
        )
    local_rank = _local_rank_argument(argv)
    if local_rank:
        raise ValueError(
            f"--local_rank is {local_rank}, but RANK and WORLD_SIZE aren't set, which a launcher would do. "
            "Start with torchrun, deepspeed, srun or mpiexec, or leave --local_rank out"
        )
    return RankEnvironment(0, 1, 0, 1, LOCALHOST, free_port(), "none")


def export(environment: RankEnvironment) -> None:
    """Writes the result into os.environ, where torch, DeepSpeed and child processes read it.

    OMP_NUM_THREADS, where nobody set it, becomes this process's share of the node's cores: without it every
    process starts as many threads as there are cores.
    """
    os.environ.update(
        RANK=str(environment.rank),
        WORLD_SIZE=str(environment.world_size),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_SIZE=str(environment.local_size),
        LOCAL_WORLD_SIZE=str(environment.local_size),
        MASTER_ADDR=environment.master_address,
        MASTER_PORT=str(environment.master_port),
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(_share_of_cores(environment, os.environ)))


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _share_of_cores(environment: RankEnvironment, environ: Mapping[str, str]) -> int:
    if environment.launcher == "slurm" and "SLURM_CPUS_PER_TASK" in environ:
        return max(1, _required(environ, "SLURM_CPUS_PER_TASK", "slurm"))
    # the cores this process may use, which in a container or a Slurm job aren't all of the machine's
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // environment.local_size)


def _from_variables(environ: Mapping[str, str], argv: Sequence[str]) -> RankEnvironment:
    launcher = "environment"
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_RANK" in environ:
        launcher = "deepspeed"
    rank, world_size = (_required(environ, name, launcher) for name in ("RANK", "WORLD_SIZE"))
    if launcher == "environment":
        _check_against_processes(environ, rank, world_size)

    argument = _local_rank_argument(argv)
    local_rank = _optional(environ, "LOCAL_RANK")
    if None not in (argument, local_rank) and argument != local_rank:
        raise ValueError(f"--local_rank is {argument} and LOCAL_RANK is {local_rank}: leave --local_rank out")
    local_rank = argument if local_rank is None else local_rank
    local_size = _optional(environ, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    address, port = environ.get("MASTER_ADDR"), _optional(environ, "MASTER_PORT")
    if world_size == 1:
        local_rank, local_size = local_rank or 0, local_size or 1
        address, port = address or LOCALHOST, port or free_port()
    if local_rank is None or local_size is None:
        missing = "LOCAL_RANK" if local_rank is None else "LOCAL_WORLD_SIZE"
        raise ValueError(
            f"{missing} is not set, but RANK is {rank} and WORLD_SIZE is {world_size}. Set LOCAL_RANK (which "
            "process of its node) and LOCAL_WORLD_SIZE (processes on the node), or start with torchrun"
        )
    if not address or port is None:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise ValueError(
            f"{missing} is not set, but WORLD_SIZE is {world_size}. Set MASTER_ADDR to the host of rank 0 "
            "and MASTER_PORT to a free port on it, the same for all processes"
        )
    return RankEnvironment(rank, world_size, local_rank, local_size, address, port, launcher)


def _check_against_processes(environ: Mapping[str, str], rank: int, world_size: int) -> None:
    """RANK and WORLD_SIZE that no launcher vouches for, against how many processes were really started."""
    started = [("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")]
    if _in_slurm_step(environ):
        started.append(("SLURM_PROCID", "SLURM_NTASKS"))
    for rank_name, size_name in started:
        for name, value, other_name in [("WORLD_SIZE", world_size, size_name), ("RANK", rank, rank_name)]:
            other = _optional(environ, other_name)
            if other is not None and other != value:
                raise ValueError(
                    f"{name} is {value}, but {other_name} is {other}. Unset RANK and WORLD_SIZE (left over "
                    "from another run?), so that the launcher's own numbers count"
                )


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process: a job script has the job's variables, but no step of its own."""
    step = _optional(environ, "SLURM_STEP_ID")
    return step is not None and step < NOT_FROM_SRUN


def _from_slurm(environ: Mapping[str, str]) -> RankEnvironment:
    world_size = _optional(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if world_size is None:
        raise ValueError("SLURM_STEP_ID is set, but SLURM_NTASKS isn't: start with srun --ntasks=N")
    rank = _required(environ, "SLURM_PROCID", "slurm")
    local_rank = _required(environ, "SLURM_LOCALID", "slurm")
    local_size = _slurm_local_size(environ, rank, world_size)
    if world_size == local_size:
        address = environ.get("MASTER_ADDR") or LOCALHOST
    else:
        address = environ.get("MASTER_ADDR") or _first_slurm_node(environ)
    port = _optional(environ, "MASTER_PORT")
    if port is None:
        port = free_port() if world_size == 1 else _slurm_port(environ)
    return RankEnvironment(rank, world_size, local_rank, local_size, address, port, "slurm")


def _slurm_local_size(environ: Mapping[str, str], rank: int, world_size: int) -> int:
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name not in environ:
            continue
        counts = parse_counts(environ[name])
        if sum(counts) != world_size:
            raise ValueError(
                f"{name} is {environ[name]!r}, {sum(counts)} tasks in all, but the step has {world_size}. "
                "Start the processes with one srun whose --ntasks and --ntasks-per-node agree"
            )
        node = _optional(environ, "SLURM_NODEID")
        if node is None:  # tasks fill one node after the other unless srun was told otherwise
            node = next(n for n in range(len(counts)) if rank < sum(counts[: n + 1]))
        if node >= len(counts):
            raise ValueError(f"SLURM_NODEID is {node}, but {name} is {environ[name]!r}, {len(counts)} nodes")
        return counts[node]
    return min(world_size, _optional(environ, "SLURM_NTASKS_PER_NODE") or world_size)


def _first_slurm_node(environ: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return parse_nodelist(environ[name])[0]
    raise ValueError("SLURM_JOB_NODELIST is not set: set MASTER_ADDR to the host of rank 0")


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port that every task computes alike, another one for each job and step, below the ephemeral ports."""
    job = _required(environ, "SLURM_JOB_ID", "slurm")
    return 12_000 + (16 * job + (_optional(environ, "SLURM_STEP_ID") or 0)) % 20_000


def _from_mpi(environ: Mapping[str, str]) -> RankEnvironment:
    prefix = "OMPI_COMM_WORLD" if "OMPI_COMM_WORLD_SIZE" in environ else "PMI"
    rank, world_size = (_required(environ, f"{prefix}_{name}", "mpi") for name in ("RANK", "SIZE"))
    local_rank = _optional(environ, "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    local_size = _optional(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    address, port = environ.get("MASTER_ADDR"), _optional(environ, "MASTER_PORT")
    if world_size == 1:
        return RankEnvironment(0, 1, 0, 1, address or LOCALHOST, port or free_port(), "mpi")
    if None in (local_rank, local_size, port) or not address:
        found = _agree_over_mpi(rank, world_size, f"{prefix}_SIZE")
        local_rank = found.local_rank if local_rank is None else local_rank
        local_size = found.local_size if local_size is None else local_size
        address, port = address or found.master_address, port or found.master_port
    return RankEnvironment(rank, world_size, local_rank, local_size, address, port, "mpi")


def _agree_over_mpi(rank: int, world_size: int, size_name: str) -> RankEnvironment:
    """Rank 0 tells its address and a free port; who shares a node comes out of a split.

    MPI is left again at once. Finalized only when the interpreter exits, one process that dies of an error
    would wait there for the others, and they for it.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    assert not MPI.Is_finalized(), "detect is called once per process; export keeps its result"
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    try:
        world = MPI.COMM_WORLD
        if (world.Get_rank(), world.Get_size()) != (rank, world_size):
            raise ValueError(
                f"{size_name} is {world_size}, but mpi4py sees {world.Get_size()}: it uses another MPI than "
                "the mpiexec that started the processes. Use the mpiexec beside this python, or build mpi4py "
                "for yours: pip install --force-reinstall --no-binary mpi4py mpi4py"
            )
        node = world.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank, local_size = node.Get_rank(), node.Get_size()
        node.Free()
        address = LOCALHOST if local_size == world_size else socket.gethostname()
        address, port = world.bcast((address, free_port()) if rank == 0 else None)
    finally:
        if ours:
            MPI.Finalize()
    return RankEnvironment(rank, world_size, local_rank, local_size, address, port, "mpi")


def _local_rank_argument(argv: Sequence[str]) -> int | None:
    """The value of --local_rank or --local-rank; -1, an old way of saying nothing, counts as none."""
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            continue
        if not equals:
            value = argv[position + 1] if position + 1 < len(argv) else ""
        number = _integer(name, value)
        return None if number == -1 else number
    return None


def _required(environ: Mapping[str, str], name: str, launcher: str) -> int:
    if name not in environ:
        others = sorted({"RANK", "WORLD_SIZE", "SLURM_PROCID", "PMI_RANK"} & set(environ))
        beside = f", but {', '.join(f'{other} is {environ[other]}' for other in others)}" if others else ""
        raise ValueError(
            f"{name} is not set (launcher: {launcher}){beside}. Set it, or unset the others and start the "
            "processes with srun, mpiexec, torchrun or deepspeed"
        )
    return _integer(name, environ[name])


def _optional(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is set."""
    return next((_integer(name, environ[name]) for name in names if environ.get(name)), None)


def _integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}, which is not a whole number") from None

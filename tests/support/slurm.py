"""A Slurm cluster of two nodes on this machine: one controller, one slurmd a node, no authentication.

It needs Slurm's programs (Debian: slurm-wlm), and root, as whom slurmd starts a job's processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from megagpt2.parallel.launch import free_port

_PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "sinfo")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm)"
    return None if os.geteuid() == 0 else "slurmd needs root"


@contextlib.contextmanager
def cluster(folder: Path, limit: float = 30.0) -> Iterator[dict[str, str]]:
    """The environment in which srun and sbatch find the cluster, as long as it is up."""
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(
        host=socket.gethostname().split(".")[0], folder=folder, controller=free_port(), first=free_port(),
        second=free_port(),
    ))
    # The nodes' names resolve nowhere: the job is told the address which a cluster's would lead to.
    environment = {"SLURM_CONF": str(configuration), "MASTER_ADDR": "127.0.0.1"}
    options = {"env": os.environ | environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    started = [subprocess.Popen(daemon, **options) for daemon in daemons]
    try:
        deadline = time.monotonic() + limit
        while _idle_nodes(options["env"]) < 2:
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in started):
                logs = "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("*.log")))
                raise RuntimeError(f"the Slurm cluster did not come up:\n{logs}")
            time.sleep(0.1)
        yield environment
    finally:
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in started:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _idle_nodes(environment: dict[str, str]) -> int:
    found = subprocess.run(
        ["sinfo", "--noheader", "--states=idle", "--format=%D"], env=environment, capture_output=True, text=True,
        check=False,
    )
    return sum(map(int, found.stdout.split())) if found.returncode == 0 else 0

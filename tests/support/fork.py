"""Python programs as processes that begin with torch and DeepSpeed imported.

Imports take 4 to 5 s of a core in every process that trains, and the tests of whole runs start some forty. So a server
imports once and forks: a process of its own for each program, with its own environment, arguments, files and session,
which imports megagpt2 and the program anew. Only what Python and the libraries draw or read when they are imported is
the server's: the seed of hashes, OMP_NUM_THREADS, DS_ACCELERATOR. tests/integration/test_launchers.py and the fixture
`finished` start programs the long way.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from unittest.mock import patch

# What every run imports, at its start, with the first engine (Dynamo, Inductor) and for the monitor.
_IMPORTS = [
    "megagpt2.parallel.quiet_deepspeed", "torch._dynamo", "torch._inductor.compile_fx", "torch.utils.tensorboard",
    "safetensors.torch", "pydantic", "pytest",
]


class Forked:
    """`python PROGRAM ARGUMENTS` as subprocess.Popen starts it, with what of Popen the tests use."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], stdout, stderr) -> None:
        """stdout, stderr: open files."""
        self.args, (_, program, *arguments) = args, args
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTS)
        with patch.dict(os.environ, env, clear=True):  # the server's too, if this starts it
            forkserver.ensure_running()
        self._process = context.Process(
            target=_become, args=(program, arguments, dict(env), _Descriptor(stdout), _Descriptor(stderr))
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As Popen's: negative for a signal."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _Descriptor:
    """An open file, which is its descriptor's number in the new process."""

    def __init__(self, file) -> None:
        self._file = file

    def __reduce__(self):
        return reduction.DupFd(self._file.fileno()).detach, ()


def _become(program: str, arguments: list[str], environment: dict[str, str], stdout: int, stderr: int) -> None:
    """In the new process: what Python does to run a program."""
    assert set(_IMPORTS) <= sys.modules.keys(), "the server could not import what it should"
    assert not any(name.startswith("megagpt2.kernels") for name in sys.modules), "it reads the environment"
    os.setsid()
    for descriptor, place in ((stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(Path(program).parent))
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # processes of multiprocessing leave without them

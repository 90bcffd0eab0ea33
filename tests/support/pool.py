"""One pool of gloo worker processes for a whole pytest session.

Importing torch and DeepSpeed in four processes takes 15 to 20 s on two cores, so they are started once and
handed jobs: a function by name, its arguments, and the number of ranks. Every job gets a process group of its own.

    pytest  --pipe-->  worker 0 .. n-1:   init_process_group(n) -> function(**arguments) -> result -> destroy

A job that fails on any rank fails the test with that rank's traceback; workers that hang are killed and the
pool starts anew.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import wait

import psutil
from torch.distributed import TCPStore

_START = 120.0  # seconds for the workers to import everything
_MOST_THREADS = 250  # of a worker: DeepSpeed's ZeRO-3 never lets go of its groups, and each has threads


def _reset_deepspeed() -> None:
    """DeepSpeed keeps its world in module globals and never resets them: a second world needs it done."""
    import deepspeed.comm.comm as comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    comm.cdb = None
    for name, value in vars(groups).items():
        if name.isupper() and name.startswith("_") and not callable(value):
            setattr(groups, name, {} if isinstance(value, dict) else None)
    groups.mpu = None
    # ZeRO-3 numbers modules and parameters through the life of a process, and compares the numbers across ranks.
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def _serve(rank: int, pipe) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megagpt2.parallel.quiet_deepspeed import deepspeed

    pipe.send(("ready", None))
    while (job := pipe.recv()) is not None:
        function, arguments, world, port = job
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        try:
            _reset_deepspeed()
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, auto_mpi_discovery=False,
                                       verbose=False)
            module, name = function.rsplit(":", 1)
            result = getattr(importlib.import_module(module), name)(**arguments)
            dist.barrier()
            answer = ("done", result)
        except BaseException:  # whatever it was, the test must see it
            answer = ("failed", traceback.format_exc())
        finally:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
            gc.collect()  # engines are cycles of references, which keep their groups' threads
        pipe.send((*answer, threads_of_this_process()))


def threads_of_this_process() -> int:
    """Threads of this process, gloo's included."""
    return psutil.Process().num_threads()


class Pool:
    """Worker processes that run jobs together; as many are started as a job has needed so far."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list = []

    def start(self, ranks: int) -> None:
        """Have at least that many workers."""
        context = multiprocessing.get_context("spawn")
        present = len(self.workers)
        for rank in range(present, ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        for _, pipe in self.workers[present:]:
            if not pipe.poll(_START):
                self.stop()
                raise RuntimeError(f"the workers did not start within {_START:.0f} s")
            pipe.recv()

    def stop(self) -> None:
        for _, pipe in self.workers:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process, _ in self.workers:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.workers = []

    def run(self, function: str, ranks: int, timeout: float = 180.0, **arguments) -> list:
        """`module:function` on that many ranks, all with the same arguments; the results by rank."""
        if ranks > self.size:
            raise ValueError(f"{ranks} ranks asked of a pool of {self.size}")
        self.start(ranks)
        # Here, where it listens before its port is told: one that is chosen and then opened may be taken meanwhile.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipes = [pipe for _, pipe in self.workers[:ranks]]
        for pipe in pipes:
            pipe.send((function, arguments, ranks, store.port))
        answers: dict[int, tuple] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < ranks:
            waiting = [pipe for index, pipe in enumerate(pipes) if index not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                try:
                    answer = pipe.recv()
                except EOFError:
                    answer = ("failed", "the worker process died", 0)
                answers[pipes.index(pipe)] = answer
                if answer[0] == "failed":  # the others may wait for it for ever: give them a moment, not the timeout
                    deadline = min(deadline, time.monotonic() + 5.0)
        failures = {rank: text for rank, (status, text, _) in answers.items() if status == "failed"}
        if failures or len(answers) < ranks:
            for process, _ in self.workers:
                process.kill()
            self.stop()
            missing = sorted(set(range(ranks)) - set(answers))
            report = "\n".join(f"--- rank {rank}\n{text}" for rank, text in failures.items())
            raise AssertionError(f"{function} on {ranks} ranks failed; no answer from ranks {missing}\n{report}")
        if max(threads for _, _, threads in answers.values()) > _MOST_THREADS:
            self.stop()
        return [answers[rank][1] for rank in range(ranks)]

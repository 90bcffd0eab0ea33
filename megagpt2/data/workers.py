"""Pass 1 of corpus preparation: text to tokens, in as many processes as wanted.

The parent cuts the input into tasks, workers turn each into shuffled-bucket files on disk and report
counts and problems. Everything that crosses between processes is small.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt2.data.indexed import storage_dtype
from megagpt2.data.readers import Piece, UnitState, read_unit
from megagpt2.data.shuffle import MAX_DOCUMENT, BucketWriter
from megagpt2.data.sources import Problem, ReadOptions, Unit
from megagpt2.data.tokenizer import Tokenizer

COUNT_EVERY = 1 << 20  # bytes between two updates of the shared counters
# fork would copy the locks of other threads, which the tokenizers library has, in whatever state they are.
START_METHOD = "spawn"


@dataclass(frozen=True)
class Job:
    """What every worker must know. Pickled once per worker."""

    tokenizer: Tokenizer
    read: ReadOptions
    directory: Path
    seed: int
    bits: int
    append_eot: bool
    stop_on_error: bool


@dataclass
class Outcome:
    """What came of one task. lines: of each unit. problems: with the number of their unit in the task."""

    lines: list[int] = field(default_factory=list)
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0


class Counters:
    """Bytes read, tokens made, and the wish to stop, shared between processes."""

    def __init__(self, context: Any = None) -> None:
        context = context or multiprocessing.get_context(START_METHOD)
        self._bytes, self._tokens, self._stop = (context.Value(kind, 0) for kind in "qqb")
        self.on_change: Callable[[], None] | None = None  # the in-process worker's way to move the bar

    def __getstate__(self) -> tuple[Any, ...]:
        return self._bytes, self._tokens, self._stop

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._bytes, self._tokens, self._stop = state
        self.on_change = None

    def add(self, count: int, tokens: int) -> None:
        """Count bytes and tokens."""
        for value, amount in ((self._bytes, count), (self._tokens, tokens)):
            with value.get_lock():
                value.value += amount
        if self.on_change is not None:
            self.on_change()

    def read(self) -> tuple[int, int]:
        """(bytes, tokens) so far."""
        return self._bytes.value, self._tokens.value

    def stop(self) -> None:
        """Ask workers to leave their task at the next document."""
        self._stop.value = 1

    @property
    def stopped(self) -> bool:
        """Whether stop() was called, in any process."""
        return bool(self._stop.value)


class Worker:
    """Tokenizes tasks into its own bucket files."""

    def __init__(self, job: Job, counters: Counters) -> None:
        self._job, self._counters = job, counters
        dtype = storage_dtype(job.tokenizer.vocabulary_size)
        self._buckets = BucketWriter(job.directory, str(os.getpid()), job.seed, job.bits, dtype)
        self._pending_bytes = self._pending_tokens = 0

    def run(self, units: list[Unit]) -> Outcome:
        """Read and tokenize `units`. With stop_on_error the first problem ends everything."""
        outcome = Outcome()
        for number, unit in enumerate(units):
            state = UnitState(self._advance)
            for event in read_unit(unit, self._job.read, state):
                if self._counters.stopped:
                    self._buckets.abort()
                    return outcome
                problem = self._take(event, unit, outcome, state)
                if problem is not None:
                    self._buckets.abort()
                    outcome.problems.append((number, problem))
                    if self._job.stop_on_error:
                        outcome.lines.append(state.lines)
                        self._counters.stop()
                        return outcome
            outcome.lines.append(state.lines)
        self._buckets.flush()
        self._count()
        return outcome

    def _take(self, event: Any, unit: Unit, outcome: Outcome, state: UnitState) -> Problem | None:
        if isinstance(event, Problem):
            return event
        if isinstance(event, Piece):
            ids = self._job.tokenizer.encode(event.text)
            self._buckets.write(unit.file, event.identity, ids)
            self._pending_tokens += len(ids)
            return None
        if self._buckets.length > MAX_DOCUMENT:
            detail = f"{self._buckets.length} tokens in one document, over the format's {MAX_DOCUMENT}"
            return Problem(unit.source.path, state.line or None, "too_long", detail)
        if self._job.append_eot:
            self._buckets.write(unit.file, event.identity, [self._job.tokenizer.end_of_text])
        outcome.tokens += self._buckets.end()
        outcome.documents += 1
        return None

    def _advance(self, count: int) -> None:
        self._pending_bytes += count
        if self._pending_bytes >= COUNT_EVERY:
            self._count()

    def _count(self) -> None:
        self._counters.add(self._pending_bytes, self._pending_tokens)
        self._pending_bytes = self._pending_tokens = 0

    def close(self) -> None:
        """Close the bucket files."""
        self._buckets.close()


def run_tasks(
    job: Job, tasks: Iterable[list[Unit]], workers: int, on_progress: Callable[[int, int], None]
) -> Iterator[tuple[int, list[Unit], Outcome]]:
    """(number of the task, its units, outcome) as they complete, which is in no particular order.

    Ends early after a problem if job.stop_on_error. One worker runs in this process. Raises RuntimeError if a
    worker process dies.
    """
    counters = Counters()
    if workers == 1:
        counters.on_change = lambda: on_progress(*counters.read())
        worker = Worker(job, counters)
        try:
            for number, units in enumerate(tasks):
                yield number, units, worker.run(units)
                if counters.stopped:
                    return
        finally:
            worker.close()
    else:
        yield from _run_in_pool(job, tasks, workers, counters, on_progress)


def _run_in_pool(
    job: Job,
    tasks: Iterable[list[Unit]],
    workers: int,
    counters: Counters,
    on_progress: Callable[[int, int], None],
) -> Iterator[tuple[int, list[Unit], Outcome]]:
    context = multiprocessing.get_context(START_METHOD)
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, counters))
    waiting: dict[Future[Outcome], tuple[int, list[Unit]]] = {}
    numbered = enumerate(tasks)
    try:
        while True:
            # Only a few tasks ahead of the workers: a million files shall not become a million futures.
            while len(waiting) < 3 * workers and not counters.stopped:
                number, units = next(numbered, (-1, []))
                if not units:
                    break
                waiting[executor.submit(_run_in_worker, units)] = (number, units)
            if not waiting:
                return
            done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            on_progress(*counters.read())
            for future in done:
                number, units = waiting.pop(future)
                yield number, units, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, most likely killed for memory; "
            "use fewer --workers or a machine with more memory"
        ) from error
    finally:
        counters.stop()
        executor.shutdown(wait=True, cancel_futures=True)


# The worker of this process. A pool's initializer has nowhere else to leave it for the tasks that follow.
_WORKER: list[Worker] = []


def _start_worker(job: Job, counters: Counters) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _WORKER[:] = [Worker(job, counters)]
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    """A parent that was killed can't end its workers, and their queue never closes."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _run_in_worker(units: list[Unit]) -> Outcome:
    return _WORKER[0].run(units)

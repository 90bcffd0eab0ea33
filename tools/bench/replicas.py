"""--check-replicas: what comparing all that two data-parallel ranks hold alike costs, beside a training step.

GPT-2's 117M (or a smaller one) at a short sequence, fp32, two processes. The share is that of a run that compares
every 100 steps; the shorter the step, the larger it is: here it has 2 x 128 tokens, in a real run hundreds of
thousands.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from common import Row, add_size, arguments, preset_117m, report

from tests.support.pool import Pool

EVERY = 100


def timed(layers: int, width: int, repetitions: int, threads: int) -> tuple[float, float, int]:
    """A job on each rank, with so many threads: median seconds of a step and of a comparison, bytes compared."""
    from megagpt2.training.replicas import check_replicas
    from tests.support.train import start

    torch.set_num_threads(threads)
    config = preset_117m(layers, width, sequences=2, length=128, micro_batch=1)
    engine, step, batches = start(config)
    size = config.batch.global_batch
    seconds: dict[str, list[float]] = {"step": [], "check": []}
    for number in range(repetitions + 1):
        begin = time.perf_counter()
        step(batches.global_batch(number * size, size), engine.plan.accumulation, 1e-4)
        between = time.perf_counter()
        check_replicas(engine.module, engine.topology)
        if number:  # the first round warms up
            seconds["step"].append(between - begin)
            seconds["check"].append(time.perf_counter() - between)
    held = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    engine.close()
    return statistics.median(seconds["step"]), statistics.median(seconds["check"]), held


def main() -> int:
    parser = arguments(__doc__, repetitions=5)
    add_size(parser)
    parser.set_defaults(threads=max(1, torch.get_num_threads() // 2))  # of each of the two processes
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pool = Pool(2)
    try:
        job = {name: getattr(options, name) for name in ("layers", "width", "repetitions", "threads")}
        step, check, held = pool.run("tools.bench.replicas:timed", 2, timeout=600.0, **job)[0]
    finally:
        pool.stop()
    case = f"{options.layers} layers of {options.width}, 2 replicas"
    report([
        Row("replicas", case, "step", step, "s", higher_is_better=False),
        Row("replicas", case, "comparison", check, "s", higher_is_better=False),
        Row("replicas", case, "compared", held / check / 1e9, "GB/s"),
        Row("replicas", case, f"share at N={EVERY}", 100 * check / (EVERY * step + check), "%",
            higher_is_better=False, limit=1.0),
    ], options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

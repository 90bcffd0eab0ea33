"""Saving: how long training stands still for a checkpoint, beside a blocking torch.save of the same state, and how
much of training is lost until the checkpoint is complete.

GPT-2's 117M (or a smaller one) in one process, fp32: weights and Adam's moments, 1.5 GB. The stall is the time that
the loop is held: to note what there is, and before the next update if the copy is not made by then. What is lost is how
much longer the steps take that run while the checkpoint is copied, hashed, written and synced. torch.save neither
hashes nor syncs.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from common import Row, add_size, arguments, preset_117m, report

from tests.support.pool import Pool

LEAST = 20  # times as long as ours training stands still for torch.save, at least


def timed(layers: int, width: int, repetitions: int, threads: int, folder: str) -> dict[str, list[float]]:
    """A job: seconds of steps, of torch.save, of the stall, until a checkpoint is complete, and what is lost by then;
    and the bytes of a checkpoint."""
    from megagpt2.checkpoint.saver import Saver
    from megagpt2.run.material import Material
    from megagpt2.run.resume import load_state, snapshot
    from megagpt2.run.saving import RunSaving
    from megagpt2.training.loop import Progress
    from tests.support.train import start

    torch.set_num_threads(threads)
    engine, step, batches = start(preset_117m(layers, width, sequences=2, length=256, micro_batch=2))
    load_state(engine, None)
    material = Material(SimpleNamespace(tokens=batches.tokens, manifest=None), None, None)
    saver = Saver(Path(folder) / "checkpoints", engine.topology, None, asynchronous=True)
    saving = RunSaving(saver, engine, material, automatic=True)
    step.before_update = saver.before_update
    size, number = engine.config.batch.global_batch, 0
    found: dict[str, list[float]] = {name: [] for name in ("step", "torch.save", "stall", "complete", "lost", "bytes")}

    def one_step() -> float:
        nonlocal number
        begin = time.perf_counter()
        step(batches.global_batch(number * size, size), engine.plan.accumulation, 1e-4)
        number += 1
        return time.perf_counter() - begin

    def blocking() -> float:
        state = snapshot(engine, Progress(number), material)
        begin = time.perf_counter()
        torch.save({"weights": list(state.weight_values), "optimizer": list(state.slices.values)}, f"{folder}/state.pt")
        return time.perf_counter() - begin

    one_step()
    for _ in range(repetitions):
        usual = [one_step() for _ in range(3)]
        found["step"].append(statistics.median(usual))
        found["torch.save"].append(blocking())
        one_step()
        saving.save(Progress(number))
        during, outcome = [], None
        while outcome is None:
            during.append(one_step())
            outcome = saver.outcome()
        assert outcome.error is None and saver.asynchronous, outcome.error
        found["stall"].append(outcome.held)
        found["complete"].append(outcome.seconds)
        found["lost"].append(max(sum(during) - len(during) * statistics.median(usual), 1e-9))
        found["bytes"].append(snapshot(engine, Progress(number), material).bytes())
        shutil.rmtree(outcome.folder)
    engine.close()
    return found


def main() -> int:
    parser = arguments(__doc__, repetitions=3)
    add_size(parser)
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to write (default: the temporary folder)")
    options = parser.parse_args()
    pool = Pool(1)
    try:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            job = {name: getattr(options, name) for name in ("layers", "width", "repetitions", "threads")}
            found = pool.run("tools.bench.checkpoint:timed", 1, timeout=1800.0, folder=folder, **job)[0]
    finally:
        pool.stop()
    middle = {name: statistics.median(values) for name, values in found.items()}
    case, save = f"{options.layers} layers of {options.width} fp32", middle["torch.save"]
    report([
        Row("checkpoint", case, "size", middle["bytes"] / 1e9, "GB"),
        Row("checkpoint", case, "step", middle["step"], "s", higher_is_better=False),
        Row("checkpoint", case, "stall", middle["stall"], "s", False, {"torch.save": save}, save / LEAST),
        Row("checkpoint", case, "until complete", middle["complete"], "s", higher_is_better=False),
        Row("checkpoint", case, "training lost", middle["lost"], "s", False, {"torch.save": save}),
    ], options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

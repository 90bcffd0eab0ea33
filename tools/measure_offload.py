"""Peak memory and time of a few steps with offload: one process, random tokens, a folder that is removed afterwards.

    python tools/measure_offload.py --config configs/gpt2_1542m_offload.yaml --folder /local/disk [field.path=value ...]

Runs launch/pretrain.py, reads the resident memory of the whole process tree ten times a second, and prints one line of
JSON. --limit GIB ends the run where it needs more. Exit code: the run's, or 1 at the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megagpt2.config import load_config
from megagpt2.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parents[1]
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(process: int) -> int:
    """Bytes of a process and its children; what they share is counted for each."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        tasks = Path(f"/proc/{process}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except (OSError, ValueError, IndexError):
        return 0  # it ended meanwhile
    return pages * _PAGE + sum(resident(child) for child in children)


def write_random_corpus(prefix: Path, vocabulary: int, tokens: int) -> Path:
    with IndexedWriter(prefix, vocabulary_size=vocabulary) as writer:
        writer.manifest = {"vocabulary_size": vocabulary}
        writer.append(np.random.default_rng(0).integers(0, vocabulary, tokens))
    return prefix


def measure(command: list[str], limit: float) -> tuple[int, int, float]:
    """(exit code, peak bytes, seconds) of a command, which is killed above `limit` bytes."""
    begin, peak = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr, start_new_session=True) as process:
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            if peak > limit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return 1, peak, time.perf_counter() - begin
            time.sleep(0.1)
    return process.returncode, peak, time.perf_counter() - begin


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE")
    parser.add_argument("--folder", required=True, type=Path, help="a folder on a local disk")
    parser.add_argument("--limit", type=float, default=20.0, metavar="GIB", help="resident memory, default 20")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    arguments = parser.parse_intermixed_args(argv)
    vocabulary = load_config(arguments.config, arguments.overrides).model.vocabulary
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        corpus = write_random_corpus(Path(folder) / "random", vocabulary, 100_000)
        run = Path(folder) / "run"
        settings = [
            f"data.train={corpus}", "data.valid=null", "data.tokenizer=null", "validation.every=0",
            "monitor.sample_every=0", f"run.directory={run}", f"offload.nvme_path={folder}/nvme", *arguments.overrides,
        ]
        program = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", str(arguments.config.absolute())]
        code, peak, seconds = measure([*program, *settings], arguments.limit * 2**30)
        log = run / "log.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        steps = [row for row in rows if "seconds_step" in row]
        print(json.dumps({
            "parameters": load_config(arguments.config, arguments.overrides).model.parameters(),
            "peak_gib": round(peak / 2**30, 2), "seconds": round(seconds), "exit": code,
            "seconds_per_step": [round(row["seconds_step"], 1) for row in steps],
            "seconds_optimizer": [round(row["seconds_optimizer"], 1) for row in steps],
            "losses": [row["loss"] for row in steps],
        }))
    return code


if __name__ == "__main__":
    sys.exit(main())

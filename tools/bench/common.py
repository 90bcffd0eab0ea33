"""What the benchmarks share: the machine, fair timing, one table, one JSON schema (DESIGN section 10).

A benchmark is a script beside this file, NAME.py, that calls `arguments` and `report`; `make bench` runs all of them.

Machines are shared and noisy: the cases are timed in turns and medians are reported, with peers and the
machine's limit from the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # also works in a checkout that isn't installed

from megagpt2.kernels.extension import EXTENSION  # noqa: E402
from tools import sections  # noqa: E402

_SHORTEST = {"cpu": 2e-3, "cuda": 20e-3}  # seconds: what is faster is repeated within one measurement


@dataclass(frozen=True)
class Row:
    """One measured number. peers: the same number for other ways to do it; limit: the best this machine could do."""

    bench: str
    case: str
    metric: str
    value: float
    unit: str
    higher_is_better: bool = True
    peers: dict[str, float] = field(default_factory=dict)
    limit: float | None = None


class _Parser(argparse.ArgumentParser):
    """Refuses before anything is measured to put a part of a table in a whole one's place."""

    def parse_args(self, *arguments, **keywords) -> argparse.Namespace:
        options = super().parse_args(*arguments, **keywords)
        if options.update is not None:
            cut = [
                f"--{name}" for name, value in vars(options).items()
                if name not in _HOW and value != self.get_default(name)
            ]
            if cut:
                self.error(f"--update writes the whole table, not that of {' '.join(cut)}: leave one of them out")
            if why := sections.problem(options.update, section_of(options)):
                self.error(f"--update: {why}")
        return options


_HOW = frozenset({"json", "update", "repetitions", "threads", "device", "compile"})  # none says what is measured


def section_of(options: argparse.Namespace) -> str:
    """The name of the table's place in a page: that of the benchmark, NAME_cuda on a GPU."""
    return Path(sys.argv[0]).stem + ("_cuda" if getattr(options, "device", "cpu") == "cuda" else "")


def arguments(description: str, repetitions: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark understands."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    begin, end = sections.marks(Path(sys.argv[0]).stem)
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help=f"also write the table there, between {begin} and {end}"
    )
    parser.add_argument("--repetitions", type=int, default=repetitions, metavar="N", help="medians of N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of torch")
    return parser


def add_size(parser: argparse.ArgumentParser) -> None:
    """--layers and --width, of the model of `preset_117m`."""
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="instead of 12")
    parser.add_argument("--width", type=int, default=768, metavar="N", help="instead of 768: a multiple of 64")


def preset_117m(layers: int, width: int, sequences: int, length: int, micro_batch: int):
    """GPT-2's 117M with so many layers of another width, for steps of a few short sequences on CPUs, in fp32."""
    from megagpt2.config import load_config

    return load_config(ROOT / "configs/gpt2_117m.yaml").replace({
        "model.layers": layers, "model.width": width, "model.heads": width // 64,
        "batch.global_batch": sequences, "batch.micro_batch": micro_batch, "batch.sequence_length": length,
        "training.precision": "fp32", "training.device": "cpu",
        "validation.every": 0, "monitor.sample_every": 0,
    })


def nothing_to_measure(device: str) -> str | None:
    """Why the compiled operators can't be measured on "cpu" or "cuda" here, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "this machine has no CUDA device: leave --device cuda out"
    if EXTENSION.problem(device):
        return f"there is nothing to measure, the operators are {EXTENSION.describe(device)}"
    return None


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, str | int | float]:
    """What a reader needs to know to compare what was measured on `device`, "cpu" or "cuda"."""
    return {
        "processor": processor(), "cores": os.cpu_count() or 1, "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),  # processes of others that want the cores
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__, "cuda": torch.version.cuda or "none", "python": platform.python_version(),
        "operators": EXTENSION.describe(device),
    }


def medians(cases: dict[str, Callable[[], object]], repetitions: int, device: str = "cpu") -> dict[str, float]:
    """Seconds of one call of each case: the median of `repetitions` rounds in which every case has its turn.

    On a GPU calls are queued: a measurement ends when the device has done all of it.
    """

    def timed(case: Callable[[], object], calls: int) -> float:
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            case()
        wait()
        return (time.perf_counter() - begin) / calls

    calls = {}
    for name, case in cases.items():
        case()  # the first call warms caches and allocators up
        calls[name] = max(1, round(_SHORTEST[device] / max(timed(case, 1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, case in cases.items():
            seconds[name].append(timed(case, calls[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: list[Row]) -> str:
    """Rows as text: value, peers with the ratio value / peer, and the share of the limit."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    lines = [["case", "metric", "value", *peers, "limit", "of limit"]]
    for row in rows:
        cells = [f"{row.peers[name]:.3g} ({row.value / row.peers[name]:.3g}x)" if name in row.peers else ""
                 for name in peers]
        limit = ["", ""] if row.limit is None else [f"{row.limit:.3g}", f"{row.value / row.limit:.0%}"]
        lines.append([row.case, row.metric, f"{row.value:.3g} {row.unit}", *cells, *limit])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)


def report(
    rows: list[Row], options: argparse.Namespace, device: str = "cpu", text: Callable[[list[Row]], str] = table
) -> None:
    """Print the machine and the rows as `text`, and where the options say so into a page; {"machine", "rows"} into a
    file."""
    facts = machine(device)
    shown = f"{', '.join(f'{name} {value}' for name, value in facts.items())}\n{text(rows)}"
    print(shown)
    if options.json is not None:
        written = {"machine": facts, "rows": [asdict(row) for row in rows]}
        sections.write(options.json, json.dumps(written, indent=1) + "\n")
    if options.update is not None:
        sections.replace(options.update, section_of(options), f"```\n{shown}\n```")

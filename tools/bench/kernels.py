"""The operators of csrc/ against torch, by the bandwidth they reach: GB/s of the bytes that anyone must move.

    python tools/bench/kernels.py                             everything, on the CPU
    python tools/bench/kernels.py --device cuda --json build/bench/kernels_cuda.json
    python tools/bench/kernels.py --only layer_norm --compile

The limit is what y.copy_(x) reaches in turns with them, 8192 x 1600 in bf16 on a CPU, 1 GB on a GPU. Peers are torch's
eager mode, with --compile torch.compile, and on a GPU apex and liger-kernel where they can be imported. docs/kernels.md
counts the bytes. An operator around matrix products is measured in TFLOP/s, and its limit is such a product's rate.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["MEGAGPT2_OPERATORS"] = "always"  # before they are imported: ours, however small

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
from common import Row, arguments, medians, nothing_to_measure, report  # noqa: E402

from tools.bench.kernel_cases import Call, Case  # noqa: E402

OPERATORS = sorted(p.stem for p in (Path(__file__).parent / "kernel_cases").glob("*.py") if p.stem != "__init__")
CPU_COPY, GPU_COPY = 8192 * 1600, 500_000_000  # elements of bf16


def keep_memory() -> None:
    """Have glibc keep what is freed. By default it hands large tensors' memory back and gets it anew, page by page, for
    every result: more time than most operators take, and alike for all of them. GPUs have a caching allocator."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never. (2 GB, the largest that it can be, is less than an eager head frees)


@dataclass(frozen=True)
class Limit:
    """Something that this machine does as fast as it can; work: what one call does, in units times seconds."""

    name: str
    metric: str
    unit: str
    call: Call
    work: float


def limits(device: str, small: bool) -> dict[str, Limit]:
    """Copying, and multiplying matrices of a type, by name: "copy", "fp32", "bf16"."""
    count = 1000 if small else CPU_COPY if device == "cpu" else GPU_COPY
    x, y = (torch.ones(count, dtype=torch.bfloat16, device=device) for _ in range(2))
    size = 64 if small else 1024 if device == "cpu" else 8192
    found = {"copy": Limit("copy", "bandwidth", "GB/s", lambda: y.copy_(x), 4 * count / 1e9)}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        call = partial(torch.matmul, a, b)
        found[kind] = Limit(f"gemm {size} {kind}", "rate", "TFLOP/s", call, 2 * size**3 / 1e12)
    return found


def calls_of(case: Case, compiled: bool) -> dict[str, Call]:
    """Ours and its peers. A peer that fails here is left out, with a line that says so: they aren't ours to mend."""
    calls = {"ours": case.ours, "eager": case.timed(case.peers["eager"])}
    others = {name: function for name, function in case.peers.items() if name != "eager"}
    if compiled:
        torch.compiler.reset()
        others["compile"] = torch.compile(case.peers["eager"])
    for name, function in others.items():
        try:
            calls[name] = case.timed(function)
            calls[name]()
        except Exception as error:
            print(f"  {case.name}: {name} is left out: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            calls.pop(name, None)
    return calls


def measure(case: Case, machine: dict[str, Limit], options) -> Iterator[Row]:
    """Ours, its peers and the machine's limit in turns; then what they hold, where a case asks for it."""
    if case.operations:  # the type is the last word of the name
        limit, work = machine[case.name.rpartition(" ")[2]], case.operations / 1e12
    else:
        limit, work = machine["copy"], case.bytes / 1e9
    calls = {**calls_of(case, options.compile), "limit": limit.call}
    seconds = medians(calls, options.repetitions, options.device)
    most = limit.work / seconds.pop("limit")
    speed = {name: work / value for name, value in seconds.items()}
    yield Row("kernels", case.name, limit.metric, speed.pop("ours"), limit.unit, peers=speed, limit=most)
    if case.memory is not None:
        held = {name: value / 1e9 for name, value in case.memory().items()}
        yield Row("kernels", case.name, "extra memory", held.pop("ours"), "GB", higher_is_better=False, peers=held)


def main() -> int:
    parser = arguments(__doc__, repetitions=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="OPERATOR",
                        help=", ".join(OPERATORS))
    parser.add_argument("--compile", action="store_true", help="torch.compile as a peer: takes minutes")
    parser.add_argument("--small", action="store_true", help="tiny shapes: whether it runs, not how fast")
    options = parser.parse_args()
    if why := nothing_to_measure(options.device):
        print(f"kernels: {why}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    keep_memory()
    torch._functorch.config.donated_buffer = False  # compiled backward passes may run again, as eager's do
    machine = limits(options.device, options.small)
    seconds = medians({kind: limit.call for kind, limit in machine.items()}, options.repetitions, options.device)
    rows = [
        Row("kernels", limit.name, limit.metric, limit.work / seconds[kind], limit.unit)
        for kind, limit in machine.items()
    ]
    for operator in options.only:
        module = importlib.import_module(f"tools.bench.kernel_cases.{operator}")
        for case in module.cases(options.device, options.small):
            for row in measure(case, machine, options):
                rows.append(row)
                print(f"  {row.case}: {row.value:.3g} {row.unit}", file=sys.stderr, flush=True)
    report(rows, options, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())

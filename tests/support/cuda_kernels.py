"""csrc's CUDA kernels run thread by thread on a CPU: `python -m tests.support.cuda_kernels LIBRARY` compiles them.

With MEGAGPT2_CUDA_ON_CPU=LIBRARY in the environment the tests find them in place of the operators written for the CPU.
cuda_on_cpu/cuda_runtime.h says what that can show and what not. Only the way kernels are launched has to be translated.
"""

from __future__ import annotations

import platform
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
ROOT = HERE.parents[2]
SOURCES = [
    *sorted((ROOT / "csrc").glob("*/*.cu")),
    *(path for path in sorted((ROOT / "csrc").glob("*/*.cpp")) if not path.stem.endswith("_cpu")),  # what both need
]
ENVIRONMENT = "MEGAGPT2_CUDA_ON_CPU"
FLAGS = [
    "-std=c++17", "-O1", "-g", "-fPIC", "-DUSE_CUDA", "-Wno-psabi", "-U_FORTIFY_SOURCE",
    *(["-mfma"] if platform.machine() == "x86_64" else []),  # nvcc joins products and sums, too
    # What C++ leaves undefined ends the process: a pack that is not aligned, above all.
    "-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error",
]  # fmt: skip


def translated(source: str) -> str:
    """C++ for CUDA: kernel<<<blocks, threads, memory, stream>>>(arguments) is a call of Launch::run, and operators are
    registered for the CPU."""
    end = 0
    while (at := source.find("<<<", end)) >= 0:
        begin = _start_of_name(source, at)
        close = source.index(">>>(", at)
        call = (
            f"cuda_on_cpu::Launch({source[at + 3 : close]})"
            f".run([&](const auto&... given) {{ {source[begin:at]}(given...); }}, "
        )
        source, end = source[:begin] + call + source[close + 4 :], begin + len(call)
    source = source.replace("torch::stable::accelerator::DeviceGuard", "cuda_on_cpu::DeviceGuard")
    return source.replace("STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU,")


def _start_of_name(source: str, end: int) -> int:
    """Where the kernel begins that ends at `end`: a name, perhaps with arguments of a template."""
    at, depth = end, 0
    while depth or source[at - 1] == ">" or source[at - 1] == "_" or source[at - 1].isalnum():
        at -= 1
        depth += {">": 1, "<": -1}.get(source[at], 0)
    return at


def build(library: Path, sources: Sequence[Path] = SOURCES) -> None:
    """Compile sources, all of csrc/*.cu, into a library that overrides the operators for the CPU. RuntimeError where
    that fails."""
    stable = runpy.run_path(str(ROOT / "setup.py"))["STABLE"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in (ROOT / "csrc").glob("*/*.cuh"):  # they launch kernels, too
            target = copy / path.relative_to(ROOT / "csrc")
            target.parent.mkdir(exist_ok=True)
            target.write_text(translated(path.read_text()))
        includes = [f"-I{path}" for path in (HERE, copy, ROOT / "csrc", *cpp_extension.include_paths())]

        def compiled(path: Path) -> Path:
            target = copy / path.relative_to(path.parents[1])
            target.parent.mkdir(exist_ok=True)
            target = target.with_suffix(".cpp")
            target.write_text(translated(path.read_text()))
            _run("g++", "-c", target, "-o", target.with_suffix(".o"), *FLAGS, *stable, *includes)
            return target.with_suffix(".o")

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, [HERE / "cuda_on_cpu.cpp", *sources]))
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        _run("g++", "-shared", "-Wl,--no-undefined", "-o", library, *objects, *libraries, "-ltorch_cpu", "-lc10")


def _run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))

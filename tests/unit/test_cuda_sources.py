"""The CUDA sources compile without a GPU, as they do on login nodes, and no kernel spills registers to memory."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
SETUP = runpy.run_path(str(ROOT / "setup.py"))
MOST_REGISTERS = 168  # 12 warps of a multiprocessor's 65,536: fewer would not hide what its memory takes
ARCHITECTURES = ("sm_80", "sm_90")  # what a build is for without TORCH_CUDA_ARCH_LIST
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compiled(source: Path, *architectures: str) -> subprocess.CompletedProcess[str]:
    """nvcc as setup.py calls it, with torch's headers; ptxas tells what each kernel needs."""
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]
    includes = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    command = [NVCC, "-c", source, "-o", os.devnull, "-std=c++17", "-Xptxas", "-v", *targets, *includes,
               *SETUP["NVCC"], *cpp_extension.COMMON_NVCC_FLAGS]  # fmt: skip
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def results() -> dict[Path, subprocess.CompletedProcess[str]]:
    if NVCC is None:
        if os.environ.get("MEGAGPT2_REQUIRE_NVCC") == "1":
            pytest.fail("nvcc is missing: install the CUDA toolkit, or unset MEGAGPT2_REQUIRE_NVCC")
        pytest.skip("nvcc is not installed")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(lambda source: compiled(source, *ARCHITECTURES), SOURCES), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_and_do_not_spill(results, source):
    result = results[source]
    assert result.returncode == 0, result.stderr[-3000:]
    log = result.stdout + result.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert {architecture for _, architecture in kernels} == set(ARCHITECTURES)
    assert len(kernels) == len(spills)
    spilling = [kernel for kernel, spill in zip(kernels, spills, strict=True) if spill != ("0", "0")]
    assert not spilling, f"registers spill in {spilling}"
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == len(kernels)
    crowded = [kernel for kernel, number in zip(kernels, registers, strict=True) if number > MOST_REGISTERS]
    assert not crowded, f"more than {MOST_REGISTERS} registers in {crowded}"


def test_every_operator_of_the_cpu_has_a_cuda_side():
    """Schema by schema: what is registered for one kind of device is registered for the other."""
    found = {}
    for suffix, device in ((".cpp", "CPU"), (".cu", "CUDA")):
        text = "".join(path.read_text() for path in (ROOT / "csrc").glob(f"*/*{suffix}"))
        blocks = re.findall(rf"IMPL\(megagpt2, {device}, m\) \{{(.*?)\n?\}}", text, re.DOTALL)
        found[device] = set(re.findall(r'm\.impl\("(\w+)"', "".join(blocks)))
    assert found["CPU"] and found["CPU"] == found["CUDA"]


def test_a_build_is_for_the_devices_that_are_named(monkeypatch):
    """By torch's CUDA version and nvcc, not by a GPU that happens to be there: login nodes have none."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(Path(NVCC).resolve().parents[1]))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # so that what setup.py sets is taken back
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.delenv("MEGAGPT2_NO_EXT", raising=False)
    [module] = SETUP["extension_arguments"]()["ext_modules"]
    assert {path.name for path in SOURCES} <= {Path(name).name for name in module.sources}
    assert "-DMEGAGPT2_CUDA=sm_80-compute_90-sm_90" in module.extra_compile_args["cxx"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == SETUP["ARCHITECTURES"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    [module] = SETUP["extension_arguments"]()["ext_modules"]
    assert "-DMEGAGPT2_CUDA=sm_100" in module.extra_compile_args["cxx"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "10.0"


def test_a_name_means_one_thing():
    """Two types or functions of one name, seen by different files, would be one to the linker: it keeps either."""
    declared = re.compile(r"^(?:struct|class) (\w+) \{|^(?:inline )?[\w:<>]+ (\w+)\(", re.MULTILINE)
    headers = [path for path in (ROOT / "csrc").rglob("*.h") if not path.stem.endswith("_loops")]
    names = [{"".join(found) for found in declared.findall(path.read_text())} for path in headers]
    assert [name for name, count in Counter(chain.from_iterable(names)).items() if count > 1] == []

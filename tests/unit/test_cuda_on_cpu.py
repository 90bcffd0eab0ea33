"""The CUDA kernels compute what the operators must, run thread by thread on a CPU: no GPU is needed.

tests/support/cuda_on_cpu/cuda_runtime.h says what this shows. Not how fast they are, and not the approximations of a
GPU's own functions.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import pytest

from tests.support import cuda_kernels

OPERATORS = [
    "tests/unit/test_philox.py",
    *(f"tests/numerics/test_{name}.py" for name in (
        "operators", "layer_norm", "residual_layer_norm", "bias_gelu", "bias_dropout_add", "dropout",
        "scale_mask_softmax", "cross_entropy", "cross_entropy_chunks", "split_sum")),
]  # fmt: skip

KERNELS = """
#include "cuda_runtime.h"

// Sums over all 64 threads of what the first gives: with a barrier it is there for all of them.
__global__ void sum(bool waits, float* total) {
  __shared__ float given;
  if (threadIdx.x == 0) given = 0.0f;
  __syncthreads();
  if (threadIdx.x == 0) given = 1.0f;
  if (waits) __syncthreads();
  float x = given;
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) total[threadIdx.x / 32] = x;
}

// Sums of warps' numbers, ten in a row: a warp that runs ahead overwrites what others still read, unless successive
// sums use different pieces of shared memory.
__global__ void sums(int pieces, float* wrong) {
  __shared__ float shared[2][8];
  for (int i = 0; i < 10; ++i) {
    float* piece = shared[i % pieces];
    if (threadIdx.x % 32 == 0) piece[threadIdx.x / 32] = i;
    __syncthreads();
    float sum = threadIdx.x % 32 < 8 ? piece[threadIdx.x % 32] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (sum != 8 * i) *wrong = 1.0f;
  }
}

// Half of the threads wait for all.
__global__ void stuck(unsigned waiting) {
  if (threadIdx.x < waiting) __syncthreads();
}

extern "C" void run_sum(bool waits, float* total) { sum<<<dim3(1), dim3(64), 0, nullptr>>>(waits, total); }
extern "C" void run_sums(int pieces, float* wrong) { sums<<<20, 256, 0, nullptr>>>(pieces, wrong); }
extern "C" void run_stuck(unsigned waiting) { stuck<<<2, 64, 0, nullptr>>>(waiting); }
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cu").write_text(KERNELS)
    cuda_kernels.build(folder / "kernels.so", [folder / "kernels.cu"])
    return folder / "kernels.so"


def test_a_race_shows_and_a_barrier_ends_it(kernels):
    library = ctypes.CDLL(str(kernels))
    totals = {True: set(), False: set()}
    for waits in [True, False] * 20:
        found = (ctypes.c_float * 2)()
        library.run_sum(waits, found)
        totals[waits].add(tuple(found))
    assert totals[True] == {(32.0, 32.0)}
    assert len(totals[False]) > 1


def test_what_warps_still_read_is_overwritten_by_those_ahead(kernels):
    library = ctypes.CDLL(str(kernels))
    for pieces in (1, 2):
        wrong = ctypes.c_float(0.0)
        library.run_sums(pieces, ctypes.byref(wrong))
        assert wrong.value == (pieces == 1)


def test_a_barrier_that_some_never_reach_is_told(kernels):
    code = f"import ctypes, torch; ctypes.CDLL({str(kernels)!r}).run_stuck(%d)"
    for waiting in (0, 64):
        subprocess.run([sys.executable, "-c", code % waiting], check=True)
    done = subprocess.run([sys.executable, "-c", code % 40], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert "threads wait for others that don't come" in done.stderr and "64 x 1 threads" in done.stderr


@pytest.mark.slow
def test_the_operators_are_right(tmp_path):
    """Every test of theirs, with the kernels in place of what is written for the CPU."""
    library = tmp_path / "cuda_on_cpu.so"
    cuda_kernels.build(library)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu and not slow", *OPERATORS],
        capture_output=True, text=True, check=False, timeout=1800,
        cwd=cuda_kernels.ROOT, env=os.environ | {cuda_kernels.ENVIRONMENT: str(library)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 300

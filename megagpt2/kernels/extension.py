"""Whether the compiled operators of csrc/ are there to be used. Every kernel's dispatch asks here.

They are used where `megagpt2._C` was built from the sources at hand, for the devices and element types that it knows.
Otherwise the references in plain torch compute the same: the random bits are equal, everything else up to rounding.
MEGAGPT2_REFERENCE=1 in the environment asks for the references, and so does MEGAGPT2_NO_EXT=1, which builds nothing.

A call of ours costs some microseconds more than one of torch's, and a row of a few elements more than its share, so a
tensor can be too small or too narrow for it to pay: each operator says what it wants on a CPU, as measured
(tools/bench/break_even.py). MEGAGPT2_OPERATORS=always uses them at any shape, as the tests do, whose tensors are small.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.autograd import forward_ad

MODULE = "megagpt2._C"
SOURCES = Path(__file__).resolve().parents[2] / "csrc"  # in an installation without them there is nothing to compare
TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
OLDEST_GPU = (8, 0)  # Ampere: the first with bf16
_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures ("sm_80 sm_90 compute_90") runs on a GPU of this compute capability.

    sm_XY is code for X.Y and later ones of X; compute_XY is PTX, which the driver compiles for X.Y and all later ones.
    With an "a" both are for X.Y alone, with an "f" for X.Y and later ones of X (CUDA C++ Programming Guide,
    "Application compatibility").
    """
    for kind, digits, letter in re.findall(r"(sm|compute)_(\d+)([af]?)", architectures):
        built = divmod(int(digits), 10)
        family = built[0] == capability[0] or (kind == "compute" and not letter)
        if built == capability or (letter != "a" and family and built <= capability):
            return True
    return False


@dataclass(frozen=True)
class Worth:
    """From which shapes on a compiled operator is as fast as torch's own on a CPU, or faster, as measured."""

    fewest: int = 0
    """Elements: a call of ours costs more."""
    narrowest: int = 0
    """Elements of a row: so does its beginning and end."""

    def covers(self, x: torch.Tensor) -> bool:
        return x.numel() >= self.fewest and x.shape[-1] >= self.narrowest


@dataclass(frozen=True)
class Extension:
    """The compiled operators, or why there are none.

    cuda: the architectures that they were built for ("sm_80 sm_90 compute_90"), empty without CUDA. always: at shapes
    too where torch's own are faster.
    """

    compiled: bool
    reason: str = ""
    cuda: str = ""
    always: bool = False

    def describe(self, device: str) -> str:
        """For people: what runs on a device of this type."""
        problem = self.problem(device)
        return f"reference ({problem})" if problem else {"cpu": "C++", "cuda": "CUDA"}[device]

    def problem(self, device: str) -> str | None:
        """Why the compiled operators can't be used on this machine's devices of this type, or None."""
        if not self.compiled:
            return self.reason
        if device == "cpu":
            return None
        if device == "cuda" and self.cuda:
            return self._problem_of_gpu
        return f"{MODULE} was built without {device}: make setup, where torch is a {device} build and nvcc is installed"

    @cached_property
    def _problem_of_gpu(self) -> str | None:
        """Why one of the GPUs that this process sees is none that they are for. Asked once, as every call asks here."""
        for capability in sorted({*map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))}):
            found = ".".join(map(str, capability))
            if capability < OLDEST_GPU:
                needed = ".".join(map(str, OLDEST_GPU))
                return f"they need a GPU of compute capability {needed} or newer, and here is one of {found}"
            if not runs_on(self.cuda, capability):
                return (
                    f"{MODULE} was built for {self.cuda}, and here is a GPU of compute capability {found}: build it"
                    f" again with TORCH_CUDA_ARCH_LIST={found} make setup"
                )
        return None

    def serves(
        self, x: torch.Tensor, *others: torch.Tensor | None, types: frozenset[torch.dtype] = TYPES,
        worth: Worth | None = None,
    ) -> bool:
        """Whether a compiled operator takes these, and those that are not given (None): all on one device,
        floating-point ones of `types`. On a CPU only shapes of x that are `worth` it, None: all. Never within a
        transform of torch.func, nor a forward-mode derivative, which torch would take for zero: the operators have one
        derivative, and the references have all."""
        device = x.device
        if self.problem(device.type) or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return False
        if worth is not None and device.type == "cpu" and not self.always and not worth.covers(x):
            return False
        for tensor in (x, *others):  # a loop: this runs before every call
            if tensor is not None and (
                tensor.device != device or (tensor.dtype not in types and tensor.is_floating_point())
            ):
                return False
        return True


def hash_of_sources(folder: Path) -> str:
    """What setup.py wrote into the module when it was built: a hash of csrc/."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def load(environment: Mapping[str, str], sources: Path = SOURCES) -> Extension:
    """Import the compiled operators, unless they are not wanted, not built, or out of date."""
    for name in ("MEGAGPT2_REFERENCE", "MEGAGPT2_NO_EXT"):  # the second is setup.py's, which then builds none
        if environment.get(name) == "1":
            return Extension(False, f"{name}=1")
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError:
        return Extension(False, f"{MODULE} is not built: make setup")
    except (ImportError, OSError) as error:  # as another torch's: symbols that this one has not
        return Extension(False, f"{MODULE} can't be loaded, build it again with make setup: {error}")
    if sources.is_dir() and f"s{hash_of_sources(sources)}" != module.SOURCES:
        return Extension(False, f"{MODULE} was built from other sources than {sources}: make setup")
    return Extension(True, cuda=module.CUDA.replace("-", " "), always=environment.get("MEGAGPT2_OPERATORS") == "always")


EXTENSION = load(os.environ)

"""Whether the compiled operators of csrc/ are there to be used. Every kernel's dispatch asks here.

They are used where `megagpt2._C` was built from the sources at hand, for the devices and element types that it knows.
Otherwise the references in plain torch compute the same: the random bits are equal, everything else up to rounding.
MEGAGPT2_REFERENCE=1 in the environment asks for the references.

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

    sm_XY is code for X.Y and later ones of X; compute_XY is PTX, which the driver compiles for X.Y and all later ones;
    with a letter (sm_90a) both are for that GPU alone (CUDA C++ Programming Guide, "Application compatibility").
    """
    for kind, digits, letter in re.findall(r"(sm|compute)_(\d+)([af]?)", architectures):
        built = divmod(int(digits), 10)
        if built == capability or (
            not letter and built <= capability and (kind == "compute" or built[0] == capability[0])
        ):
            return True
    return False


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
        """Why this machine's GPU is none that they are for. Asked once: this is looked at before every call."""
        capability = torch.cuda.get_device_capability()
        found = ".".join(map(str, capability))
        if capability < OLDEST_GPU:
            needed = ".".join(map(str, OLDEST_GPU))
            return f"they need a GPU of compute capability {needed} or newer, and this one has {found}"
        if not runs_on(self.cuda, capability):
            return (
                f"{MODULE} was built for {self.cuda}, and this GPU's compute capability is {found}: build it again with"
                f" TORCH_CUDA_ARCH_LIST={found} make setup"
            )
        return None

    def serves(
        self, x: torch.Tensor, *others: torch.Tensor | None, types: frozenset[torch.dtype] = TYPES, fewest: int = 0,
        narrowest: int = 0,
    ) -> bool:
        """Whether a compiled operator takes these, and those that are not given (None): all on one device,
        floating-point ones of `types`. On a CPU x has to have at least `fewest` elements, and `narrowest` columns.
        Never within a forward-mode derivative: the operators have none, and torch would take it for zero."""
        device = x.device
        if self.problem(device.type) or forward_ad._current_level >= 0:
            return False
        if device.type == "cpu" and (x.numel() < fewest or x.shape[-1] < narrowest) and not self.always:
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
    if environment.get("MEGAGPT2_REFERENCE") == "1":
        return Extension(False, "MEGAGPT2_REFERENCE=1")
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

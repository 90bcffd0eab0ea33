"""Whether the compiled operators of csrc/ are there to be used. Every kernel's dispatch asks here.

They are used where `megagpt2._C` was built from the sources at hand, for the devices and element types that it knows.
Otherwise the references in plain torch compute the same: the random bits are equal, everything else up to rounding.
MEGAGPT2_REFERENCE=1 in the environment asks for the references.

A call of ours costs some microseconds more than one of torch's, so a tensor can be too small for it to pay: each
operator says how many elements it wants on a CPU, as measured (tools/bench/break_even.py). MEGAGPT2_OPERATORS=always
uses them for any number, as the tests do, whose tensors are small.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

MODULE = "megagpt2._C"
SOURCES = Path(__file__).resolve().parents[2] / "csrc"  # in an installation without them there is nothing to compare
TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
OLDEST_GPU = (8, 0)  # Ampere: the first with bf16
_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


@dataclass(frozen=True)
class Extension:
    """The compiled operators, or why there are none. cuda: whether they include those for CUDA devices; always: also
    for tensors so small that torch's own are faster."""

    compiled: bool
    reason: str = ""
    cuda: bool = False
    always: bool = False

    def describe(self, device: str) -> str:
        """For people: what runs on a device of this type."""
        problem = self.problem(device)
        return f"reference ({problem})" if problem else {"cpu": "C++", "cuda": "CUDA"}[device]

    def problem(self, device: str) -> str | None:
        """Why the compiled operators can't be used on a device of this type, or None."""
        if not self.compiled:
            return self.reason
        if device == "cpu" or (device == "cuda" and self.cuda):
            return None
        return f"{MODULE} was built without {device}: make setup, where torch is a {device} build and nvcc is installed"

    def problem_here(self, device: str) -> str | None:
        """`problem`, and whether this machine's GPU is one that they are for."""
        problem = self.problem(device)
        if problem is None and device == "cuda":
            found = torch.cuda.get_device_capability()
            if found < OLDEST_GPU:
                needed, found = (".".join(map(str, version)) for version in (OLDEST_GPU, found))
                return f"they need a GPU of compute capability {needed} or newer, and this one has {found}"
        return problem

    def serves(
        self, x: torch.Tensor, *others: torch.Tensor | None, types: frozenset[torch.dtype] = TYPES, fewest: int = 0
    ) -> bool:
        """Whether a compiled operator takes these, and those that are not given (None): all on one device,
        floating-point ones of `types`. On a CPU x has to have at least `fewest` elements."""
        device = x.device
        if self.problem(device.type) or (device.type == "cpu" and x.numel() < fewest and not self.always):
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
    return Extension(True, cuda=bool(module.CUDA), always=environment.get("MEGAGPT2_OPERATORS") == "always")


EXTENSION = load(os.environ)

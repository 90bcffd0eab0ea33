"""Whether the compiled operators of csrc/ are there to be used. Every kernel's dispatch asks here.

They are used where `megagpt2._C` was built from the sources and the torch at hand, on the devices that an operator
supports. Otherwise the references in plain torch compute the same numbers: the random bits are equal,
so a run may change from one to the other. MEGAGPT2_REFERENCE=1 in the environment asks for the references.
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
_SUFFIXES = (".h", ".cpp", ".cu")


@dataclass(frozen=True)
class Extension:
    """The compiled operators, or why there are none."""

    compiled: bool
    reason: str = ""

    def describe(self, device: str) -> str:
        """For people: what runs on a device of this type."""
        if self.compiled and device != "cpu":
            return f"reference (the compiled operators are for CPUs, not {device})"
        return "C++" if self.compiled else f"reference ({self.reason})"

    def serves(self, *tensors: torch.Tensor) -> bool:
        """Whether a compiled operator takes these tensors: so far all of them are on the CPU."""
        return self.compiled and all(tensor.device.type == "cpu" for tensor in tensors)


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
    if torch.__version__ != module.TORCH:
        return Extension(
            False, f"{MODULE} was built for torch {module.TORCH}, this is {torch.__version__}: make setup"
        )
    if sources.is_dir() and f"s{hash_of_sources(sources)}" != module.SOURCES:
        return Extension(False, f"{MODULE} was built from other sources than {sources}: make setup")
    return Extension(True)


EXTENSION = load(os.environ)

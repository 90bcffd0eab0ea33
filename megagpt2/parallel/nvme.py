"""DeepSpeed's operators for NVMe: built beforehand (`make setup-nvme`), loaded from their files (DESIGN D7).

Left to itself DeepSpeed compiles them in the first training step that needs them, on every rank, behind a lock of
torch's that waits for ever where an earlier build was killed.

    pin_memory   page-locked memory
    async_io     files read and written past the page cache, through libaio; uses pin_memory's symbols

They only move bytes, so they are compiled without optimization and for any processor of the kind.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megagpt2.config.errors import ConfigError
from megagpt2.config.facts import NVME_OPERATORS, nvme_operator_files
from megagpt2.parallel.quiet_deepspeed import deepspeed

_SOURCES = ("aio/common", "aio/py_lib", "pin_memory")
_PROBE = (1 << 20) + 1024  # bytes: more than one block of libaio's, and no multiple of a page


def _units(folder: Path) -> dict[str, tuple[str, list[Path]]]:
    """What is compiled at once, and for which operator. Sources that share torch's headers go together: reading those
    is nearly all of the time."""
    common = {path.stem: ("async_io", [path]) for path in sorted((folder / "aio/common").glob("*.cpp"))}
    return {
        "pin": ("pin_memory", sorted((folder / "pin_memory").glob("*.cpp"))),
        "python": ("async_io", sorted((folder / "aio/py_lib").glob("*.cpp"))),
        **common,
    }


def _run(command: list[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line]
        raise ConfigError(
            f"NVMe operators: {command[0]} failed: {' | '.join(errors[:4]) or done.stderr[-500:]}. If libaio.h or -laio"
            " is missing, install libaio's headers: apt-get install libaio-dev, dnf install libaio-devel"
        )


def build() -> list[Path]:
    """Compile both operators where they aren't built yet; returns their files. Raises ConfigError where that fails."""
    targets = nvme_operator_files()
    if all(path.is_file() for path in targets):
        return targets
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"NVMe operators: no C++ compiler ({compiler}): install one, or name one with CXX=...")
    from torch.utils import cpp_extension  # here: it looks for compilers when imported

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in _SOURCES:
            shutil.copytree(Path(deepspeed.__file__).parent / "ops/csrc" / name, folder / name)
            for header in (folder / name).glob("*.h"):  # they have no include guards
                header.write_text("#pragma once\n" + header.read_text(encoding="utf-8"), encoding="utf-8")
        system = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        flags = [
            "-fPIC", "-O0", "-std=c++20", "-fopenmp", "-D__SCALAR__", "-DTORCH_API_INCLUDE_EXTENSION_H",
            *(f"-isystem{path}" for path in system), *(f"-I{folder / name}" for name in _SOURCES),
        ]

        def compile_unit(item: tuple[str, tuple[str, list[Path]]]) -> None:
            name, (operator, sources) = item
            unit = folder / f"{name}.cpp"
            unit.write_text("".join(f'#include "{path}"\n' for path in sources), encoding="utf-8")
            _run([compiler, *flags, f"-DTORCH_EXTENSION_NAME={operator}", "-c", unit, "-o", folder / f"{name}.o"])

        units = _units(folder)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_unit, units.items()))
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-laio"]
        for operator, target in zip(NVME_OPERATORS, targets, strict=True):
            objects = [folder / f"{name}.o" for name, (owner, _) in units.items() if owner == operator]
            target.parent.mkdir(parents=True, exist_ok=True)
            linked = target.with_name(f".{target.name}.{os.getpid()}")
            _run([compiler, "-shared", "-fopenmp", *objects, "-o", linked, *libraries])
            linked.replace(target)
    return targets


def load_operators() -> None:
    """Give DeepSpeed the built operators, so that it builds none."""
    loaded = deepspeed.ops.op_builder.builder.OpBuilder._loaded_ops
    for name, path in zip(NVME_OPERATORS, nvme_operator_files(), strict=True):
        if name in loaded:
            continue
        try:
            if name == "pin_memory":  # async_io finds its symbols only where they are global
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"offload: DeepSpeed's operator {name} can't be loaded ({error}): install libaio (apt-get install"
                f" libaio-dev), remove {path.parent} and run make setup-nvme again"
            ) from None
        loaded[name] = module
        if name == "pin_memory":  # where DeepSpeed looks for this one
            sys._deepspeed_pin_memory_op_module = module


def why_unusable(folder: Path, locked_bytes: int) -> str | None:
    """Why DeepSpeed could not keep state in this folder, or None: it asks few of the calls that can fail, and would
    train on what was in memory before."""
    if (kind := file_system(folder)) in ("tmpfs", "ramfs"):
        return f"it is in memory ({kind}), where state takes as much as without it: name a folder on a local disk"
    if (problem := _why_not_lockable(locked_bytes)) is not None:
        return problem
    handle = deepspeed.ops.op_builder.AsyncIOBuilder().load().aio_handle(1 << 20, 8, False, True, 1)
    file = folder / f"probe-{os.getpid()}"
    buffer = handle.new_cpu_locked_tensor(_PROBE, torch.empty(0, dtype=torch.uint8))
    pattern = (torch.arange(_PROBE) % 251).to(torch.uint8)
    try:
        buffer[:_PROBE].copy_(pattern)
        handle.sync_pwrite(buffer[:_PROBE], str(file), 0)
        buffer.zero_()
        handle.sync_pread(buffer[:_PROBE], str(file), 0)
        if torch.equal(buffer[:_PROBE], pattern):
            return None
    except RuntimeError as error:
        return f"its file system does not take direct reads and writes ({error}): name a folder on a local disk"
    finally:
        handle.free_cpu_locked_tensor(buffer)
        file.unlink(missing_ok=True)
    return "what was written there is not what was read: name a folder on a local disk"


def file_system(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that a folder is in, as Linux names it; "" where that isn't told."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    # Blanks in names stand there as \040. Of two that are mounted at the same place the later one is seen.
    kinds = {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line[1]): line[2] for line in lines}
    here = folder.resolve()
    return next((kinds[str(place)] for place in (here, *here.parents) if str(place) in kinds), "")


def _why_not_lockable(count: int) -> str | None:
    """Whether this process may lock so many bytes in memory; where it may not, DeepSpeed's operators crash."""
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, max(count, mmap.PAGESIZE)) as region:
        view = (ctypes.c_char * len(region)).from_buffer(region)
        address = ctypes.c_void_p(ctypes.addressof(view))
        failed = libc.mlock(address, ctypes.c_size_t(len(region)))
        if not failed:
            libc.munlock(address, ctypes.c_size_t(len(region)))
        del view
    if not failed:
        return None
    return (
        f"it needs {count / 2**20:.0f} MiB of locked memory, and this user may not lock as much (ulimit -l): raise the"
        " limit (memlock in /etc/security/limits.conf; docker run --ulimit memlock=-1)"
    )

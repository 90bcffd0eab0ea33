"""Main memory: how much there is, how much of it a process has, and giving some back."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import psutil


def memory_of_this_process(which: str) -> int:
    """Bytes that it has now (VmRSS, without mapped files RssAnon) or had at most (VmHWM); 0 where the system doesn't
    say."""
    try:
        found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:  # another system
        return 0
    return 1024 * int(found[1]) if found else 0


def free_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of main memory that are left: the machine's, or those of the job or container that this process is in
    (control groups, version 2), whose limit may be lower."""
    free = psutil.virtual_memory().available
    try:
        place = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
        folder = root / place.strip("/")
        for group in (folder, *folder.parents):
            if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
                free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, StopIteration):  # another system, or version 1
        pass
    return max(free, 0)


def return_freed_memory() -> None:
    """Give the system back what was freed. The C library keeps pieces below 32 MB. DeepSpeed copies all weights in such
    pieces while it starts: 4.4 GB of the 1542M model's 15 GB were holes. Loading leaves others (0.5 GB at 117M)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's
        trim(ctypes.c_size_t(0))

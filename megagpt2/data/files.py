"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """`corpus/v1.5_train` + `.bin`: appended, because `Path.with_suffix` would eat the `.5_train`."""
    return Path(f"{os.fspath(prefix)}{suffix}")


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`, of this process only: a rename within one folder is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut. Some network file systems refuse: then skip it."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_and_close(file: IO[Any]) -> None:
    """Flush `file` to the disk itself, and close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends, and vanishes if it raises."""
    temporary = temporary_name(path)
    encoding = None if "b" in mode else "utf-8"
    file = temporary.open(mode, encoding=encoding, newline=None if "b" in mode else "\n")
    try:
        yield file
        sync_and_close(file)
        temporary.replace(path)
    except BaseException:
        file.close()
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files and folders that survive a power cut, hashed while they are written.

A new name is durable when the folder it stands in has been synced, a file's bytes when the file has.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

BLOCK = 1 << 22  # bytes read or written at once


class HashedFile:
    """A new file, its SHA-256 made on the way. Closed without an error it is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            self._digest.update(block)
            with _naming(self.path):
                while block:
                    block = block[os.write(self._descriptor, block) :]
        self.size += len(view)

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"size": self.size, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, value, trace) -> None:
        with _naming(self.path):  # network file systems and quotas report a full disk here
            try:
                if kind is None:
                    os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """A small file, whole or not at all: temporary name, fsync, rename. Returns its record."""
    with HashedFile(path.with_name(f".{path.name}.partial")) as file:
        file.write(data)
    os.replace(file.path, path)
    sync_folder(path.parent)
    return file.record


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    with _naming(folder):
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """A folder and those above it, where they are not there yet, so that they survive a power cut."""
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of calls that know a descriptor alone say of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def record_of(path: Path) -> dict[str, Any]:
    """A written file's record."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}

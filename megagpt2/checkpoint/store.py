"""Folders of files that are either complete and verified, or not there (DESIGN D6, I7).

    checkpoints/.step_00000200.partial/   while it is written: a reader never looks at it
    checkpoints/step_00000200/            renamed into place once manifest.json, written last, is on disk

manifest.json holds every file's size and SHA-256. A folder is valid when they all agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MANIFEST = "manifest.json"
VERSION = 1
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint can't be used; the message names the file and what to do."""


def open_safetensors(path: Path):
    """An open safetensors file, tensors in torch's form. Raises CheckpointError where it isn't one."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".step_{step:08d}.partial"


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a whole file, or leave the old one: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def file_record(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write into; what interrupted saves and prunings left, of any step, is removed."""
    for name in (".step_*.partial", ".step_*.removing"):
        for left in checkpoints.glob(name):
            shutil.rmtree(left)
    partial = partial_folder(checkpoints, step)
    for name in ("model", "optimizer", "parts"):
        (partial / name).mkdir(parents=True)
    return partial


def commit(checkpoints: Path, step: int, records: dict[str, dict], topology: dict[str, int]) -> Path:
    """Write the manifest and rename the folder into place. All files must be written and synced before."""
    partial, final = partial_folder(checkpoints, step), step_folder(checkpoints, step)
    shutil.rmtree(partial / "parts", ignore_errors=True)
    for folder in (partial / "model", partial / "optimizer", partial):
        sync_folder(folder)
    manifest = {"version": VERSION, "step": step, "topology": topology, "files": dict(sorted(records.items()))}
    write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():  # an unusable folder of the same step: a usable one is never written again
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(checkpoints)
    return final


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    topology: dict[str, int]
    files: dict[str, dict[str, Any]]


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {folder} is not a complete checkpoint") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not isinstance(data, dict) or data.get("version") != VERSION:
        version = data.get("version") if isinstance(data, dict) else None
        raise CheckpointError(f"{path} has version {version!r}, this program reads version {VERSION}")
    try:
        manifest = Manifest(data["step"], data["topology"], data["files"])
        records = {name: (record["size"], record["sha256"]) for name, record in manifest.files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from None
    for name in records:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names the file {name!r}, which lies outside the checkpoint")
    return manifest


def verify(folder: Path) -> Manifest:
    """Read the manifest and compare every file with it; CheckpointError names the first that differs."""
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != record["size"]:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {record['size']}")
        if file_record(path)["sha256"] != record["sha256"]:
            raise CheckpointError(f"{path} has changed since it was written: its SHA-256 differs from the manifest's")
    return manifest


def all_steps(checkpoints: Path) -> list[Path]:
    """Finished folders, oldest first; they may still be damaged."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), p) for p in checkpoints.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def newest_verified(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over."""
    skipped = []
    for folder in reversed(all_steps(checkpoints)):
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(f"{folder.name}: {error}")
        else:
            return folder, skipped
    return None, skipped


def prune(checkpoints: Path, keep: int, newest: Path) -> list[Path]:
    """Remove all but `keep` up to `newest`; each folder is first renamed, so that none is ever half there.

    Folders of later steps don't count: they are damaged, or of a run that was begun anew, and the run that goes on
    below them must not lose what it saves. It replaces them when it gets there.
    """
    removed = []
    folders = all_steps(checkpoints)
    for folder in folders[: folders.index(newest) + 1][:-keep]:
        doomed = folder.with_name(f".{folder.name}.removing")
        folder.rename(doomed)
        shutil.rmtree(doomed)
        removed.append(folder)
    return removed

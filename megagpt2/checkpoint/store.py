"""Folders of files that are either complete and verified, or not there (DESIGN D6, I7).

    checkpoints/.step_00000200.partial/   while it is written: a reader never looks at it
    checkpoints/step_00000200/            renamed into place once manifest.json, written last, is on disk

manifest.json holds every file's size and SHA-256. A folder is valid when they all agree, what every checkpoint has is
among them, and no file of weights lies beside them that a reader might take instead.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt2.checkpoint.disk import make_folder, record_of, sync_folder, write_file

MANIFEST = "manifest.json"
VERSION = 2
PARTS = "parts"  # in a folder that is being written: what each rank has written
_HASHED_TOGETHER = 4  # files
_EVERY_ONE_HAS = ("state.json", "model/config.json", "model/model.safetensors.index.json", "optimizer/index.json")
_WEIGHTS = {".safetensors", ".bin", ".pt"}  # endings of what transformers and we open
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint can't be used; the message names the file and what to do."""


def open_safetensors(path: Path):
    """An open safetensors file, tensors in torch's form. Raises CheckpointError where it isn't one."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def get_tensor(file, path: Path, name: str) -> Tensor:
    """A tensor of an open file, its bytes not read yet. Raises CheckpointError where it isn't there."""
    try:
        return file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path} has no usable tensor {name}: {error}") from None


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".step_{step:08d}.partial"


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write into; what interrupted saves and prunings left, of any step, is removed."""
    make_folder(checkpoints)
    for name in (".step_*.partial", ".step_*.removing"):
        for left in checkpoints.glob(name):
            with contextlib.suppress(OSError):  # a file that is open elsewhere, or that somebody else removes
                _remove_anything(left)
    partial = partial_folder(checkpoints, step)
    for name in ("model", "optimizer", PARTS):
        (partial / name).mkdir(parents=True)
    return partial


def _remove_anything(path: Path) -> None:
    """A folder, or a file or link that has a folder's name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def give_up(checkpoints: Path, step: int) -> None:
    """Remove what a save that failed has written, as far as that goes."""
    shutil.rmtree(partial_folder(checkpoints, step), ignore_errors=True)


def commit(checkpoints: Path, step: int, records: dict[str, dict], topology: dict[str, int]) -> Path:
    """Write the manifest and rename the folder into place. All files must be written and synced before."""
    partial, final = partial_folder(checkpoints, step), step_folder(checkpoints, step)
    shutil.rmtree(partial / PARTS, ignore_errors=True)
    for folder in (partial / "model", partial / "optimizer", partial):
        sync_folder(folder)
    manifest = {"version": VERSION, "step": step, "topology": topology, "files": dict(sorted(records.items()))}
    write_file(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    if final.exists() or final.is_symlink():  # nothing usable: a usable folder is never written again
        _remove_anything(final)
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
    except (ValueError, OSError, RecursionError) as error:
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
            raise CheckpointError(f"{path} names the file {name[:200]!r}, which lies outside the checkpoint")
        if str(Path(name)) != name or name == ".":
            raise CheckpointError(f"{path} names the file {name[:200]!r}, which is no plain path")
    if missing := [name for name in _EVERY_ONE_HAS if name not in records]:
        raise CheckpointError(f"{path} does not list {missing[0]}, which every checkpoint has")
    return manifest


def check_sizes(folder: Path) -> Manifest:
    """Read the manifest, compare the files' sizes with it, and look for weights that it doesn't list; CheckpointError
    names the first that differs."""
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        try:
            _check_size(folder, name, record["size"])
        except OSError as error:
            raise CheckpointError(f"{folder / name[:200]} can't be looked at: {error}") from None
    for name in ("model", "optimizer"):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix in _WEIGHTS and str(path.relative_to(folder)) not in manifest.files:
                raise CheckpointError(f"{path} is not in the manifest, but could be read in place of what is: move it")
    return manifest


def verify(folder: Path, share: int = 0, shares: int = 1) -> Manifest:
    """Compare a checkpoint with its manifest; CheckpointError names the first file that differs.

    All sizes are compared, and the contents of every `shares`-th file: several ranks verify a checkpoint together.
    """
    manifest = check_sizes(folder)
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name]["size"], name))
    mine = by_size[share::shares]
    with ThreadPoolExecutor(_HASHED_TOGETHER) as threads:
        for name, found in zip(mine, threads.map(_record_or_error, (folder / n for n in mine)), strict=True):
            if isinstance(found, OSError):
                raise CheckpointError(f"{folder / name} can't be read: {found}")
            if found["sha256"] != manifest.files[name]["sha256"]:
                raise CheckpointError(
                    f"{folder / name} has changed since it was written: its SHA-256 differs from the manifest's"
                )
    return manifest


def _check_size(folder: Path, name: str, size: int) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} is a link to {path.resolve()}, outside the checkpoint")
    found = path.stat().st_size
    if found != size:
        raise CheckpointError(f"{path} has {found} bytes, the manifest says {size}")


Verify = Callable[[Path], object]
"""Raises CheckpointError where a checkpoint is not whole: `verify`, or several ranks together."""


def _record_or_error(path: Path) -> dict[str, Any] | OSError:
    try:
        return record_of(path)
    except OSError as error:
        return error


def all_steps(checkpoints: Path) -> list[Path]:
    """Finished folders, oldest first; they may still be damaged."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), p) for p in checkpoints.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def newest_verified(checkpoints: Path, verify: Verify = verify) -> tuple[Path | None, list[str]]:
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


def is_step(folder: Path) -> bool:
    """Whether the name is a checkpoint's."""
    return _STEP.fullmatch(folder.name) is not None


def step_of(folder: Path) -> int:
    return int(_STEP.fullmatch(folder.name)[1])


def superfluous(
    checkpoints: Path, newest: Path, keep: int, keep_every: int | None = None, verify: Verify = check_sizes
) -> list[Path]:
    """What retention removes once `newest`, which is whole, is there: all but the `keep` newest up to it and those of
    every `keep_every`-th step. What `verify` refuses does not count as kept.

    Folders of later steps don't count: they are damaged, or of a run that was begun anew, and the run that goes on
    below them must not lose what it saves. It replaces them when it gets there.
    """
    folders, kept, found = all_steps(checkpoints), 0, []
    for folder in reversed(folders[: folders.index(newest) + 1]):
        if kept < keep:
            with contextlib.suppress(CheckpointError):
                if folder != newest:
                    verify(folder)
                kept += 1
        elif not keep_every or step_of(folder) % keep_every:
            found.append(folder)
    return found[::-1]


def remove(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that none is ever half there."""
    doomed = folder.with_name(f".{folder.name}.removing")
    folder.rename(doomed)
    shutil.rmtree(doomed)

"""What a save calls complete survives a power cut: a file's bytes are there once it was synced after the last write, a
name once its folder was synced after the last name in it."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.unit.test_checkpoint_kill import save


class Disk:
    """Follows what is asked of the system: when names and bytes changed last, and when they were made to last."""

    def __init__(self) -> None:
        self.calls = 0
        self.changed: dict[str, int] = {}  # of a file its bytes, of a folder the names in it
        self.synced: dict[str, int] = {}
        self.lasting_at_rename: dict[str, dict[str, bool]] = {}  # folder -> {what is in it: whether it would be there}
        self._plain = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "replace", "mkdir")}

    def __enter__(self):
        self._patches = [patch.object(os, name, getattr(self, name)) for name in self._plain]
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *_) -> None:
        for one in self._patches:
            one.stop()

    def _now(self) -> int:
        self.calls += 1
        return self.calls

    def open(self, path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            self.changed[os.path.dirname(os.fspath(path))] = self.changed[os.fspath(path)] = self._now()
        return self._plain["open"](path, flags, *args, **kwargs)

    def write(self, descriptor, data):
        self.changed[os.readlink(f"/proc/self/fd/{descriptor}")] = self._now()
        return self._plain["write"](descriptor, data)

    def fsync(self, descriptor):
        self.synced[os.readlink(f"/proc/self/fd/{descriptor}")] = self._now()
        return self._plain["fsync"](descriptor)

    def mkdir(self, path, *args, **kwargs):
        self._plain["mkdir"](path, *args, **kwargs)
        self.changed[os.path.dirname(os.fspath(path))] = self._now()

    def rename(self, source, target):
        source, target = os.fspath(source), os.fspath(target)
        if os.path.isdir(source):
            inside = [source, *(str(path) for path in Path(source).rglob("*"))]
            self.lasting_at_rename[target] = {os.path.relpath(path, source): self.lasts(path) for path in inside}
        self._plain["rename"](source, target)
        for times in (self.changed, self.synced):
            if source in times:
                times[target] = times[source]
        self.changed[os.path.dirname(target)] = self._now()

    replace = rename

    def lasts(self, path: str) -> bool:
        return self.synced.get(path, 0) > self.changed.get(path, 0)


@pytest.mark.parametrize("there", [False, True])
def test_a_checkpoint_survives_a_power_cut_once_it_has_its_name(there, tmp_path):
    checkpoints = tmp_path / "runs/gpt2/checkpoints"
    if there:
        checkpoints.mkdir(parents=True)
    with Disk() as disk:
        save(checkpoints, 10)
    folder = str(checkpoints / "step_00000010")
    lasting = disk.lasting_at_rename[folder]
    assert {"manifest.json", "state.json", "model/config.json", "optimizer/rank_00000.safetensors"} <= set(lasting)
    assert all(lasting.values()), [name for name, lasts in lasting.items() if not lasts]
    assert disk.lasts(str(checkpoints))
    assert there or all(disk.lasts(str(path)) for path in (tmp_path, tmp_path / "runs", tmp_path / "runs/gpt2"))

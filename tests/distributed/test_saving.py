"""A save that fails on one rank is told on all, and leaves what was there. All ranks take the same checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megagpt2.checkpoint import store
from tests.unit.test_checkpoint_kill import CONFIG, save

TP, PP, ZERO = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.zero_stage"


@pytest.mark.parametrize(
    ("ranks", "changes", "faulty", "file"),
    [
        (1, {}, 0, "model-"),
        (2, {TP: 2}, 0, "model-"),  # the owner of a file that the other contributes to
        (2, {TP: 2}, 1, "rank_00001"),
        (2, {PP: 2}, 1, "model-00002"),
        (2, {ZERO: 3}, 0, "model-"),
        (2, {}, 1, "rank_00001"),
        (2, {}, 0, "manifest"),
        (2, {}, 1, "rank_00001.json"),  # the note for rank 0
        (4, {TP: 2, PP: 2}, 3, "rank_00003"),
    ],
)
def test_a_full_disk_on_one_rank(pool, ranks, changes, faulty, file, tmp_path):
    parts = pool.run("tests.support.saving:save_with_fault", ranks, changes=changes, folder=str(tmp_path),
                     faulty=faulty, file=file)
    for part in parts:
        (first, _), (second, left), (third, end) = part["found"]
        assert first is None and third is None
        assert second == parts[0]["found"][1][0]
        assert f"rank {faulty}: " in second and "No space left on device" in second and file in second
        assert left == ["step_00000001"]
        assert end == ["step_00000001", "step_00000003"]
    for name in end:
        store.verify(tmp_path / name)


def damaged_runs(folder: Path) -> dict[str, Path]:
    """{what is damaged in the newer of two checkpoints: a run's folder}: a byte of each file; no manifest."""
    save(folder / "whole/checkpoints", 10)
    save(folder / "whole/checkpoints", 20)
    newer, found = folder / "whole/checkpoints/step_00000020", {}
    for number, name in enumerate(store.read_manifest(newer).files):
        run = Path(shutil.copytree(folder / "whole", folder / str(number)))
        file = run / "checkpoints/step_00000020" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        found[name] = run
    (Path(shutil.copytree(folder / "whole", folder / "gone")) / "checkpoints/step_00000020/manifest.json").unlink()
    return found | {"manifest.json does not exist": folder / "gone"}


def test_all_ranks_fall_back_to_the_same_checkpoint(pool, tmp_path):
    """Whichever rank it is that reads the damaged file; and none starts anew beside damaged ones."""
    runs = damaged_runs(tmp_path)
    assert len(runs) == 7
    fields = CONFIG.model_dump(include={"layers", "width", "heads", "vocabulary", "context"})
    job = {"directories": [str(run) for run in runs.values()], "model": fields}
    for parts in zip(*pool.run("tests.support.saving:choose_together", 3, resume="auto", **job), strict=True):
        assert {part["folder"] for part in parts} == {"step_00000010"}
    told = pool.run("tests.support.saving:choose_together", 3, resume="auto", **job)[0]
    for name, part in zip(runs, told, strict=True):
        assert "passed over step_00000020: " in part["notes"][0] and name in part["notes"][0]
    for run in runs.values():
        shutil.rmtree(run / "checkpoints/step_00000010")
    for resume in ("auto", "must", str(tmp_path / "whole/../gone/checkpoints/step_00000020")):
        parts = zip(*pool.run("tests.support.saving:choose_together", 3, resume=resume, **job), strict=True)
        for rank_0, *others in parts:
            assert rank_0["error"] and others == [rank_0, rank_0]

"""Saving behind the training loop: what is saved is what was there, and a save that fails leaves what was there."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from megagpt2.checkpoint import store
from megagpt2.checkpoint.disk import HashedFile
from megagpt2.checkpoint.load import open_checkpoint
from megagpt2.checkpoint.saver import Outcome, Retention, Saver
from megagpt2.checkpoint.shards import Slices
from megagpt2.checkpoint.snapshot import Snapshot, TrainingState, copy_to_memory
from megagpt2.model.parameters import Extent
from megagpt2.parallel.topology import Topology
from tests.support.children import in_child
from tests.unit.test_checkpoint_kill import CONFIG, extents, snapshot


def saver(checkpoints: Path, asynchronous: bool = True, **retention) -> Saver:
    return Saver(checkpoints, Topology(), None, asynchronous, Retention(**retention))


def saved(one: Saver, step: int) -> Outcome:
    one.save(snapshot(step))
    return one.outcome(wait=True)


def test_training_goes_on_while_what_was_there_is_written(tmp_path):
    """The update waits for the copy and no longer; what it changes is not in the checkpoint."""
    places = extents()
    weights = [torch.full((place.elements,), 1.0) for place in places]
    state = Snapshot(places, weights, Slices(), TrainingState(1, 8, 1), CONFIG, torch.float32)
    go_on, write = threading.Event(), HashedFile.write

    def slow(self, data) -> None:
        assert go_on.wait(60)
        write(self, data)

    one = saver(tmp_path)
    with patch.object(HashedFile, "write", slow):
        one.save(state)
        one.before_update()
        for weight in weights:
            weight.fill_(2.0)
        assert one.busy and one.outcome() is None
        go_on.set()
        outcome = one.outcome(wait=True)
    assert outcome.held < outcome.seconds and not one.busy
    loaded = open_checkpoint(outcome.folder, CONFIG)
    values = loaded.weight(Extent.whole(places[2].spec), torch.float32)
    assert torch.equal(values, torch.ones_like(values))


def test_the_update_waits_for_the_copy(tmp_path):
    go_on, order = threading.Event(), []

    def slow(tensor):
        assert go_on.wait(60)
        order.append("copy")
        return tensor.clone()

    one = saver(tmp_path)
    with patch("megagpt2.checkpoint.snapshot.copy_to_memory", slow):
        one.save(snapshot(1))
        threading.Timer(0.05, go_on.set).start()
        one.before_update()
        order.append("update")
        assert one.outcome(wait=True).error is None
    assert order[-1] == "update" and len(order) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_are_bit_equal_and_share_nothing(dtype):
    tensor = torch.randn(1000).to(dtype)[3:900]
    copy = copy_to_memory(tensor)
    assert torch.equal(copy, tensor) and copy.dtype == dtype
    tensor.zero_()
    assert copy.abs().sum() > 0
    assert copy_to_memory(torch.zeros(0, dtype=dtype)).shape == (0,)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_old_ones_are_removed_and_told(asynchronous, tmp_path):
    one = saver(tmp_path, asynchronous, keep=2, keep_every=10)
    removed = [saved(one, step).removed for step in (5, 10, 15, 20, 25)]
    assert removed == [(), (), ("step_00000005",), (), ("step_00000015",)]
    assert [path.name for path in store.all_steps(tmp_path)] == ["step_00000010", "step_00000020", "step_00000025"]


def test_a_removal_that_fails_is_told_and_no_more(tmp_path):
    one = saver(tmp_path, keep=1)
    saved(one, 1)
    with patch.object(store, "remove", side_effect=PermissionError(13, "Permission denied", "step_00000001")):
        outcome = saved(one, 2)
    assert outcome.error is None and "could not remove old checkpoints: " in outcome.note
    store.verify(outcome.folder)


def test_a_jobs_limit_counts_as_the_memory_that_is_free(tmp_path):
    """Of control groups each one in the way may set a limit."""
    from megagpt2.parallel.memory import free_memory

    own, job = tmp_path / "cgroup", tmp_path / "fs/slurm/job_1/step_0"
    own.write_text("0::/slurm/job_1/step_0\n")
    job.mkdir(parents=True)
    machine = free_memory(tmp_path / "nowhere", own)
    assert machine > 2**20
    for folder, limit, used in ((job, "max", 5), (job.parent, str(2**20), 2**18), (job.parent.parent, "max", 7)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert free_memory(tmp_path / "fs", own) == 2**20 - 2**18
    (job.parent / "memory.current").write_text(str(2**21))
    assert free_memory(tmp_path / "fs", own) == 0


def test_auto_asks_for_room_at_every_save(tmp_path):
    """What steps take is not known when a run starts: it may be that there is no room any more, and again. A copy of
    ours is not taken for a step's memory."""
    from megagpt2.run import saving

    run = saving.RunSaving(
        saver(tmp_path), SimpleNamespace(topology=Topology(), device=torch.device("cpu")), None, automatic=True
    )
    need, told = snapshot(1).bytes(), []
    sizes = {"VmRSS": 70_000, "VmHWM": 75_000}
    with (
        patch.object(saving, "snapshot", lambda engine, step, material: snapshot(step)),
        patch.object(saving, "memory_of_this_process", sizes.get),
    ):
        for step, factor in ((1, 1.2), (2, 1.3), (3, 1.2), (4, 1.3)):
            with patch.object(saving, "free_memory", lambda factor=factor: factor * need + 5000):
                run.save(step)
            told.append(run.told(wait=True).text)
            sizes["VmHWM"] += need * (step == 2)
    assert ["stood still" in text for text in told] == [False, True, False, True]
    assert ["no room for a copy" in text for text in told] == [True, False, True, False]
    assert [store.verify(folder).step for folder in store.all_steps(tmp_path)] == [1, 2, 3, 4]


def test_what_a_process_had_at_most_is_known():
    from megagpt2.parallel.memory import memory_of_this_process

    size = 3 << 26
    before = memory_of_this_process("VmRSS")
    block = bytearray(size)
    block[::4096] = bytes(len(block[::4096]))
    assert memory_of_this_process("VmRSS") > before + 0.9 * size
    del block
    assert memory_of_this_process("VmRSS") < before + 0.1 * size
    assert memory_of_this_process("VmHWM") > before + 0.9 * size


def test_a_copy_that_finds_no_memory_is_a_save_that_failed(tmp_path):
    one = saver(tmp_path)
    saved(one, 1)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\nmore")):
        with patch.object(Snapshot, "copied", side_effect=error):
            outcome = saved(one, 2)
        assert "no memory for a copy of the state" in outcome.error and "more" not in outcome.error
    assert [folder.name for folder in store.all_steps(tmp_path)] == ["step_00000001"]


def test_old_ones_stay_where_the_new_one_is_not_what_was_written(tmp_path):
    """A disk that lies: the newest checkpoint that verifies is not removed."""
    one = saver(tmp_path, keep=1)
    saved(one, 1)
    commit = store.commit

    def spoiled(*arguments):
        folder = commit(*arguments)
        data = bytearray((folder / "state.json").read_bytes())
        data[5] ^= 1
        (folder / "state.json").write_bytes(data)
        return folder

    with patch.object(store, "commit", spoiled):
        outcome = saved(one, 2)
    assert "could not remove old checkpoints: rank 0: " in outcome.note and "state.json has changed" in outcome.note
    store.verify(tmp_path / "step_00000001")


def test_a_run_that_ends_by_an_error_lets_what_is_written_become_complete(tmp_path, capsys):
    from megagpt2.run.saving import RunSaving

    run, write, begun = RunSaving(saver(tmp_path), None, None, automatic=False), HashedFile.write, threading.Event()

    def slow(self, data) -> None:
        begun.wait(60)
        write(self, data)

    with patch.object(HashedFile, "write", slow):
        run.saver.save(snapshot(1))
        threading.Timer(0.05, begun.set).start()
        run.finish()
    store.verify(tmp_path / "step_00000001")
    assert "waiting for the checkpoint that is being written" in capsys.readouterr().err
    run.finish()  # nothing is


def test_one_save_at_a_time(tmp_path):
    one = saver(tmp_path)
    one.save(snapshot(1))
    with pytest.raises(AssertionError, match="was not asked for"):
        one.save(snapshot(2))
    assert one.outcome(wait=True).error is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk(asynchronous, tmp_path):
    """No file may grow beyond 3 kB: the sentence names it, the checkpoint before stays, the next one is written."""

    def action() -> None:
        one = saver(tmp_path, asynchronous)
        assert saved(one, 1).error is None
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, most))
        outcome = saved(one, 2)
        assert outcome.folder is None and "rank 0: [Errno 27] File too large: '" in outcome.error, outcome
        assert "/.step_00000002.partial/model/model-00001-of-00001.safetensors" in outcome.error
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        assert saved(one, 3).error is None

    in_child(action)
    assert store.newest_verified(tmp_path)[0].name == "step_00000003"
    store.verify(tmp_path / "step_00000001")


def test_a_folder_that_may_not_be_written(tmp_path):
    """Root may write everywhere: it becomes nobody first."""
    checkpoints = tmp_path / "checkpoints"
    saved(saver(checkpoints), 1)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest-", "test_")):
            folder.chmod(0o755)
    checkpoints.chmod(0o555)

    def action() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        outcome = saved(saver(checkpoints), 2)
        assert outcome.folder is None and "Permission denied" in outcome.error, outcome
        assert ".step_00000002.partial" in outcome.error

    in_child(action)
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000001"]


def test_an_error_in_the_program_is_raised_where_the_loop_asks(tmp_path):
    """Not every failure is the disk's."""
    one = saver(tmp_path)
    with patch("megagpt2.checkpoint.saver.save_checkpoint", side_effect=ZeroDivisionError("a bug")):
        one.save(snapshot(1))
        with pytest.raises(ZeroDivisionError, match="a bug"):
            one.outcome(wait=True)

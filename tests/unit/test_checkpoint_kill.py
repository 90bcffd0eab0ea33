"""Invariant I7: killed in front of, or in the middle of, any change to the disk, a run goes on from a whole checkpoint.

A child process saves or prunes, and counts what it asks the system to do: the walk kills it at the first of these, then
at the second, and so on to the end. Of two processes that save together one is killed, and the other one must see it.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megagpt2.checkpoint import store
from megagpt2.checkpoint.load import choose, open_checkpoint
from megagpt2.checkpoint.saver import Retention, Saver
from megagpt2.checkpoint.shards import Slices
from megagpt2.checkpoint.snapshot import Snapshot, TrainingState
from megagpt2.model.parameters import Extent, Spec, partition
from megagpt2.parallel.topology import Topology
from tests.support.children import child, exit_code
from tests.support.models import model_config
from tools.checkpoint import main as checkpoint_tool

CHANGES = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")
CONFIG = model_config(layers=1, width=6, heads=3, vocabulary=20, context=4)
KINDS = ("exp_avg", "exp_avg_sq")
ALONE = Topology()


def extents(grid: Topology = ALONE) -> list[Extent]:
    """What a rank holds: shards have some of every matrix's rows."""
    from megagpt2.model.gpt2 import GPT2
    from megagpt2.model.layers import DenseBuilder

    def here(spec: Spec) -> Spec:
        if grid.tensor == 1 or len(spec.shape) == 1:
            return spec
        return replace(spec, dim=0, ranges=(partition(spec.shape[0], grid.tensor, grid.shard),), padding=0)

    with torch.device("meta"):
        return [Extent.whole(here(parameter.spec)) for parameter in GPT2(CONFIG, DenseBuilder(0)).parameters()]


def snapshot(step: int, grid: Topology = ALONE) -> Snapshot:
    """Weights and moments whose every element is the step. Each replica holds a stretch of the moments."""
    places = extents(grid)
    values = [torch.full((place.elements,), float(step)) for place in places]
    stretches = [Extent(place.spec, *partition(place.elements, grid.data, grid.replica)) for place in places]
    moments = [dict.fromkeys(KINDS, torch.full((stretch.elements,), float(step))) for stretch in stretches]
    return Snapshot(
        places, values, Slices(KINDS, stretches, moments), TrainingState(step, 8 * step, step), CONFIG, torch.float32
    )


def save(checkpoints: Path, step: int, grid: Topology = ALONE) -> None:
    saver = Saver(checkpoints, grid, None, True, Retention(keep=2))
    saver.save(snapshot(step, grid))
    outcome = saver.outcome(wait=True)
    assert outcome.error is None and outcome.note is None, outcome


def counted(action: Callable[[], object], number: int | None) -> Callable[[], None]:
    """`action` for a child that is killed at its change `number` to the disk, counted from 1, half of it done if it is
    a write."""
    count = 0

    def watched(name: str):
        plain = getattr(os, name)

        def change(*args, **kwargs):
            nonlocal count
            if name == "open" and not args[1] & os.O_CREAT:
                return plain(*args, **kwargs)
            count += 1
            if count == number:
                if name == "write":
                    plain(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        return change

    def watch_and_act() -> None:
        for name in CHANGES:
            setattr(os, name, watched(name))
        action()

    return watch_and_act


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Whether a child that does `action` came as far as its change `number`, where it was killed."""
    code = exit_code(child(counted(action, number)))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def step_resumed(checkpoints: Path) -> int:
    """Where the next start goes on, its state looked at."""
    folder, _ = choose("auto", checkpoints)
    loaded = open_checkpoint(folder, CONFIG)
    step = loaded.state.step
    for extent in extents():
        expected = torch.full((extent.elements,), float(step))
        if extent.spec.padding:
            expected.view(extent.spec.local_shape)[-extent.spec.padding :] = 0
        assert torch.equal(loaded.weight(extent, torch.float32), expected)
        assert torch.equal(loaded.state_of("exp_avg_sq", extent), expected)
    return step


def nothing_stands_in_the_way(checkpoints: Path) -> None:
    """What was left neither hinders the next save nor stays."""
    save(checkpoints, 40)
    assert step_resumed(checkpoints) == 40
    assert sorted(path.name for path in checkpoints.iterdir())[-1] == "step_00000040"
    assert not [path for path in checkpoints.iterdir() if path.name.startswith(".")]


def runs(folder: Path, *steps: int) -> Iterator[tuple[int, Path]]:
    """For each number of a walk, from 1 on, a run of its own with checkpoints of these steps."""
    for number in itertools.count(1):
        for step in steps:
            Saver(folder / str(number), ALONE, None, False).save(snapshot(step))
        yield number, folder / str(number)


def test_killed_at_every_change_of_a_save_and_of_a_removal(tmp_path):
    """The third save removes the first one. Before the last rename a start takes step 20, after it step 30."""
    seen = []
    for number, checkpoints in runs(tmp_path, 10, 20):
        killed = killed_at(number, partial(save, checkpoints, 30))
        seen.append(step_resumed(checkpoints))
        nothing_stands_in_the_way(checkpoints)
        if not killed:
            break
    assert number > 60, "the walk was short: were the changes counted?"
    assert seen == sorted(seen) and set(seen) == {20, 30}


@pytest.mark.parametrize("newest_damaged", [False, True])
def test_killed_at_every_change_of_a_prune(newest_damaged, tmp_path):
    """What is still there is whole, the newest whole one always is, and the next prune ends what this one began."""
    whole, newest = ({10, 20, 25}, 25) if newest_damaged else ({10, 20, 25, 30}, 30)
    for number, checkpoints in runs(tmp_path, 10, 20, 25, 30):
        if newest_damaged:
            os.truncate(checkpoints / "step_00000030/state.json", 10)
        prune = ["prune", str(checkpoints), "--keep", "1"]
        killed = killed_at(number, partial(checkpoint_tool, prune))
        left = {store.step_of(folder): folder for folder in store.all_steps(checkpoints)}
        for step in left.keys() & whole:
            store.verify(left[step])
        assert newest in left and step_resumed(checkpoints) == newest
        assert checkpoint_tool(prune) == 0
        assert {path.name for path in checkpoints.iterdir()} == {f"step_{step:08d}" for step in {newest, 30}}
        nothing_stands_in_the_way(checkpoints)
        if not killed:
            break
    assert number > 20, "the walk was short: were the changes counted?"


@pytest.fixture(scope="module")
def meeting_point():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def save_together(rank: int, grid: Topology, checkpoints: Path, port: int, name: str) -> None:
    """Rank `rank`'s part in saving step 30, every tensor in a file of its own replica."""
    meeting_point = dist.PrefixStore(name, dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group(
        "gloo", store=meeting_point, rank=rank, world_size=grid.world_size, timeout=timedelta(seconds=20)
    )
    with patch("megagpt2.checkpoint.snapshot.MODEL_FILE", 1):
        save(checkpoints, 30, grid.place_of(rank))


@pytest.mark.parametrize(
    ("grid", "faulty"),
    [
        pytest.param(Topology(tensor=2), 0, id="tp2-0", marks=pytest.mark.slow),
        pytest.param(Topology(tensor=2), 1, id="tp2-1"), pytest.param(Topology(data=2), 0, id="dp2-0"),
        pytest.param(Topology(data=2), 1, id="dp2-1", marks=pytest.mark.slow),
    ],
)
def test_one_of_two_processes_killed_at_every_change_of_a_save(grid, faulty, meeting_point, tmp_path):
    """The other one fails at once rather than wait, or had nothing more to wait for."""
    seen = []
    for number, checkpoints in runs(tmp_path, 10, 20):
        name = f"{grid} {faulty} {number}"
        processes = [
            child(counted(
                partial(save_together, rank, grid, checkpoints, meeting_point.port, name),
                number if rank == faulty else None,
            ))
            for rank in range(grid.world_size)
        ]
        codes = [exit_code(process) for process in processes]
        killed = codes[faulty] == -signal.SIGKILL
        assert killed or codes == [0, 0]
        assert codes[1 - faulty] in (0, 1)
        seen.append(step_resumed(checkpoints))
        assert seen[-1] == 30 or codes[1 - faulty] == 1
        nothing_stands_in_the_way(checkpoints)
        if not killed:
            break
    assert number > 10, "the walk was short: were the changes counted?"
    assert seen == sorted(seen) and set(seen) == {20, 30}
    model = checkpoints / "step_00000030/model"
    assert len(list(model.glob("*.safetensors"))) == grid.data
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all((weight == 30.0).all() for weight in weights.values())

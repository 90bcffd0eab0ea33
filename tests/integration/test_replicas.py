"""launch/pretrain.py --check-replicas N: what a user sees when a bit flips (more in tests/distributed)."""

from __future__ import annotations

import sys

from tests.support.runs import ROOT, end_all, events, pretrain_command, start_ranks, steps, tiny_config

# A rank of the run, in which the second one's memory changes a bit after its fourth step.
_PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
from launch.pretrain import main
from megagpt2.training.loop import Loop
from tests.support.replicas import flip_lowest_bit

one_step = Loop._one_step
def step(loop):
    one_step(loop)
    if loop.progress.step == 4 and os.environ["RANK"] == "1":
        flip_lowest_bit(loop.engine.module, "h.0.ln_1.weight")
Loop._one_step = step
sys.exit(main())
"""


def test_a_flipped_bit_ends_the_run_before_it_is_saved(text, tmp_path):
    config = tiny_config(text, tmp_path / "run", **{"training.steps": 8})
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM.format(root=str(ROOT)))
    _, _, *arguments = pretrain_command(config)
    ends = end_all(start_ranks([[sys.executable, program, *arguments, "--check-replicas", "2"]] * 2))
    assert [end.code for end in ends] == [1, 1], ends[0]
    assert "h.0.ln_1.weight: ranks 0, 1 differ among each other" in ends[0].errors
    assert "Traceback" not in ends[0].errors + ends[1].errors and not ends[1].errors.count("differ among")
    assert steps(config.run.directory) == [1, 2, 3, 4]  # every second step is compared
    told = [event for event in events(config.run.directory) if "replicas" in event or "differ" in event]
    assert [event.split()[0] for event in told] == ["replicas", "parameters"]
    assert not list(config.run.directory.glob("checkpoints/step_*"))

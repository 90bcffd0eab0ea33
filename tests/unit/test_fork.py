"""tests/support/fork.py: a forked program finds what `python PROGRAM` gives it, and leaves as it does."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.support.runs import Process, end_all, wait_until

PROGRAM = """
import atexit, json, os, sys, time
atexit.register(print, "at exit")
names = ("RANK", "MEGAGPT2_OPERATORS")
print(json.dumps([__name__, sys.argv, {name: os.environ.get(name) for name in names}, os.getsid(0) == os.getpid()]))
print("to errors", file=sys.stderr, flush=True)
if sys.argv[1] == "wait":
    open(sys.argv[2], "w").close()
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_it_is_the_same_program_either_way(program):
    ends = end_all([Process([sys.executable, program, "7", "x y"], {"RANK": "3"}, forked) for forked in (True, False)])
    assert ends[0] == ends[1]
    assert ends[0].code == 7 and ends[0].output.endswith('{"RANK": "3", "MEGAGPT2_OPERATORS": null}, true]\nat exit\n')


def test_a_signal_ends_it(program, tmp_path):
    process = Process([sys.executable, program, "wait", tmp_path / "started"], {}, forked=True)
    wait_until((tmp_path / "started").exists, [process])
    process.signal(signal.SIGTERM)
    [end] = end_all([process])
    assert end.code == -signal.SIGTERM and end.errors == "to errors\n"

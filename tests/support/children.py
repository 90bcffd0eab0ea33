"""Forked children of a test, whose limits, user and system calls it may change."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch


def child(action: Callable[[], object]) -> int:
    """Fork a process that does `action` and exits, with 1 and the traceback where it failed; returns its number."""
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)  # the parent's threads are not here, and libgomp would wait for them
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def exit_code(process: int) -> int:
    """Of a child, waited for; the signal's negative where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def in_child(action: Callable[[], object]) -> None:
    """Do it in a child; fails where it does."""
    assert exit_code(child(action)) == 0

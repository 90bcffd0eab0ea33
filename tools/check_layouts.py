"""Train the small model on every legal layout, and tabulate how far each is from plain torch on one process.

    python tools/check_layouts.py                                     all of them: some 25 minutes on two cores
    python tools/check_layouts.py --pairwise                          a few with every pair of choices: the fast tests'
    python tools/check_layouts.py --update docs/measurements.md       and write the table there
    python tools/check_layouts.py --precision fp32 --ranks 1 2

The model has 4 layers, 5 heads and dropout 0.1; the layouts are all that rules.py allows on 1 to 4 ranks.
Errors are max|a - b| / max|b| per tensor, the largest of all tensors, against plain torch in fp32 (parity.py in
tests/support says more). Exit code 1 if a layout is over invariant I1's limits (fp32) or I2's (bf16).
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from dataclasses import astuple
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megagpt2.config.rules import Plan  # noqa: E402
from tests.support.matrix import COVERED, WORLDS, References, all_layouts, check_layout, fast_cover  # noqa: E402
from tests.support.parity import Errors  # noqa: E402
from tests.support.pool import Pool  # noqa: E402
from tools import sections  # noqa: E402

PRECISIONS = ("fp32", "bf16")
TOLD_EVERY = 10  # layouts, where the progress bar has no terminal
SECTION = "layouts"


def markdown(rows: dict[str, dict[str, Errors]], plain: Errors, seconds: float) -> str:
    """One line a layout: fp32's and bf16's errors beside each other."""
    worst = {
        precision: Errors(*(max(values) for values in zip(*map(astuple, having), strict=True)))
        for precision in ("fp32", "bf16") if (having := [row[precision] for row in rows.values() if precision in row])
    }
    lines = [
        f"{len(rows)} layouts in {seconds / 60:.0f} minutes on {platform.machine()}, torch {torch.__version__}. Plain"
        f" torch's own bf16 is {plain.loss:.1e} (loss) and {plain.gradient:.1e} (gradients) from its fp32.",
        "",
        "| layout | fp32: loss | gradient norm | gradients | weights after 5 steps | bf16: loss | gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in {**rows, "**largest**": worst}.items():
        exact, rounded = row.get("fp32"), row.get("bf16")
        cells = [f"{e:.1e}" for e in (exact.loss, exact.norm, exact.gradient, exact.weight)] if exact else [""] * 4
        cells += [f"{e:.1e}" for e in (rounded.loss, rounded.gradient)] if rounded else [""] * 2
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Progression:
    """How far it is: a bar on a terminal, else a line on stderr every few layouts and after each number of ranks."""

    def __init__(self, plans: list[Plan], console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._plans, self._done, self._begin = plans, 0, time.monotonic()
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("layouts", total=len(plans)) if self._bar else None

    def __enter__(self) -> Progression:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def begins(self, plan: Plan) -> None:
        if self._bar:
            self._bar.update(self._task, description=f"{plan.name} {plan.precision}")

    def ended(self, plan: Plan) -> None:
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)
            return
        following = self._plans[self._done : self._done + 1]
        if self._done % TOLD_EVERY == 0 or [after.world_size for after in following] != [plan.world_size]:
            minutes = (time.monotonic() - self._begin) / 60
            print(
                f"layouts: {self._done} of {len(self._plans)} after {minutes:.1f} minutes, the last one {plan.name}"
                f" {plan.precision}", file=sys.stderr, flush=True,
            )


def why_no_table(arguments: argparse.Namespace) -> str | None:
    """Why --update can't be: the table of the page is of all layouts in both precisions, in a place of its own."""
    given = {
        "--pairwise": arguments.pairwise, "--ranks": arguments.ranks is not None,
        "--precision": arguments.precision is not None,
    }
    if partial := [option for option, is_given in given.items() if is_given]:
        return (
            f"--update writes the table of all layouts over {arguments.update}'s, and {' and '.join(partial)} would"
            " leave some out: give --update alone, or leave it out"
        )
    return sections.problem(arguments.update, SECTION)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: both")
    parser.add_argument("--ranks", nargs="+", type=int, choices=WORLDS, metavar="N", help="default: 1 to 4")
    parser.add_argument("--pairwise", action="store_true", help="only the fast tests' cover, of 1, 2 and 4 ranks")
    where = " and ".join(sections.marks(SECTION))
    parser.add_argument("--update", type=Path, metavar="FILE", help=f"write the table between {where}")
    arguments = parser.parse_args(argv)
    if arguments.update and (why := why_no_table(arguments)):
        print(f"layouts: {why}", file=sys.stderr)
        return 2
    choose, worlds = (fast_cover, COVERED) if arguments.pairwise else (all_layouts, WORLDS)
    plans = choose(arguments.precision or PRECISIONS, arguments.ranks or worlds)
    console, begin = Console(highlight=False, soft_wrap=True), time.monotonic()
    pool, failed = Pool(max(plan.world_size for plan in plans)), 0
    rows: dict[str, dict[str, Errors]] = {}
    try:
        references = References(pool)
        plain = Errors.of(references.of("bf16", 1), references.of("fp32", 1))
        with Progression(plans, console) as progress:
            for plan in plans:
                progress.begins(plan)
                try:
                    rows.setdefault(plan.name, {})[plan.precision] = check_layout(pool, plan, references)
                except AssertionError as error:
                    failed += 1
                    console.print(f"{plan.name} in {plan.precision}: {error}", markup=False)
                progress.ended(plan)
    finally:
        pool.stop()
    text = markdown(rows, plain, time.monotonic() - begin)
    console.print(text, markup=False)
    if arguments.update and not failed:
        sections.replace(arguments.update, SECTION, text)
    if failed:
        print(f"layouts: {failed} of {len(plans)} are over the limits", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

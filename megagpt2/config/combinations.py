"""The generated tables of docs/parallelism.md: what combines with what, found by asking `check`, and what it answers.

python -m megagpt2.config.combinations docs/parallelism.md     writes them anew between their markers
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from megagpt2.config.facts import Facts
from megagpt2.config.load import write_atomically
from megagpt2.config.rules import RULES, IllegalRequest, check, violations
from megagpt2.config.schema import Config, Recomputation

FEATURES: dict[str, dict[str, Any]] = {
    "TP": {"parallel.tensor_parallel": 2},
    "SP": {"parallel.tensor_parallel": 2, "parallel.sequence_parallel": True},
    "PP": {"parallel.pipeline_parallel": 2},
    **{f"ZeRO {stage}": {"parallel.zero_stage": stage} for stage in range(4)},
    **{name: {"parallel.activation_checkpointing": name} for name in get_args(Recomputation) if name != "none"},
    **{name: {"training.precision": name} for name in ("bf16", "fp16", "fp32")},
    **{
        f"{what} {where}": {f"offload.{what}": where, **({"offload.nvme_path": "nvme"} if where == "nvme" else {})}
        for what in ("optimizer", "parameters") for where in ("cpu", "nvme")
    },
}
"""What can be asked for, as changes to a request that asks for nothing of it."""

NEEDS: dict[str, dict[str, Any]] = {
    name: {"parallel.zero_stage": 3} for name in ("optimizer nvme", "parameters cpu", "parameters nvme")
}
"""What is asked for with it, where nothing else is said."""

LAYOUT_RULES = (
    "world-divides", "heads-over-tensor", "matrices-over-tensor", "layers-over-pipeline", "zero-with-pipeline",
    "sequence-needs-tensor", "sequence-splits", "sequence-fits", "batch-divides", "ramp-fits", "fp16-usable",
    "bf16-usable", "optimizer-offload", "parameters-offload",
)
"""The rules that speak of layouts; the others are in docs/reference/config.md."""

DEVICES: dict[str, Facts] = {
    "GPU from compute capability 8.0 on": Facts(8, "cuda", bf16=True, fp16=True, nvme=True),
    "older GPU": Facts(8, "cuda", bf16=False, fp16=True),
    "CPU with bf16 and fp16 instructions": Facts(8, "cpu", bf16=True, fp16=True),
    "CPU with bf16 instructions": Facts(8, "cpu", bf16=True),
    "other CPU": Facts(8, "cpu"),
}

EXAMPLES: tuple[tuple[int, dict[str, Any]], ...] = (
    (6, {"parallel.tensor_parallel": 4}),
    (8, {"parallel.pipeline_parallel": 2, "parallel.zero_stage": 3}),
    (8, {"parallel.sequence_parallel": True}),
    (8, {"parallel.tensor_parallel": 8}),
    (8, {"batch.global_batch": 100}),
)
"""(ranks, changes) of requests that are refused."""


def base_config() -> Config:
    """A small request that any device and number of ranks up to 8 allows; 5 heads, which 2 does not divide."""
    return Config.model_validate({
        "model": {"layers": 4, "width": 320, "heads": 5},
        "batch": {"global_batch": 64, "micro_batch": 2},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 100},
    })


def together(*features: str) -> dict[str, Any] | None:
    """The changes that ask for all of them, or None where two want another value of the same field."""
    changes: dict[str, Any] = {}
    for feature in features:
        for field, value in FEATURES[feature].items():
            if changes.setdefault(field, value) != value:
                return None
    for feature in features:
        for field, value in NEEDS.get(feature, {}).items():
            changes.setdefault(field, value)
    return changes


def combinations_table() -> str:
    """Each feature with each other on eight GPUs; a refusal names its rule below."""
    facts, notes = DEVICES["GPU from compute capability 8.0 on"], []
    lines = [_row(["", *FEATURES]), _row(["---"] * (len(FEATURES) + 1))]
    for row in FEATURES:
        cells = []
        for column in FEATURES:
            changes = together(row, column)
            if changes is None or row == column:
                cells.append("")
                continue
            broken = [violation.rule for violation in violations(base_config().replace(changes), facts)]
            notes += [rule for rule in broken if rule not in notes]
            cells.append("no " + ", ".join(f"({notes.index(rule) + 1})" for rule in broken) if broken else "yes")
        lines.append(_row([f"**{row}**", *cells]))
    forbids = {rule.name: rule.forbids for rule in RULES}
    return "\n".join([*lines, "", *(f"({number}) {forbids[rule]}" for number, rule in enumerate(notes, 1))]) + "\n"


def precisions_table() -> str:
    """Each precision on each kind of device."""
    names = ("bf16", "fp16", "fp32", "auto")
    lines = [_row(["", *names]), _row(["---"] * (len(names) + 1))]
    for device, facts in DEVICES.items():
        cells = []
        for name in names:
            try:
                plan = check(base_config().replace({"training.precision": name}), facts)
            except IllegalRequest:
                cells.append("no")
            else:
                answer = plan.precision if name == "auto" else "yes"
                cells.append(answer + (", emulated: slow" if any("emulates" in text for text in plan.warnings) else ""))
        lines.append(_row([device, *cells]))
    return "\n".join(lines) + "\n"


def layout_rules_table() -> str:
    """What is refused of layouts."""
    rules = {rule.name: rule for rule in RULES}
    return "\n".join(["| Refused |", "|---|", *(_row([rules[name].forbids]) for name in LAYOUT_RULES)]) + "\n"


def examples_list() -> str:
    """What a refusal says."""
    facts, lines = DEVICES["GPU from compute capability 8.0 on"], []
    for ranks, changes in EXAMPLES:
        asked = " ".join(f"{field}={str(value).lower()}" for field, value in changes.items())
        lines.append(f"    {ranks} ranks, {asked}")
        found = violations(base_config().replace(changes), replace(facts, world_size=ranks))
        lines += [f"        {violation}" for violation in found]
    return "\n".join(lines) + "\n"


TABLES: Mapping[str, Callable[[], str]] = {
    "combinations": combinations_table,
    "precisions": precisions_table,
    "rules": layout_rules_table,
    "refusals": examples_list,
}


def filled(text: str) -> str:
    """The page with every table as it is now, between `<!-- table NAME -->` and `<!-- end -->`.

    Raises ValueError where a table has no place in the page, or a place no table.
    """
    pattern = re.compile(r"(<!-- table (\w+)[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
    places = [match[1] for match in pattern.findall(text)]
    if sorted(places) != sorted(TABLES):
        raise ValueError(f"the page has places for the tables {places}, the tables are {list(TABLES)}")
    return pattern.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", text)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    """Exit code."""
    if len(argv) != 1:
        print("usage: python -m megagpt2.config.combinations docs/parallelism.md", file=sys.stderr)
        return 2
    page = Path(argv[0])
    write_atomically(page, filled(page.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

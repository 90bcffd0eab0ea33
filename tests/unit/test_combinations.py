"""docs/parallelism.md says what the rules say."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest

from megagpt2.config import combinations as tables
from megagpt2.config.rules import RULES, violations

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
FACTS = tables.DEVICES["GPU from compute capability 8.0 on"]


def test_the_committed_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python -m megagpt2.config.combinations docs/parallelism.md"


def test_a_table_that_is_not_current_is_replaced_and_a_missing_one_refused(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(text.replace("| **PP** | yes |", "| **PP** | no |"), encoding="utf-8")
    assert tables.main([str(page)]) == 0
    assert page.read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match="the page has places for the tables"):
        tables.filled(text.replace("table rules", "table ruled"))


def test_several_features_are_legal_where_each_pair_is() -> None:
    """What the page says of its table: no rule needs three features to be broken."""

    def legal(*features: str) -> bool:
        changes = tables.together(*features)
        return changes is not None and not violations(tables.base_config().replace(changes), FACTS)

    pairs = {pair: legal(*pair) for pair in combinations(tables.FEATURES, 2)}
    stages, recompute = [f"ZeRO {stage}" for stage in range(4)], ["selective", "full", "full_offload"]
    checked = 0
    for layout, zero, again, precision in product(
        (("TP",), ("PP",), ("TP", "SP"), ("TP", "PP"), ("TP", "SP", "PP")), stages, recompute, ("bf16", "fp16", "fp32")
    ):
        asked = (*layout, zero, again, precision)
        assert legal(*asked) == all(pairs[pair] for pair in combinations(asked, 2)), asked
        checked += 1
    assert checked == 180
    for layout, zero, optimizer, parameters in product(
        (("TP",), ("PP",), ("TP", "SP")), stages, ("optimizer cpu", "optimizer nvme"),
        ((), ("parameters cpu",), ("parameters nvme",)),
    ):
        asked = (*layout, zero, optimizer, *parameters)
        assert legal(*asked) == all(pairs[pair] for pair in combinations(asked, 2)), asked


def test_offload_needs_what_the_rules_say() -> None:
    """NVMe and parameters want ZeRO 3, which has no pipeline; states in main memory go with every stage."""

    def legal(*features: str) -> bool:
        return not violations(tables.base_config().replace(tables.together(*features)), FACTS)

    for stage in range(4):
        assert legal("optimizer cpu", f"ZeRO {stage}")
        for feature in ("optimizer nvme", "parameters cpu", "parameters nvme"):
            assert legal(feature, f"ZeRO {stage}") == (stage == 3)
            assert legal(feature, "TP") and not legal(feature, "PP")
    assert tables.together("optimizer cpu", "optimizer nvme") is None


def test_the_rules_that_are_listed_exist() -> None:
    assert set(tables.LAYOUT_RULES) <= {rule.name for rule in RULES}


def test_every_example_is_refused() -> None:
    assert all(len(block.splitlines()) > 1 for block in tables.examples_list().split("ranks, ")[1:])

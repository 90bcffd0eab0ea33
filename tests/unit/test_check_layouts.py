"""tools/check_layouts.py: what it trains, and that no partial table takes a full one's place."""

from __future__ import annotations

import pytest

from tests.support.matrix import COVERED, fast_cover
from tools import check_layouts as tool
from tools.sections import marks


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--pairwise"], "--pairwise would leave some out"), (["--ranks", "1", "2"], "--ranks would leave some out"),
        (["--precision", "fp32", "--pairwise"], "--pairwise and --precision would leave some out"),
    ],
)
def test_a_partial_table_is_not_written(tmp_path, capsys, options, named):
    page = tmp_path / "page.md"
    page.write_text("\nthe full table\n".join(marks(tool.SECTION)))
    assert tool.main(["--update", str(page), *options]) == 2
    assert named in capsys.readouterr().err
    assert "the full table" in page.read_text()


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no table\n")
    assert tool.main(["--update", str(page)]) == 2
    assert f"lacks {marks(tool.SECTION)[0]}" in capsys.readouterr().err
    assert tool.main(["--update", str(tmp_path / "nowhere.md")]) == 2
    assert "nowhere.md can't be read" in capsys.readouterr().err


def test_pairwise_is_what_the_fast_tests_train(monkeypatch):
    from tests.distributed import test_matrix

    asked = []

    class Asked(Exception):  # noqa: N818
        pass

    def stop(plans, console):
        asked.extend(plans)
        raise Asked

    monkeypatch.setattr(tool, "Pool", lambda ranks: type("Pool", (), {"stop": lambda self: None})())
    monkeypatch.setattr(tool, "References", lambda pool: type("References", (), {"of": lambda *_: None})())
    monkeypatch.setattr(tool.Errors, "of", lambda *_: None)
    monkeypatch.setattr(tool, "Progression", stop)
    with pytest.raises(Asked):
        tool.main(["--pairwise"])
    assert asked == test_matrix.COVER == fast_cover()
    assert {plan.world_size for plan in asked} == set(COVERED)


def test_progress_is_told_where_there_is_no_terminal(capsys):
    plans = fast_cover()[:12]
    with tool.Progression(plans, tool.Console(force_terminal=False)) as progress:
        for plan in plans:
            progress.begins(plan)
            progress.ended(plan)
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("layouts: 12 of 12 after ")
    assert any(line.startswith("layouts: 10 of 12 after ") for line in told)

"""Benchmarks write one schema, so that results can be compared and checked (DESIGN section 10)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from megagpt2.kernels.extension import EXTENSION
from tests.support.runs import ROOT
from tools.bench import common
from tools.sections import marks

# name -> what makes it small
SMALL = {
    "attention": ["--tokens", "32", "--lengths", "16"],
    "break_even": ["--most", "1024"], "checkpoint": ["--layers", "1", "--width", "64"],
    "dropout": ["--elements", "8000"], "kernels": ["--small"],
    "replicas": ["--layers", "1", "--width", "64"],
}


def test_every_benchmark_is_tested():
    assert {path.stem for path in (ROOT / "tools/bench").glob("*.py")} - {"common"} == set(SMALL)


@pytest.mark.skipif(not EXTENSION.compiled, reason=f"the operators are not compiled: {EXTENSION.reason}")
@pytest.mark.parametrize("name", SMALL)
def test_rows_follow_the_schema(name, tmp_path):
    file = tmp_path / "out" / "rows.json"
    command = [sys.executable, ROOT / f"tools/bench/{name}.py", "--repetitions", "1", "--json", file, *SMALL[name]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # as users have it
    end = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert end.returncode == 0, end.stderr
    written = json.loads(file.read_text())
    assert set(written) == {"machine", "rows"} and {"processor", "cores", "torch"} <= set(written["machine"])
    assert written["rows"]
    for row in written["rows"]:
        assert set(row) == {"bench", "case", "metric", "value", "unit", "higher_is_better", "peers", "limit"}
        assert row["bench"] == name and row["case"].rsplit(" ", 1)[0] in end.stdout
        numbers = [row["value"], *row["peers"].values(), *([] if row["limit"] is None else [row["limit"]])]
        assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_a_table_is_written_into_a_page(tmp_path, monkeypatch, capsys):
    """A GPU's has a place of its own."""
    monkeypatch.setattr(sys, "argv", ["tools/bench/some.py"])
    page = tmp_path / "page.md"
    page.write_text("before {} old {} between {} old {} after".format(*marks("some"), *marks("some_cuda")))
    row = common.Row("some", "a case", "speed", 3.0, "GB/s", peers={"eager": 2.0}, limit=4.0)
    parser = common.arguments("", 3)
    parser.add_argument("--device", default="cpu")
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(common, "machine", lambda device: {"processor": f"a {device}"})
        common.report([row], parser.parse_args(["--update", str(page), "--device", device]), device)
    (begin, end), (begin_cuda, end_cuda) = marks("some"), marks("some_cuda")
    on_cpu, on_cuda = (f"```\nprocessor a {device}\n{common.table([row])}\n```" for device in ("cpu", "cuda"))
    assert page.read_text() == (
        f"before {begin}\n{on_cpu}\n{end} between {begin_cuda}\n{on_cuda}\n{end_cuda} after"
    )
    assert "a case" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--update", "none.md"], "none.md can't be read"),
        (["--update", "plain.md"], "plain.md lacks <!-- some: begin -->"),
        (["--update", "page.md", "--small"], "writes the whole table, not that of --small"),
    ],
)
def test_what_can_not_be_updated_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, arguments, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tools/bench/some.py"])
    (tmp_path / "plain.md").write_bytes(b"nothing")
    (tmp_path / "page.md").write_text("{}{}".format(*marks("some")))
    parser = common.arguments("", 3)
    parser.add_argument("--small", action="store_true")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2 and says in capsys.readouterr().err

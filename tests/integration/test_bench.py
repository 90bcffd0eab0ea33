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

# name -> what makes it small
SMALL = {
    "break_even": ["--most", "1024"], "dropout": ["--elements", "8000"], "kernels": ["--small"],
    "replicas": ["--layers", "1"],
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

"""The architecture, enforced: who may import whom, no `global`, no pickle.

    config <- kernels, data <- model <- parallel <- training

Packages that don't exist yet are no violation; a package that isn't in the table is one.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megagpt2"

MODEL = {"config", "kernels", "data"}
PARALLEL = MODEL | {"model"}
CHECKPOINT = PARALLEL | {"parallel"}
MAY_IMPORT = {
    "config": set(),
    "kernels": {"config"},
    "data": {"config"},
    "model": MODEL,
    "parallel": PARALLEL,
    # for the numbers that monitor and planner share; saving and sampling are handed to it as callables
    "training": PARALLEL | {"parallel", "planning"},
    "checkpoint": CHECKPOINT,
    "generation": CHECKPOINT | {"checkpoint"},
    "evaluation": CHECKPOINT | {"checkpoint"},
    "finetuning": CHECKPOINT | {"checkpoint", "training"},
    "planning": {"config", "model", "parallel"},
    "run": CHECKPOINT | {"checkpoint", "training", "generation", "planning"},  # what the programs in launch/ share
}
COMPILED = "_C"  # csrc, behind the dispatch of kernels/
SCRIPTS = {"launch", "tools", "tests"}  # they import the package, never the other way round
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "joblib"}


def imported_names(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere; `package` is what relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def import_problem(name: str, importer: str, layers: set[str]) -> str | None:
    """Why the layer `importer` ("" for a file in the package's own folder) must not import `name`."""
    top, _, rest = name.partition(".")
    if top in PICKLES:
        return f"imports {top}: nothing of ours is pickled"
    if top in SCRIPTS:
        return f"imports {top}/: only scripts import scripts"
    target = rest.partition(".")[0]
    if top != PACKAGE.name or target == importer:
        return None
    if target == COMPILED:
        return None if importer == "kernels" else f"imports {name}: only kernels/ calls compiled operators"
    if target in layers and target not in MAY_IMPORT.get(importer, set()):
        return f"imports {name}: {importer or 'the top level'} must not import {target}"
    return None


def violations(root: Path) -> list[str]:
    """What is against the rules in the package at `root`, as `file:line: what`."""
    found = []
    folders = {path.parent.relative_to(root).parts[0] for path in root.glob("*/**/*.py")}
    found += [f"{folder}/: isn't in the table of layers" for folder in sorted(folders - set(MAY_IMPORT))]
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        importer = parts[0] if len(parts) > 1 else ""
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        where = path.relative_to(root)
        for line, name in imported_names(tree, [PACKAGE.name, *parts[:-1]]):
            problem = import_problem(name, importer, set(MAY_IMPORT) | folders)
            if problem:
                found.append(f"{where}:{line}: {problem}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                found.append(f"{where}:{node.lineno}: global {', '.join(node.names)}: pass it as an argument")
    return found


def test_the_package_keeps_to_its_layers() -> None:
    assert violations(PACKAGE) == []


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, allowed in MAY_IMPORT.items() if name not in done and allowed <= done}
        assert ready, f"a cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("model/a.py", "from megagpt2.parallel import topology", "model must not import parallel"),
        ("model/a.py", "import megagpt2.parallel.topology as t", "model must not import parallel"),
        ("model/a.py", "from megagpt2 import parallel", "model must not import parallel"),
        ("model/a.py", "from ..parallel.topology import Topology", "model must not import parallel"),
        ("model/a.py", "from .. import parallel", "model must not import parallel"),
        ("model/deep/a.py", "from ...parallel import topology", "model must not import parallel"),
        ("model/a.py", "def f():\n    import megagpt2.parallel", "a.py:2: imports"),
        ("model/a.py", "import importlib\nimportlib.import_module('megagpt2.parallel')", "a.py:2: imports"),
        ("kernels/a.py", "from megagpt2.data import order", "kernels must not import data"),
        ("data/a.py", "from megagpt2.kernels import philox", "data must not import kernels"),
        ("config/a.py", "from megagpt2.model import gpt2", "config must not import model"),
        ("training/a.py", "from megagpt2.checkpoint import save", "training must not import checkpoint"),
        ("training/a.py", "from megagpt2.generation import sampling", "training must not import generation"),
        ("training/a.py", "from megagpt2.evaluation import harness", "training must not import evaluation"),
        ("checkpoint/a.py", "from megagpt2.training import step", "checkpoint must not import training"),
        ("evaluation/a.py", "from megagpt2.training import step", "evaluation must not import training"),
        ("planning/a.py", "from megagpt2.training import step", "planning must not import training"),
        ("planning/a.py", "from megagpt2.data import order", "planning must not import data"),
        ("__init__.py", "from megagpt2.config import Config", "the top level must not import config"),
        ("model/a.py", "import megagpt2._C", "only kernels/ calls compiled operators"),
        ("model/a.py", "from tools import plan", "only scripts import scripts"),
        ("checkpoint/a.py", "import pickle", "nothing of ours is pickled"),
        ("checkpoint/a.py", "from pickle import loads", "nothing of ours is pickled"),
        ("model/a.py", "x = 0\ndef f():\n    global x\n    x = 1", "a.py:3: global x"),
        ("helpers/a.py", "x = 0", "isn't in the table of layers"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    [found] = violations(tmp_path)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "model/a.py",
            "from megagpt2.model.layers import Builder\nfrom . import layers\nfrom .. import __version__",
        ),
        (
            "model/a.py",
            "from megagpt2.config import Config\nfrom megagpt2.kernels import dropout\nimport torch",
        ),
        ("training/a.py", "from megagpt2.planning.time import flops\nfrom megagpt2.parallel import topology"),
        ("finetuning/a.py", "from megagpt2.training import step\nfrom megagpt2.checkpoint import load"),
        ("kernels/a.py", "import megagpt2._C"),
        ("data/tools/a.py", "from megagpt2.data.tools import b\nname = 'import pickle'"),
        ("checkpoint/a.py", "def f():\n    x = 0\n    def g():\n        nonlocal x"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert violations(tmp_path) == []

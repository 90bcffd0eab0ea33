"""Look at a run's checkpoints, verify them, remove old ones.

    python tools/checkpoint.py list runs/gpt2                           step, age, size, loss and layout of each
    python tools/checkpoint.py verify runs/gpt2                         read every byte, compare with the manifests
    python tools/checkpoint.py verify runs/gpt2/checkpoints/step_00060000
    python tools/checkpoint.py info runs/gpt2/checkpoints/step_00060000
    python tools/checkpoint.py prune runs/gpt2 --keep 3 --keep-every 10000 --dry-run

RUN is a run.directory (or its folder checkpoints/). `prune` keeps the newest --keep that verify, and leaves alone what
is damaged between and above them.

Exit codes: 0 done; 1 `verify` found a damaged checkpoint; 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from megagpt2.checkpoint import store
from megagpt2.checkpoint.formats.huggingface import read_model_config
from megagpt2.checkpoint.shards import INDEX
from megagpt2.planning.memory import show_bytes


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="a line for each checkpoint").add_argument("path", type=Path, metavar="RUN")
    commands.add_parser("verify", help="read every byte").add_argument("path", type=Path, metavar="RUN|DIR")
    commands.add_parser("info", help="what is in one").add_argument("path", type=Path, metavar="DIR")
    prune = commands.add_parser("prune", help="remove old ones")
    prune.add_argument("path", type=Path, metavar="RUN")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="the newest so many stay")
    prune.add_argument("--keep-every", type=int, metavar="N", help="those of every N-th step stay too")
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    arguments = parser.parse_args(argv)
    for name in ("keep", "keep_every"):
        if (value := getattr(arguments, name, None)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: use at least 1")
    return arguments


def checkpoints_of(run: Path) -> Path:
    """The folder that holds a run's checkpoints; CheckpointError where there are none."""
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if not folder.is_dir():
        raise store.CheckpointError(f"{run} is not a folder")
    if not store.all_steps(folder):
        raise store.CheckpointError(f"{folder} holds no checkpoint (step_NNNNNNNN): name a run.directory")
    return folder


def state_of(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise store.CheckpointError(f"{folder / 'state.json'} can't be read: {error}") from None
    if not isinstance(state, dict):
        raise store.CheckpointError(f"{folder / 'state.json'} holds no state")
    return state


def layout(manifest: store.Manifest) -> str:
    return " x ".join(f"{name} {size}" for name, size in manifest.topology.items())


def row(folder: Path) -> list[str]:
    """What `list` says of a checkpoint, without reading its tensors."""
    try:
        manifest, state = store.check_sizes(folder), state_of(folder)
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / store.MANIFEST).stat().st_mtime))
        loss = f"{state['losses'][-1]:.4f}" if state.get("losses") else ""
        size = show_bytes(sum(record["size"] for record in manifest.files.values()))
        return [folder.name, written, size, f"{state['samples_seen']:,}", loss, layout(manifest)]
    except (store.CheckpointError, KeyError, TypeError, ValueError, OSError) as error:
        return [folder.name, "damaged", "", "", "", str(error)]


def show(rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    """Columns; those numbered in `right` are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for line in rows:
        cells = [
            text.rjust(width) if n in right else text.ljust(width)
            for n, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def list_all(run: Path) -> int:
    head = ["checkpoint", "written", "size", "samples", "loss", "layout"]
    show([head, *map(row, store.all_steps(checkpoints_of(run)))], right=(2, 3, 4))
    return 0


def verify(path: Path) -> int:
    """One checkpoint, or all of a run."""
    one = path.is_dir() and (store.is_step(path) or (path / store.MANIFEST).exists())
    folders = [path] if one else store.all_steps(checkpoints_of(path))
    damaged = 0
    for folder in folders:
        began = time.perf_counter()
        try:
            manifest = store.verify(folder)
        except store.CheckpointError as error:
            damaged += 1
            print(f"{folder.name}  damaged: {error}", flush=True)
            continue
        size, seconds = sum(r["size"] for r in manifest.files.values()), time.perf_counter() - began
        print(
            f"{folder.name}  whole: {len(manifest.files)} files, {show_bytes(size)}, {seconds:.1f} s"
            f" ({size / seconds / 1e6:,.0f} MB/s)", flush=True,
        )
    return 1 if damaged else 0


def info(folder: Path) -> int:
    manifest, state, model = store.read_manifest(folder), state_of(folder), read_model_config(folder / "model")
    try:
        kinds = json.loads((folder / "optimizer" / INDEX).read_text(encoding="utf-8"))["kinds"]
        dtype = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))["dtype"]
        rows = [
            ["step", f"{state['step']:,}"],
            ["samples seen", f"{state['samples_seen']:,}"],
            ["updates", f"{state['updates']:,}"],
            ["last losses", ", ".join(f"{loss:.4f}" for loss in state["losses"])],
            ["passed over", ", ".join(f"{a} to {b - 1}" for a, b in state["skipped_samples"]) or "no samples"],
            ["loss scaler", ", ".join(f"{k} {v:g}" for k, v in state["loss_scaler"].items()) or "none"],
            *[[f"data: {key}", str(value)] for key, value in state["data"].items()],
        ]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise store.CheckpointError(f"{folder} is not a whole checkpoint: {type(error).__name__} {error}") from None
    rows += [
        ["model", f"{model.layers} layers, {model.width} wide, {model.heads} heads, vocabulary {model.vocabulary:,},"
         f" context {model.context}, {model.parameters():,} parameters in {dtype}"],
        ["optimizer", ", ".join(kinds) or "no state"],
        ["written by", f"{layout(manifest)}, manifest version {store.VERSION}"],
    ]
    show(rows)
    print()
    files = [[name, show_bytes(record["size"]), record["sha256"][:16]] for name, record in manifest.files.items()]
    show([["file", "size", "sha256"], *files], right=(1,))
    return 0


def prune(run: Path, keep: int, keep_every: int | None, dry_run: bool) -> int:
    checkpoints = checkpoints_of(run)
    newest, skipped = store.newest_verified(checkpoints)
    for note in skipped:
        print(f"left alone, damaged: {note}")
    if newest is None:
        raise store.CheckpointError(f"{checkpoints} holds no checkpoint that verifies: nothing is removed")
    doomed = store.superfluous(checkpoints, newest, keep, keep_every, store.verify)
    for folder in doomed:
        print(f"{'would remove' if dry_run else 'removing'} {folder}", flush=True)
        if not dry_run:
            store.remove(folder)
    for folder in [] if dry_run else checkpoints.glob(".step_*.removing"):  # what was interrupted
        shutil.rmtree(folder, ignore_errors=True)
    left = [folder.name for folder in store.all_steps(checkpoints) if not (dry_run and folder in doomed)]
    print(f"{'would stay' if dry_run else 'left'}: {', '.join(left)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.command == "prune":
            return prune(arguments.path, arguments.keep, arguments.keep_every, arguments.dry_run)
        return {"list": list_all, "verify": verify, "info": info}[arguments.command](arguments.path)
    except (store.CheckpointError, OSError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

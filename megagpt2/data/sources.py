"""Which files a corpus is made of, and how they are cut into units of work.

    paths, folders, globs --find_sources--> Source (a file) --plan_units--> Unit (a file or a slice of one)
    Unit --readers.read_unit--> text pieces, ends of documents, problems

A slice starts and ends at any byte; the reader moves to the next line (or delimiter), as map-reduce has
always done, so that one 100 GB file keeps every worker busy. The cuts depend on the files only, never on
the workers.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

UNIT_BYTES = 64 << 20
# .gz and .zst may follow every suffix but .parquet, which compresses inside.
TEXT_SUFFIXES, LINE_SUFFIXES, TABLE_SUFFIXES = (".txt",), (".jsonl", ".ndjson"), (".parquet",)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents.

    text_field: the key (jsonl) or column (parquet) that holds the text.
    delimiter: a line, without its newline, that separates documents of a text file; "" = blank lines;
        None = a text file is one document.
    suffixes: further suffixes read as plain text, such as ".py".
    newlines: "keep", or "unix" to turn CRLF and CR into LF.
    """

    text_field: str = "text"
    delimiter: str | None = None
    suffixes: tuple[str, ...] = ()
    newlines: str = "keep"

    def __post_init__(self) -> None:
        if self.newlines not in ("keep", "unix"):
            raise ValueError(f"newlines {self.newlines!r}: must be keep or unix")
        if self.delimiter is not None and ("\n" in self.delimiter or "\r" in self.delimiter):
            raise ValueError(f"delimiter {self.delimiter!r}: it is one line, without a newline")
        for suffix in self.suffixes:
            if not suffix.startswith("."):
                raise ValueError(f"suffix {suffix!r}: write it with its dot, .{suffix}")


@dataclass(frozen=True)
class Problem:
    """One thing that could not be read, for the error list. `line` is 1-based (a row in parquet), or None."""

    file: str
    line: int | None
    reason: str
    detail: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{place}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Source:
    """One input file. kind is text, jsonl or parquet; compression None, gzip or zstd."""

    path: str
    kind: str
    compression: str | None
    size: int


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time: bytes (text, jsonl) or row groups (parquet) start .. stop of a file.

    file: the number of the file, which names its documents together with their place in it.
    stop: None = to the end.   size: bytes of the file it stands for, for the progress bar.
    """

    file: int
    source: Source
    start: int
    stop: int | None
    size: int


def classify(path: str, options: ReadOptions) -> tuple[str, str | None] | None:
    """(kind, compression) by the name of a file, or None if nothing reads it."""
    stem, compression = path.lower(), None
    for suffix, name in COMPRESSIONS.items():
        if stem.endswith(suffix):
            stem, compression = stem.removesuffix(suffix), name
    if stem.endswith(TABLE_SUFFIXES):
        return None if compression else ("parquet", None)
    if stem.endswith(LINE_SUFFIXES):
        return "jsonl", compression
    if stem.endswith(TEXT_SUFFIXES + tuple(suffix.lower() for suffix in options.suffixes)):
        return "text", compression
    return None


def find_sources(
    inputs: Sequence[str], options: ReadOptions, exclude: Iterable[Path] = ()
) -> tuple[list[Source], list[Problem]]:
    """All input files in a fixed order, each once, and what could not be found.

    A folder gives every readable kind of file below it, sorted by path, hidden ones left out. A glob is
    expanded here too (`**` works), so that it may be quoted. `exclude` are files never taken (our own
    outputs).
    """
    sources: list[Source] = []
    problems: list[Problem] = []
    excluded = {os.path.realpath(path) for path in exclude}
    seen: set[str] = set()
    for given in inputs:
        paths, problem = _expand(given, options)
        problems.extend(problem)
        for path in paths:
            real = os.path.realpath(path)
            if real in seen or real in excluded:
                continue
            seen.add(real)
            kind = classify(path, options)
            if kind is None:
                suffix = Path(path).suffix or "none"
                problems.append(
                    Problem(
                        path,
                        None,
                        "unknown_kind",
                        f"suffix {suffix}: to read it as text pass --suffix {suffix}",
                    )
                )
                continue
            try:
                sources.append(Source(path, *kind, Path(path).stat().st_size))
            except OSError as error:
                problems.append(Problem(path, None, "unreadable_file", str(error)))
    return sources, problems


def _expand(given: str, options: ReadOptions) -> tuple[list[str], list[Problem]]:
    if Path(given).is_dir():
        paths = [path for path in _walk(given) if classify(path, options)]
        if not paths:
            kinds = ", ".join(TEXT_SUFFIXES + LINE_SUFFIXES + TABLE_SUFFIXES + options.suffixes)
            return [], [
                Problem(
                    given, None, "empty_folder", f"no file with a readable suffix ({kinds}); see --suffix"
                )
            ]
        return paths, []
    if Path(given).exists():
        return [given], []
    if glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if matches:
            # Folders among the matches of a glob are not descended into: "*" would otherwise mean everything.
            return [path for path in matches if Path(path).is_file()], []
        return [], [Problem(given, None, "missing_path", "no file matches this pattern")]
    return [], [Problem(given, None, "missing_path", "no such file or folder")]


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield str(Path(parent) / name)


def plan_units(
    sources: Sequence[Source], options: ReadOptions, unit_bytes: int = UNIT_BYTES
) -> Iterator[Unit]:
    """Cut files into units. Compressed and one-document files can't be cut; tables are, by row groups."""
    for number, source in enumerate(sources):
        can_cut = source.kind == "jsonl" or (source.kind == "text" and options.delimiter is not None)
        if source.kind == "parquet":
            yield from _plan_table(number, source, unit_bytes)
        elif can_cut and source.compression is None and source.size > unit_bytes:
            for start in range(0, source.size, unit_bytes):
                stop = min(start + unit_bytes, source.size)
                yield Unit(number, source, start, stop, stop - start)
        else:
            yield Unit(number, source, 0, None, source.size)


def _plan_table(number: int, source: Source, unit_bytes: int) -> Iterator[Unit]:
    whole = Unit(number, source, 0, None, source.size)
    if source.size <= unit_bytes:
        yield whole
        return
    try:
        from megagpt2.data.readers import open_parquet

        with open_parquet(source.path) as table:
            groups = table.metadata.num_row_groups
    except Exception:  # whatever it is, the reader meets it again and reports it
        yield whole
        return
    step = max(1, groups * unit_bytes // source.size)
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        yield Unit(number, source, start, stop, source.size * stop // groups - source.size * start // groups)


def group_units(units: Iterable[Unit], target_bytes: int = 8 << 20, limit: int = 256) -> Iterator[list[Unit]]:
    """Bundle small units, because a million small files must not be a million messages to workers."""
    group: list[Unit] = []
    size = 0
    for unit in units:
        group.append(unit)
        size += unit.size
        if size >= target_bytes or len(group) >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group

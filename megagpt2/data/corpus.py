"""Text files to PREFIX_train and PREFIX_valid: tokenized, shuffled once, split by document.

    find_sources -> plan_units -> workers: tokenize into buckets -> shuffled order: first few documents
    to _valid, the rest to _train -> publish both, or nothing

What comes out is a function of the input files, the tokenizer, the seed and the options; not of workers,
machine or time. Memory is flat: no step holds more than one document's piece, or one bucket's index.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt2.data.files import atomic_write, with_suffix
from megagpt2.data.indexed import IndexedWriter, refuse_existing
from megagpt2.data.progress import Progress
from megagpt2.data.shuffle import bucket_bits, shuffled_documents
from megagpt2.data.sources import (
    Problem,
    ReadOptions,
    Source,
    Unit,
    find_sources,
    group_units,
    plan_units,
)
from megagpt2.data.tokenizer import Tokenizer
from megagpt2.data.workers import Job, Outcome, run_tasks

MANIFEST_FILES = 10_000  # so many source files are listed in the manifest; more are only counted
SHOWN_PROBLEMS = 10


class CorpusError(ValueError):
    """A corpus that can't be prepared as asked."""


@dataclass(frozen=True)
class PrepareOptions:
    """Everything that decides what comes out, and `workers`, which does not.

    valid_fraction: share of documents in PREFIX_valid, 0 = no validation part.
    on_error: "skip" bad documents, counting and listing them, or "stop" at the first.
    append_eot: end every document with `<|endoftext|>`.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    valid_fraction: float = 0.05
    seed: int = 1234
    on_error: str = "skip"
    append_eot: bool = True
    overwrite: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ValueError(f"valid_fraction {self.valid_fraction}: must be at least 0 and below 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: must be 0 .. 2**63 - 1")
        if self.on_error not in ("skip", "stop"):
            raise ValueError(f"on_error {self.on_error!r}: must be skip or stop")
        if self.workers < 1:
            raise ValueError(f"workers {self.workers}: must be at least 1")


@dataclass
class Report:
    """What was done. read = written + skipped; a file that could not be opened counts as one."""

    parts: dict[str, dict[str, Any]]  # "train", "valid": the manifest of each
    read: int
    written: int
    skipped: Counter[str]
    files: int
    input_bytes: int
    first_problems: list[Problem]
    errors_path: Path | None


def split_counts(documents: int, valid_fraction: float) -> tuple[int, int]:
    """(train, valid) numbers of documents: the nearest to the fraction that leaves neither part empty.

    Raises CorpusError where a validation part is asked for and there are less than two documents.
    """
    if valid_fraction == 0.0:
        return documents, 0
    if documents < 2:
        raise CorpusError(
            f"{documents} document can't be split into train and valid: give more files, cut the text into "
            'documents with --document-delimiter LINE ("" = at blank lines), or pass --valid-fraction 0'
        )
    valid = min(max(round(documents * valid_fraction), 1), documents - 1)
    return documents - valid, valid


def prepare_corpus(
    inputs: list[str], tokenizer: Tokenizer, output: str | Path, options: PrepareOptions
) -> Report:
    """Write OUTPUT_train.{bin,idx,json}, OUTPUT_valid.*, and OUTPUT_errors.jsonl if something was skipped.

    Raises CorpusError (a ValueError) when nothing readable is there, on_error is "stop" and something is
    bad, or outputs exist; in every case, interrupts included, nothing is left behind.
    """
    output = Path(output)
    if not output.name:
        raise CorpusError(f"output {str(output)!r} has no name; give a prefix such as corpus/books")
    names = ["train", "valid"] if options.valid_fraction else ["train"]
    prefixes = {name: with_suffix(output, f"_{name}") for name in ("train", "valid")}
    errors_path = with_suffix(output, "_errors.jsonl")
    if not options.overwrite:
        for prefix in prefixes.values():
            refuse_existing(prefix)
    sources, problems = find_sources(inputs, options.read, exclude=[errors_path])
    if options.on_error == "stop" and problems:
        raise CorpusError(f"{problems[0]} (--on-error stop)")
    if not sources:
        raise CorpusError("no input file to read: " + "; ".join(map(str, problems[:SHOWN_PROBLEMS])))
    with _folder(output.parent), _work_directory(output) as work:
        job = Job(
            tokenizer=tokenizer,
            read=options.read,
            directory=work,
            seed=options.seed,
            bits=bucket_bits(sum(source.size for source in sources)),
            append_eot=options.append_eot,
            stop_on_error=options.on_error == "stop",
        )
        tally = _tokenize(job, sources, problems, options.workers)
        counts = {
            "read": tally.documents + sum(tally.skipped.values()),
            "written": tally.documents,
            "skipped": sum(tally.skipped.values()),
            "skipped_by_reason": dict(sorted(tally.skipped.items())),
        }
        if tally.documents == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.most_common())
            shown = "; ".join(map(str, tally.first_problems[:3]))
            raise CorpusError(f"no document could be read ({reasons or 'all inputs are empty'}): {shown}")
        split_counts(tally.documents, options.valid_fraction)
        with ExitStack() as stack:
            writers = {}
            for name in names:
                writer = IndexedWriter(
                    prefixes[name], tokenizer.vocabulary_size, None, options.overwrite, work
                )
                stack.callback(writer.discard)
                writer.manifest = {"split": name, **_manifest(tokenizer, sources, options, counts)}
                writers[name] = writer
            _write_shuffled(work, writers, tally, options.valid_fraction)
            for writer in writers.values():
                writer.finish()
            _publish(writers, prefixes, errors_path, work if tally.skipped else None)
    return Report(
        parts={name: writer.summary() for name, writer in writers.items()},
        read=counts["read"],
        written=counts["written"],
        skipped=tally.skipped,
        files=len(sources),
        input_bytes=sum(source.size for source in sources),
        first_problems=tally.first_problems,
        errors_path=errors_path if tally.skipped else None,
    )


# -- pass 1 ----------------------------------------------------------------------------------------


class _Tally:
    """Adds up outcomes, and spools problems to disk: a corpus may have millions of them."""

    def __init__(self, work: Path) -> None:
        self.documents = self.tokens = 0
        self.skipped: Counter[str] = Counter()
        self.first_problems: list[Problem] = []
        self._work = work
        self._lines: dict[
            int, dict[int, int]
        ] = {}  # file -> unit's start -> lines in it, for files in several units

    def add(self, task: int, units: list[Unit], outcome: Outcome) -> None:
        """Count one task; keep its problems for `write_problems`."""
        self.documents += outcome.documents
        self.tokens += outcome.tokens
        for unit, lines in zip(units, outcome.lines, strict=False):
            if unit.stop is not None and unit.source.kind != "parquet":
                self._lines.setdefault(unit.file, {})[unit.start] = lines
        self.skipped.update(problem.reason for _, problem in outcome.problems)
        if outcome.problems:
            with (self._work / f"problems-{task:09d}").open("w", encoding="utf-8") as file:
                for number, problem in outcome.problems:
                    unit = units[number]
                    record = [
                        unit.file,
                        unit.start,
                        problem.file,
                        problem.line,
                        problem.reason,
                        problem.detail,
                    ]
                    file.write(json.dumps(record) + "\n")

    def write_problems(self, before: list[Problem]) -> None:
        """Order all problems by file and line, lines numbered from the file's first, in the work folder."""
        self.skipped.update(problem.reason for problem in before)
        with (self._work / "errors.jsonl").open("w", encoding="utf-8") as file:
            for problem in before:
                self._write(file, problem)
            for path in sorted(self._work.glob("problems-*")):
                with path.open(encoding="utf-8") as records:
                    for record in map(json.loads, records):
                        self._write(file, self._renumbered(*record))
                path.unlink()

    def _renumbered(self, file: int, start: int, *fields: Any) -> Problem:
        problem = Problem(*fields)
        earlier = sum(lines for begin, lines in self._lines.get(file, {}).items() if begin < start)
        if problem.line is None or not earlier:
            return problem
        return Problem(problem.file, problem.line + earlier, problem.reason, problem.detail)

    def _write(self, file: Any, problem: Problem) -> None:
        if len(self.first_problems) < SHOWN_PROBLEMS:
            self.first_problems.append(problem)
        file.write(json.dumps(problem.__dict__, ensure_ascii=False) + "\n")


def _tokenize(job: Job, sources: list[Source], problems: list[Problem], workers: int) -> _Tally:
    """Pass 1. Raises CorpusError at the first problem if job.stop_on_error."""
    tally = _Tally(job.directory)
    units = plan_units(sources, job.read)
    # Few small files over many workers: smaller bundles, so that everyone has work. The result is the same.
    total = sum(source.size for source in sources)
    bundle = min(8 << 20, max(1 << 16, total // (4 * workers)))
    with Progress("tokenizing", total) as progress:
        for task, group, outcome in run_tasks(job, group_units(units, bundle), workers, progress.update):
            if job.stop_on_error and outcome.problems:
                number, problem = outcome.problems[0]
                raise CorpusError(f"{_with_line_of_file(group[number], problem)} (--on-error stop)")
            tally.add(task, group, outcome)
        progress.update(total, tally.tokens)
    tally.write_problems(problems)
    return tally


def _with_line_of_file(unit: Unit, problem: Problem) -> Problem:
    """Number the line from the file's first, by counting: units before this one may not have been read."""
    if problem.line is None or unit.start == 0 or unit.source.kind == "parquet":
        return problem
    earlier, left = 0, unit.start
    with Path(unit.source.path).open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            earlier += block.count(b"\n")
            left -= len(block)
        if block and not block.endswith(b"\n"):
            earlier += 1  # the line that the unit starts inside of belongs to the unit before
    return Problem(problem.file, problem.line + earlier, problem.reason, problem.detail)


# -- pass 2 ----------------------------------------------------------------------------------------


def _write_shuffled(
    work: Path, writers: dict[str, IndexedWriter], tally: _Tally, valid_fraction: float
) -> None:
    """Copy documents in shuffled order: as many as the fraction asks for to valid, all others to train."""
    _, valid = split_counts(tally.documents, valid_fraction)
    dtype = writers["train"].dtype
    done = 0
    with Progress("shuffling", tally.tokens * dtype.itemsize) as progress:
        for number, (length, parts) in enumerate(shuffled_documents(work, dtype)):
            writer = writers["valid" if number < valid else "train"]
            for part in parts:
                writer.write(part)
            writer.end_document()
            done += length
            if number % 256 == 0:
                progress.update(done * dtype.itemsize, done)
    assert done == tally.tokens, f"{tally.tokens} tokens went into the shuffle and {done} came out"


def _publish(
    writers: dict[str, IndexedWriter], prefixes: dict[str, Path], errors_path: Path, work: Path | None
) -> None:
    for prefix in prefixes.values():  # with --overwrite: never a new train beside an old valid
        for suffix in (".idx", ".bin", ".json"):
            with_suffix(prefix, suffix).unlink(missing_ok=True)
    errors_path.unlink(missing_ok=True)
    if work is not None:
        with atomic_write(errors_path, "wb") as target, (work / "errors.jsonl").open("rb") as source:
            shutil.copyfileobj(source, target)
    for writer in writers.values():
        writer.publish()


def _manifest(
    tokenizer: Tokenizer, sources: list[Source], options: PrepareOptions, counts: dict[str, Any]
) -> dict[str, Any]:
    listed = [{"path": source.path, "bytes": source.size} for source in sources[:MANIFEST_FILES]]
    return {
        "vocabulary_size": tokenizer.vocabulary_size,
        "tokenizer_sha256": tokenizer.sha256,
        "end_of_text": tokenizer.end_of_text,
        "counts": counts,
        "options": {
            "text_field": options.read.text_field,
            "document_delimiter": options.read.delimiter,
            "suffixes": list(options.read.suffixes),
            "newlines": options.read.newlines,
            "valid_fraction": options.valid_fraction,
            "seed": options.seed,
            "append_eot": options.append_eot,
        },
        "source_count": len(sources),
        "source_bytes": sum(source.size for source in sources),
        "sources": listed,
    }


# -- folders ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make `folder` if need be, and unmake what was made if the block raises."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _work_directory(output: Path) -> Iterator[Path]:
    """A hidden folder beside the output, removed at the end; first, one that a killed run left is removed."""
    host = socket.gethostname()
    stem = f".{output.name}.partial-{host}-"
    for old in output.parent.glob(f".{output.name}.partial-*"):
        owner = old.name.removeprefix(stem)
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    work = output.with_name(f"{stem}{os.getpid()}")
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_texts(
    sources: list[Source],
    options: ReadOptions,
    on_problem: Callable[[Problem], None],
    on_bytes: Callable[[int], None],
) -> Iterator[str]:
    """All texts of `sources` in order, in pieces, in this process: what learning a vocabulary reads.

    Pieces of a document that turns out bad later on have been handed out by then.
    """
    from megagpt2.data.readers import Piece, UnitState, read_unit

    for unit in plan_units(sources, options):
        for event in read_unit(unit, options, UnitState(on_bytes)):
            if isinstance(event, Piece):
                yield event.text
            elif isinstance(event, Problem):
                on_problem(event)

#!/usr/bin/env python3
"""Text files in, PREFIX_train and PREFIX_valid out: `python tools/prepare_corpus.py --help`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works in a checkout that isn't installed

from megagpt2.data.corpus import PrepareOptions, Report, prepare_corpus
from megagpt2.data.sources import ReadOptions
from megagpt2.data.tokenizer import Tokenizer

EXAMPLES = """
examples:
  # a folder of .txt files, one document each, into data/books_train.* and data/books_valid.*
  python tools/prepare_corpus.py --input books/ --tokenizer gpt2/ --output data/books

  # JSON lines, compressed or not, the text in "content", 16 processes
  python tools/prepare_corpus.py --input 'web/*.jsonl.gz' more.jsonl.zst --text-field content \\
      --tokenizer gpt2/ --output data/web --workers 16

  # one file with documents separated by lines that say <|endoftext|>
  python tools/prepare_corpus.py --input all.txt --document-delimiter '<|endoftext|>' \\
      --tokenizer gpt2/ --output data/all

  # source code; stop at the first file that is not UTF-8
  python tools/prepare_corpus.py --input src/ --suffix .py --on-error stop \\
      --tokenizer gpt2/ --output data/code

Train with data.train=data/books_train data.valid=data/books_valid in the config (docs/data.md).
exit codes: 0 done; 2 the request is wrong; 1 anything else.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Tokenize, shuffle and split text into PREFIX_train.{bin,idx,json} and PREFIX_valid.*, "
        "in flat memory, with the same result for any number of workers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders (all below), globs; .txt and .jsonl (also .gz, .zst), .parquet",
    )
    add(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="folder with tokenizer.json, vocab.json + merges.txt, or encoder.json + vocab.bpe",
    )
    add("--output", required=True, metavar="PREFIX", help="where to write, without suffix")
    add(
        "--workers", type=int, default=default_workers(), metavar="N", help="processes (default: %(default)s)"
    )
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="key or column that holds the text (default: text)",
    )
    add(
        "--document-delimiter",
        metavar="LINE",
        help="a line that separates documents inside text files; "
        '"" = blank lines (default: a text file is one document)',
    )
    add(
        "--suffix",
        action="append",
        default=[],
        metavar=".SUFFIX",
        help="read files of this suffix as text, such as .py; may be repeated",
    )
    add("--newlines", choices=["keep", "unix"], default="keep", help="unix: turn CRLF and CR into LF")
    add(
        "--valid-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of documents for validation, 0 = none (default: %(default)s)",
    )
    add("--seed", type=int, default=1234, metavar="N", help="of the shuffle and split (default: %(default)s)")
    add(
        "--on-error",
        choices=["skip", "stop"],
        default="skip",
        help="bad documents: skip and list them in "
        "PREFIX_errors.jsonl, or stop and leave nothing (default: skip)",
    )
    add(
        "--append-eot",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with <|endoftext|> (default: yes)",
    )
    add("--overwrite", action="store_true", help="replace outputs of an earlier run")
    return parser.parse_args(arguments)


def default_workers() -> int:
    """The processors this process may use: in a container or a Slurm job not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: list[str] | None = None) -> int:
    """Exit code."""
    args = parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    start = time.monotonic()
    try:
        options = PrepareOptions(
            read=ReadOptions(args.text_field, args.document_delimiter, tuple(args.suffix), args.newlines),
            valid_fraction=args.valid_fraction,
            seed=args.seed,
            on_error=args.on_error,
            append_eot=args.append_eot,
            overwrite=args.overwrite,
            workers=args.workers,
        )
        report = prepare_corpus(args.input, Tokenizer.load(args.tokenizer), args.output, options)
    except ValueError as error:
        print(f"prepare_corpus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_corpus: interrupted; nothing was written", file=sys.stderr)
        return 1
    except (OSError, RuntimeError) as error:
        print(f"prepare_corpus: {error}; nothing was written", file=sys.stderr)
        return 1
    show(report, args.output, time.monotonic() - start)
    return 0


def show(report: Report, output: str, seconds: float) -> None:
    """The first problems, and a table of what was written."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    if report.errors_path is not None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.skipped.items()))
        console.print(f"skipped {sum(report.skipped.values())}: {reasons}", markup=False)
        for problem in report.first_problems:
            console.print(f"  {problem}", markup=False)
        console.print(f"  all of them: {report.errors_path}", markup=False)
    table = Table()
    for name in ("part", "documents", "tokens", "dtype"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, part in report.parts.items():
        table.add_row(f"{output}_{name}", f"{part['documents']:,}", f"{part['tokens']:,}", part["dtype"])
    console.print(table)
    tokens = sum(part["tokens"] for part in report.parts.values())
    console.print(
        f"{report.read:,} read = {report.written:,} written + {sum(report.skipped.values()):,} skipped, from "
        f"{report.files:,} files, {report.input_bytes / 1e6:,.1f} MB in {seconds:,.1f} s "
        f"({report.input_bytes / seconds / 1e6:,.1f} MB/s, {tokens / seconds:,.0f} tokens/s)",
        markup=False,
    )


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Learn a GPT-2 style vocabulary from text: `python tools/train_tokenizer.py --help`."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works in a checkout that isn't installed

from megagpt2.data.corpus import read_texts
from megagpt2.data.progress import Progress
from megagpt2.data.sources import Problem, ReadOptions, Source, find_sources
from megagpt2.data.tokenizer import Tokenizer

EXAMPLES = """
examples:
  python tools/train_tokenizer.py --input books/ --vocab-size 50257 --output tokenizer/
  python tools/train_tokenizer.py --input src/ --suffix .py --vocab-size 8192 --output tokenizer/
  python tools/train_tokenizer.py --input 'web/*.jsonl.zst' --max-bytes 2000000000 --vocab-size 50257 \\
      --output tokenizer/

The folder is a Hugging Face GPT-2 tokenizer: prepare_corpus.py and transformers.AutoTokenizer open it.
Memory grows with the number of different words, so for very large corpora pass --max-bytes: a few GB of
text are enough for a vocabulary.
exit codes: 0 done; 2 the request is wrong; 1 anything else.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Learn a byte-level BPE vocabulary: 256 bytes, merges, and <|endoftext|> as the last id.",
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
        "--vocab-size", type=int, required=True, metavar="N", help="ids in all, at least 257; GPT-2 has 50257"
    )
    add("--output", required=True, metavar="DIR", help="folder to write")
    add(
        "--suffix",
        action="append",
        default=[],
        metavar=".SUFFIX",
        help="read files of this suffix as text, such as .py; may be repeated",
    )
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="key or column that holds the text (default: text)",
    )
    add("--newlines", choices=["keep", "unix"], default="keep", help="unix: turn CRLF and CR into LF")
    add(
        "--max-bytes",
        type=int,
        metavar="N",
        help="learn from at most about N bytes of text, from files taken in "
        "an order drawn with --seed (default: all)",
    )
    add("--seed", type=int, default=1234, metavar="N", help="for --max-bytes (default: %(default)s)")
    add("--on-error", choices=["skip", "stop"], default="skip", help="what to do with unreadable text")
    add("--overwrite", action="store_true", help="replace a tokenizer that is there")
    return parser.parse_args(arguments)


class Reader:
    """The texts, as far as --max-bytes goes; counts problems and moves the bar."""

    def __init__(
        self, sources: list[Source], read: ReadOptions, stop_on_error: bool, limit: int | None
    ) -> None:
        self._sources, self._read, self._stop, self._limit = sources, read, stop_on_error, limit
        self.problems: Counter[str] = Counter()
        self.text_bytes = self._done = 0

    def problem(self, problem: Problem) -> None:
        """Count one, or raise ValueError with --on-error stop. The first few are printed."""
        if self._stop:
            raise ValueError(f"{problem} (--on-error stop)")
        self.problems[problem.reason] += 1
        if self.problems.total() <= 10:
            print(f"skipped: {problem}", file=sys.stderr)

    def _advance(self, count: int) -> None:
        self._done += count

    def __iter__(self) -> Iterator[str]:
        total = sum(source.size for source in self._sources)
        with Progress("reading", min(total, self._limit or total)) as progress:
            for text in read_texts(self._sources, self._read, self.problem, self._advance):
                self.text_bytes += len(text.encode("utf-8"))
                progress.update(self.text_bytes if self._limit else self._done)
                yield text
                if self._limit is not None and self.text_bytes >= self._limit:
                    return


def train(args: argparse.Namespace) -> tuple[Tokenizer, Reader]:
    """Read, learn, save. Raises ValueError for a wrong request."""
    output = Path(args.output)
    if (output / "tokenizer.json").exists() and not args.overwrite:
        raise ValueError(
            f"output {output} already has a tokenizer; choose another folder or pass --overwrite"
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; give a folder")
    if args.max_bytes is not None and args.max_bytes < 1:
        raise ValueError(f"--max-bytes {args.max_bytes}: must be at least 1")
    read = ReadOptions(args.text_field, None, tuple(args.suffix), args.newlines)
    sources, problems = find_sources(args.input, read)
    if args.max_bytes is not None:
        random.Random(args.seed).shuffle(sources)
    reader = Reader(sources, read, args.on_error == "stop", args.max_bytes)
    for problem in problems:
        reader.problem(problem)
    if not sources:
        raise ValueError("no input file to read: " + "; ".join(map(str, problems[:3])))
    tokenizer = Tokenizer.train(reader, args.vocab_size, show_progress=sys.stderr.isatty())
    tokenizer.save(output)
    return tokenizer, reader


def main(arguments: list[str] | None = None) -> int:
    """Exit code."""
    args = parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    start = time.monotonic()
    try:
        tokenizer, reader = train(args)
    except ValueError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_tokenizer: interrupted; nothing was written", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 1
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(reader.problems.items()))
    print(
        f"{args.output}: {tokenizer.vocabulary_size:,} ids from {reader.text_bytes / 1e6:,.1f} MB of text in "
        f"{time.monotonic() - start:,.1f} s, sha256 {tokenizer.sha256}"
        + (f"; skipped {skipped}" if skipped else "")
    )
    return 0


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

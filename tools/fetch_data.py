#!/usr/bin/env python3
"""GPT-2's vocabulary and the public evaluation sets: `python tools/fetch_data.py --help`."""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works in a checkout that isn't installed

from megagpt2.data.catalog import CATALOG
from megagpt2.data.fetch import FetchError, PublicFile, fetch_file, select
from megagpt2.data.progress import Progress

EXAMPLES = """
examples:
  python tools/fetch_data.py --list
  python tools/fetch_data.py gpt2-tokenizer --output data/          # -> data/gpt2-tokenizer/vocab.bpe, ...
  python tools/fetch_data.py lambada wikitext-2-raw --output data/
  python tools/fetch_data.py --output data/ --from /mnt/usb/data    # no network: copy and verify

A broken download goes on where it stopped when the command is run again. Proxies: https_proxy.
Each data set has its owner's licence (--list); look at it before you use or pass on the data.
exit codes: 0 done; 2 the request is wrong; 1 network, server or content.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Fetch public files by URL and SHA-256: resumable, verified, atomic.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets, or NAME/FILE (default: all)")
    parser.add_argument("--output", metavar="DIR", help="files go to DIR/NAME/FILE")
    parser.add_argument(
        "--from",
        dest="local",
        metavar="FOLDER",
        help="take files from FOLDER/NAME/FILE or FOLDER/FILE instead of the network",
    )
    parser.add_argument("--list", action="store_true", help="show what there is, and leave")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code."""
    args = parse(arguments)
    try:
        files = select(args.names, CATALOG)
        if args.list:
            show(files)
            return 0
        if args.output is None:
            raise ValueError("--output DIR is missing; --list shows what there is")
        local = Path(args.local) if args.local else None
        if local is not None and not local.is_dir():
            raise ValueError(f"--from {local} is not a folder")
    except ValueError as error:
        print(f"fetch_data: {error}", file=sys.stderr)
        return 2
    return fetch(files, Path(args.output), local)


def fetch(files: list[PublicFile], output: Path, local: Path | None) -> int:
    """Fetch all of `files`; what fails does not keep the others from coming."""
    worst = 0
    for file in files:
        name = f"{file.folder}/{file.name}"
        try:
            with Progress(name, file.size) as progress:
                new = fetch_file(file, output, local, lambda done, size, bar=progress: bar.update(done))
            what = "fetched" if new else "already there"
            print(f"{name}: {what}, {file.size / 1e6:,.2f} MB, SHA-256 verified")
        except ValueError as error:
            print(f"fetch_data: {name}: {error}", file=sys.stderr)
            worst = worst or 2
        except (FetchError, OSError) as error:
            print(f"fetch_data: {name}: {error}", file=sys.stderr)
            worst = 1
        except KeyboardInterrupt:
            print("fetch_data: interrupted; run it again to go on", file=sys.stderr)
            return 1
    return worst


def show(files: list[PublicFile]) -> None:
    """One line for each data set."""
    for folder, group in groupby(files, key=lambda file: file.folder):
        members = list(group)
        size = sum(file.size for file in members) / 1e6
        print(f"{folder:22} {size:6.2f} MB  {members[0].licence}: {', '.join(file.name for file in members)}")


if __name__ == "__main__":
    sys.exit(main())

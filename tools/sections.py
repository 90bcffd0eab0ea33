"""Parts of a page that a tool writes, between two marks: <!-- NAME: begin --> and <!-- NAME: end -->."""

from __future__ import annotations

from pathlib import Path


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def problem(page: Path, name: str) -> str | None:
    """Why a section of this name can't be written there, or None."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{page} can't be read: {error}"
    begin, end = marks(name)
    found = text.find(begin)
    if found < 0 or text.find(end, found) < 0:
        return f"{page} lacks {begin} and {end}: name a file that has them"
    return None


def replace(page: Path, name: str, text: str) -> None:
    """Put text between the marks, which are there."""
    begin, end = marks(name)
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    write(page, f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def write(file: Path, text: str) -> None:
    """Whole or not at all. (The benchmarks run where pydantic is missing, so config/load.py's is not for them.)"""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)

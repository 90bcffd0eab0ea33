"""Files as a stream of documents, in flat memory.

`read_unit` yields three kinds of things:

    Piece          some of the current document's text, cut where cutting changes no token
    DocumentEnd    the current document is complete and not empty
    Problem        the current document is bad: forget its pieces

so a document of any size passes through without ever being whole in memory (jsonl and parquet hold one line
or one small batch of rows). Every document has an identity inside its file, the byte (or row) where it
starts: the same however the file was cut into units.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from megagpt2.data.sources import Problem, ReadOptions, Unit
from megagpt2.data.tokenizer import last_safe_cut

PIECE_CHARACTERS = 1 << 17
LINE_PART = 1 << 20  # lines of text are read in parts of at most this many bytes
BOM = codecs.BOM_UTF8


class Piece(NamedTuple):
    """identity: where the document starts in its (decompressed) file: a byte, or a row of a table."""

    identity: int
    text: str


class DocumentEnd(NamedTuple):
    """The document of this identity is complete."""

    identity: int


Event = Piece | DocumentEnd | Problem


class CorruptInput(Exception):  # noqa: N818  (it becomes a Problem, never reaches a user)
    """A compressed stream that breaks off or does not add up."""


@dataclass
class UnitState:
    """What a reader tells besides events: progress, and lines, to number errors in later units."""

    advance: Callable[[int], None]  # called with bytes of the file read since the last call
    line: int = 0  # number of the current line, the unit's first being 1
    lines: int = 0  # lines that start inside this unit, so far: the last document may reach beyond it


def read_unit(unit: Unit, options: ReadOptions, state: UnitState) -> Iterator[Event]:
    """Events of one unit. Line numbers count from the unit's first line; the caller adds the units before."""
    source = unit.source
    try:
        if source.size == 0:
            yield Problem(source.path, None, "empty_file", "the file has no bytes")
        elif source.kind == "parquet":
            yield from _read_parquet(unit, options, state)
        else:
            with open_stream(source.path, source.compression, state.advance) as file:
                reader = _read_jsonl if source.kind == "jsonl" else _read_text
                yield from reader(file, unit, options, state)
    except CorruptInput as error:
        # The damage begins somewhere after the last line that could be read.
        line = state.line + 1 if state.line else None
        yield Problem(source.path, line, f"corrupt_{source.compression}", str(error))
    except OSError as error:
        yield Problem(source.path, None, "unreadable_file", str(error))


# -- byte streams ----------------------------------------------------------------------------------


class _CountedFile(io.RawIOBase):
    """A file that reports the bytes read from the disk, so that progress counts compressed bytes too."""

    def __init__(self, path: str, advance: Callable[[int], None]) -> None:
        self._file, self._advance = open(path, "rb", buffering=0), advance  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._advance(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames of a .zst file; a frame that breaks off raises CorruptInput."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError("reading .zst needs the package zstandard: pip install zstandard") from error
        self._file, self._pending, self._error = file, b"", zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if data:
                self._frame = None
            data = data or self._file.read(1 << 16)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise CorruptInput("the file breaks off in the middle of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            try:
                self._pending = self._frame.decompress(data)
            except self._error as error:
                raise CorruptInput(str(error)) from error
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _GzipFile(gzip.GzipFile):
    """gzip whose three ways to say "damaged" are one, CorruptInput."""

    def read(self, size: int | None = -1) -> bytes:
        return self._guard(super().read, size)

    def readinto(self, buffer: Any) -> int:
        return self._guard(super().readinto, buffer)

    def readline(self, size: int | None = -1) -> bytes:
        return self._guard(super().readline, size)

    @staticmethod
    def _guard(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CorruptInput(str(error)) from error


def open_stream(path: str, compression: str | None, advance: Callable[[int], None]) -> IO[bytes]:
    """The decompressed bytes of a file; `advance` hears of the bytes of the file itself."""
    raw = io.BufferedReader(_CountedFile(path, advance), 1 << 18)
    if compression == "gzip":
        return _GzipFile(fileobj=raw)  # type: ignore[return-value]
    if compression == "zstd":
        return io.BufferedReader(_ZstdFile(raw), 1 << 18)
    return raw


# -- text and jsonl --------------------------------------------------------------------------------


def _line_parts(
    file: IO[bytes], unit: Unit, state: UnitState, whole: bool
) -> Iterator[tuple[int, bytes, bool]]:
    """(byte where its line starts, bytes, whether the line ends here), from the unit's first line on.

    The unit's first line is the first that starts at or after unit.start; the last is the file's. With
    `whole`, lines come in one part.
    """
    start = unit.start
    if start > 0:
        file.seek(start - 1)
        while (skipped := file.readline(LINE_PART)) and not skipped.endswith(b"\n"):
            pass  # the rest of a line that belongs to the unit before
        start = file.tell()
    limit = -1 if whole else LINE_PART
    line_start = position = start
    while part := file.readline(limit):
        if position == line_start:
            state.line += 1
            state.lines += unit.stop is None or line_start < unit.stop
        position += len(part)
        ends = part.endswith(b"\n")
        yield line_start, part, ends
        if ends:
            line_start = position


def _read_jsonl(file: IO[bytes], unit: Unit, options: ReadOptions, state: UnitState) -> Iterator[Event]:
    for start, line, _ in _line_parts(file, unit, state, whole=True):
        if unit.stop is not None and start >= unit.stop:
            return
        if start == 0:
            line = line.removeprefix(BOM)
        if line.isspace() or not line:
            continue  # blank lines separate nothing and hold nothing
        text = _text_of_line(line, options.text_field)
        if isinstance(text, str):
            yield Piece(start, _unix(text) if options.newlines == "unix" else text)
            yield DocumentEnd(start)
        else:
            yield Problem(unit.source.path, state.line, *text)


def _text_of_line(line: bytes, field: str) -> str | tuple[str, str]:
    """The text, or (reason, detail)."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "invalid_utf8", f"byte {line[error.start]:#04x} at column {error.start + 1}: {error.reason}"
    except (ValueError, RecursionError) as error:
        return "broken_json", str(error)
    if not isinstance(value, dict):
        return "wrong_type", f"the line holds a {type(value).__name__}, not an object"
    if field not in value:
        return (
            "missing_field",
            f"no field {field!r}; its fields: {', '.join(map(repr, list(value)[:8])) or 'none'}",
        )
    return check_text(value[field], field)


def check_text(text: Any, field: str) -> str | tuple[str, str]:
    """`text` if it is a text of some characters, else (reason, detail)."""
    if not isinstance(text, str):
        return (
            "wrong_type",
            f"field {field!r} is {'null' if text is None else type(text).__name__}, not a text",
        )
    if not text or text.isspace():
        return "empty_document", f"field {field!r} has no text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "invalid_text", f"lone surrogate {text[error.start]!r} at character {error.start + 1}"
    return text


class _TextDocument:
    """Collects the bytes of one document of a text file and hands out pieces of text."""

    def __init__(self, start: int, unix: bool) -> None:
        self._unix = unix  # applied to pieces: a part may end between CR and LF, a piece never does
        self.start, self.bad, self.seen = start, False, False
        self._threshold = PIECE_CHARACTERS
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text: list[str] = []
        self._size = 0

    def add(self, data: bytes, final: bool = False) -> str:
        """Decode `data`; return text that is ready to be encoded, or "". Raises UnicodeDecodeError."""
        text = self._decoder.decode(data, final)
        self.seen = self.seen or not (text.isspace() or not text)
        self._text.append(text)
        self._size += len(text)
        if final or self._size >= self._threshold:
            joined = "".join(self._text)
            cut = len(joined) if final else last_safe_cut(joined)
            # No place to cut (a megabyte without a space): look again at double the size, not at each part.
            self._threshold = PIECE_CHARACTERS if cut else 2 * len(joined)
            self._text, self._size = [joined[cut:]], len(joined) - cut
            return _unix(joined[:cut]) if self._unix else joined[:cut]
        return ""


def _read_text(file: IO[bytes], unit: Unit, options: ReadOptions, state: UnitState) -> Iterator[Event]:
    """A text file: one document, or with options.delimiter the stretches between delimiter lines.

    A document belongs to the unit in which the delimiter line before it starts, the first to the unit at 0.
    """
    delimiter = None if options.delimiter is None else options.delimiter.encode("utf-8")
    unix = options.newlines == "unix"
    document = _TextDocument(0, unix) if unit.start == 0 else None
    position, line_begins = 0, True
    for start, part, ends in _line_parts(file, unit, state, whole=False):
        if line_begins:
            position = start
        at_line_begin, line_begins = line_begins, ends
        position += len(part)
        if start == 0 and at_line_begin:
            part = part.removeprefix(BOM)
        if delimiter is not None and at_line_begin and part.rstrip(b"\r\n") == delimiter:
            if document is not None:
                # Blank lines in a row, or a delimiter as the very first line, are no empty documents.
                yield from _finish(document, unit, state, quiet=delimiter == b"" or start == 0)
            if unit.stop is not None and start >= unit.stop:
                return
            document = _TextDocument(position, unix)
            continue
        if document is None or document.bad:
            if document is None and unit.stop is not None and start >= unit.stop:
                return  # no delimiter in this whole unit
            continue
        yield from _feed(document, part, unit, state)
    if document is not None:
        # After the last delimiter there is normally nothing: that is no empty document either.
        yield from _finish(document, unit, state, quiet=document.start > 0)


def _feed(document: _TextDocument, part: bytes, unit: Unit, state: UnitState) -> Iterator[Event]:
    try:
        piece = document.add(part)
    except UnicodeDecodeError as error:
        document.bad = True
        detail = f"byte {error.object[error.start]:#04x}: {error.reason}; is the file in another encoding?"
        yield Problem(unit.source.path, state.line, "invalid_utf8", detail)
        return
    if piece:
        yield Piece(document.start, piece)


def _finish(document: _TextDocument, unit: Unit, state: UnitState, quiet: bool) -> Iterator[Event]:
    """The last piece and the end, or why not. `quiet`: an empty document is no problem here."""
    if document.bad:
        return
    try:
        piece = document.add(b"", final=True)
    except UnicodeDecodeError as error:
        yield Problem(unit.source.path, state.line, "invalid_utf8", f"the text breaks off: {error.reason}")
        return
    if document.seen:
        if piece:
            yield Piece(document.start, piece)
        yield DocumentEnd(document.start)
    elif not quiet:
        yield Problem(unit.source.path, state.line, "empty_document", "nothing but white space")


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


# -- parquet ---------------------------------------------------------------------------------------


def open_parquet(path: str) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises ValueError without pyarrow, and whatever pyarrow raises."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading .parquet needs the package pyarrow: pip install pyarrow") from error
    return pyarrow.parquet.ParquetFile(path)


def _read_parquet(unit: Unit, options: ReadOptions, state: UnitState) -> Iterator[Event]:
    path, field = unit.source.path, options.text_field
    try:
        with open_parquet(path) as table:
            names = table.schema_arrow.names
            if field in names:
                yield from _table_rows(table, unit, options, state)
            elif unit.start == 0:  # once for the file, not once for each of its units
                yield Problem(
                    path, None, "missing_field", f"no column {field!r}; its columns: {', '.join(names)}"
                )
    except FileNotFoundError:
        raise
    except Exception as error:
        # pyarrow says "damaged" with its own errors or an OSError without errno; others are not about data.
        damaged = type(error).__module__.startswith("pyarrow") or isinstance(error, UnicodeDecodeError)
        if not damaged and not (isinstance(error, OSError) and error.errno is None):
            raise
        yield Problem(path, None, "corrupt_parquet", str(error).splitlines()[0])


def _table_rows(table: Any, unit: Unit, options: ReadOptions, state: UnitState) -> Iterator[Event]:
    metadata = table.metadata
    if metadata.num_rows == 0:
        yield Problem(unit.source.path, None, "empty_file", "the table has no rows")
    row = sum(metadata.row_group(group).num_rows for group in range(unit.start))
    stop = metadata.num_row_groups if unit.stop is None else unit.stop
    groups = list(range(unit.start, stop))
    for batch in table.iter_batches(256, groups, columns=[options.text_field], use_threads=False):
        for value in batch.column(0).to_pylist():
            yield from _table_row(value, row, unit.source.path, options)
            row += 1
        state.advance(unit.source.size * batch.num_rows // metadata.num_rows)


def _table_row(value: Any, row: int, path: str, options: ReadOptions) -> Iterator[Event]:
    text = check_text(value, options.text_field)
    if isinstance(text, str):
        yield Piece(row, _unix(text) if options.newlines == "unix" else text)
        yield DocumentEnd(row)
    else:
        yield Problem(path, row + 1, *text)

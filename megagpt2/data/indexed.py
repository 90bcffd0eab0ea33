"""Token files: Megatron's MMIDIDX version 1, `PREFIX.bin` + `PREFIX.idx`, and our `PREFIX.json` beside them.

    PREFIX.bin    tokens of all documents back to back, no padding, no header
    PREFIX.idx    0   "MMIDIDX\\0\\0"                      9 bytes
                  9   version = 1                        u64
                  17  dtype code                         u8     (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16;
                  floats refused) 18  N, number of sequences             u64
                  26  D, number of documents + 1         u64
                  34  length of each sequence in tokens  N x i32   (34 is not a multiple of 4: unaligned)
                      byte offset of each in .bin        N x i64
                      first sequence of each document    D x i64   (starts with 0, ends with N)

All little endian, size exactly 34 + 12 N + 8 D. Invariants of the files we write:
  1. A document is one sequence, so N = documents and the boundaries are 0 .. N.
  2. Sequences stand back to back, in order, from byte 0 to the end of the .bin.
  3. `.idx` appears last: where it is, `.bin` and `.json` are whole.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megagpt2.data.files import (
    sync_and_close,
    sync_directory,
    temporary_name,
    with_suffix,
    write_json,
)

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # "<" packs without padding: 34 bytes
DTYPE_OF_CODE = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
UINT16_LIMIT = 65500  # vocabularies under this are stored in two bytes, as Megatron does
MAX_SEQUENCE = 2**31 - 1  # lengths are i32
_BLOCK = 1 << 20  # entries of the index handled at once where all of them are looked at
_SPOT_CHECKS = 1024

assert HEADER.size == 34


class IndexedFileError(ValueError):
    """A `.bin/.idx` pair that is missing, damaged, or of a kind we can't read. Names file and remedy."""


def storage_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """uint16 where the vocabulary is under 65500, else int32."""
    if not 1 <= vocabulary_size <= 2**31:
        raise ValueError(f"vocabulary_size {vocabulary_size}: must be 1 .. 2**31")
    return np.dtype("<u2" if vocabulary_size < UINT16_LIMIT else "<i4")


def bare_prefix(prefix: str | Path) -> Path:
    """PREFIX, also when PREFIX.bin or PREFIX.idx was given."""
    path = Path(prefix)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class IndexedCorpus:
    """A read-only view of one `.bin/.idx` pair; opening costs the same for any size of corpus.

    Attributes:
        tokens: [tokens_total] memmap of the whole .bin in its storage dtype.
        lengths: [N] i32, tokens in each sequence.   offsets: [N] i64, byte offset of each in the .bin.
        document_boundaries: [documents + 1] i64, first sequence of each document.
        documents, tokens_total: counts.   dtype: of `tokens`.
        manifest: the content of PREFIX.json, or None for files that have none (Megatron's own).

    Raises IndexedFileError at opening for wrong magic, version, dtype, sizes, or sequences that are not back
    to back (checked at up to 1024 places; `verify` checks everything).
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = bare_prefix(prefix)
        self.bin_path, self.idx_path = with_suffix(self.prefix, ".bin"), with_suffix(self.prefix, ".idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise IndexedFileError(
                    f"{path} does not exist; prepare the corpus with tools/prepare_corpus.py, "
                    "or correct the prefix (a path without .bin or .idx)"
                )
        self.dtype, sequences, boundaries = self._read_header()
        self._index = np.memmap(self.idx_path, np.uint8, "r")
        end_of_lengths, end_of_offsets = 34 + 4 * sequences, 34 + 12 * sequences
        self.lengths = self._index[34:end_of_lengths].view("<i4")
        self.offsets = self._index[end_of_lengths:end_of_offsets].view("<i8")
        self.document_boundaries = self._index[end_of_offsets:].view("<i8")
        self.documents = boundaries - 1
        size = self.bin_path.stat().st_size
        if size % self.dtype.itemsize:
            raise self._damaged(
                self.bin_path, f"its {size} bytes are not a multiple of {self.dtype.itemsize} ({self.dtype})"
            )
        self.tokens_total = size // self.dtype.itemsize
        # An empty file can't be mapped.
        self.tokens = np.memmap(self.bin_path, self.dtype, "r") if size else np.empty(0, self.dtype)
        self._check_ends()
        self.manifest = self._read_manifest()

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        size = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise self._damaged(self.idx_path, f"it has {size} bytes, less than its header's {HEADER.size}")
        magic, version, code, sequences, boundaries = HEADER.unpack(head)
        if magic != MAGIC:
            raise self._damaged(
                self.idx_path, f"it starts with {magic!r}, not {MAGIC!r}: not a Megatron index"
            )
        if version != 1:
            raise self._damaged(
                self.idx_path, f"it is MMIDIDX version {version}, and only version 1 is known"
            )
        if code not in DTYPE_OF_CODE:
            raise self._damaged(
                self.idx_path, f"dtype code {code} is not an integer type (known: {sorted(DTYPE_OF_CODE)})"
            )
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected or boundaries < 1:
            raise self._damaged(
                self.idx_path,
                f"it has {size} bytes where {sequences} sequences and {boundaries} document boundaries "
                f"need {expected}",
            )
        return np.dtype(DTYPE_OF_CODE[code]), sequences, boundaries

    def _check_ends(self) -> None:
        """What can be checked without reading the whole index: both ends, and 1024 places between."""
        sequences, boundaries = len(self.lengths), self.document_boundaries
        if boundaries[0] != 0 or boundaries[-1] != sequences:
            raise self._damaged(
                self.idx_path,
                f"document boundaries go from {boundaries[0]} to {boundaries[-1]}, not from 0 to {sequences}",
            )
        if sequences == 0:
            if self.tokens_total:
                raise self._damaged(
                    self.bin_path, f"it holds {self.tokens_total} tokens, and its .idx no sequence"
                )
            return
        if self.offsets[0] != 0:
            raise self._not_back_to_back(0, 0)
        step = max(1, (sequences - 1) // _SPOT_CHECKS)
        self._check_neighbours(np.arange(0, sequences - 1, step))
        end = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        size = self.tokens_total * self.dtype.itemsize
        if end != size:
            kind = "cut short" if size < end else "longer than its index says"
            raise self._damaged(
                self.bin_path, f"it has {size} bytes and its .idx ends at {end}: it is {kind}"
            )

    def _check_neighbours(self, places: np.ndarray) -> None:
        """Sequence i + 1 starts where i ends, for the i in `places`."""
        lengths = self.lengths[places].astype(np.int64)
        expected = self.offsets[places] + lengths * self.dtype.itemsize
        wrong = np.flatnonzero((self.offsets[places + 1] != expected) | (lengths < 0))
        if wrong.size:
            raise self._not_back_to_back(int(places[wrong[0]]) + 1, int(expected[wrong[0]]))

    def _not_back_to_back(self, sequence: int, expected: int) -> IndexedFileError:
        return IndexedFileError(
            f"{self.idx_path}: sequence {sequence} starts at byte {self.offsets[sequence]}, "
            f"not at {expected} where the one before it ends; megagpt2 reads only a .bin whose sequences "
            "stand back to back: write it again with tools/prepare_corpus.py or Megatron's own preprocessing"
        )

    def _damaged(self, path: Path, what: str) -> IndexedFileError:
        return IndexedFileError(f"{path}: {what}; copy it again, or prepare the corpus again")

    def _read_manifest(self) -> dict[str, Any] | None:
        path = with_suffix(self.prefix, ".json")
        if not path.is_file():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._damaged(path, f"not valid JSON ({error})") from error
        if not isinstance(manifest, dict):
            raise self._damaged(path, "not a JSON object")
        for name, found in (("documents", self.documents), ("tokens", self.tokens_total)):
            if manifest.get(name, found) != found:
                raise self._damaged(path, f"it says {manifest[name]} {name} and the files hold {found}")
        return manifest

    def document(self, number: int) -> np.ndarray:
        """Tokens of document `number`, 0-based, a view of the memmap: [its length] in `dtype`."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number}: {self.prefix} has documents 0 .. {self.documents - 1}")
        first, last = (int(place) for place in self.document_boundaries[number : number + 2])
        if first == last:
            return self.tokens[:0]
        begin = int(self.offsets[first]) // self.dtype.itemsize
        end = int(self.offsets[last - 1]) // self.dtype.itemsize + int(self.lengths[last - 1])
        return self.tokens[begin:end]

    def verify(self, check_hash: bool = True) -> None:
        """Check every index entry, and the .bin's SHA-256 where the manifest has one. Reads everything.

        Raises IndexedFileError.
        """
        sequences = len(self.lengths)
        for start in range(0, sequences - 1, _BLOCK):
            self._check_neighbours(np.arange(start, min(start + _BLOCK, sequences - 1)))
        for start in range(0, self.documents, _BLOCK):
            if np.any(np.diff(self.document_boundaries[start : start + _BLOCK + 1]) < 0):
                raise self._damaged(self.idx_path, "its document boundaries go backwards")
        wanted = (self.manifest or {}).get("sha256")
        if check_hash and wanted:
            with self.bin_path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wanted:
                raise self._damaged(self.bin_path, f"SHA-256 is {found}, its .json says {wanted}")


class IndexedWriter:
    """Writes one `.bin/.idx/.json`, document by document, in flat memory: lengths are spooled to disk.

        with IndexedWriter("out/train", vocabulary_size=50257) as writer:
            writer.append(ids)

    Nothing has its final name until the block ends; if it raises, nothing is left. `finish` and `publish`
    do in two steps what leaving the block does, for those who publish several corpora together.

    Args:
        prefix: output path without suffix; its folder must exist.
        vocabulary_size: decides the storage dtype, and ids outside it are refused.
        dtype: storage dtype instead (one of the integer codes above); ids must fit it.
        overwrite: replace existing files; otherwise they raise ValueError here, at once.
        work_directory: where temporary files go, on the same file system (default: beside the output).
    """

    def __init__(
        self,
        prefix: str | Path,
        vocabulary_size: int | None = None,
        dtype: str | type | np.dtype[Any] | None = None,
        overwrite: bool = False,
        work_directory: str | Path | None = None,
    ) -> None:
        if (vocabulary_size is None) == (dtype is None):
            raise ValueError("IndexedWriter needs exactly one of vocabulary_size and dtype")
        self.prefix = Path(prefix)
        if not self.prefix.parent.is_dir():
            raise ValueError(f"output folder {self.prefix.parent} does not exist; create it first")
        if not overwrite:
            refuse_existing(self.prefix)
        self.dtype = storage_dtype(vocabulary_size) if vocabulary_size is not None else np.dtype(dtype)
        codes = {np.dtype(name): code for code, name in DTYPE_OF_CODE.items()}
        if self.dtype not in codes:
            raise ValueError(f"dtype {self.dtype}: token files hold {', '.join(str(d) for d in codes)}")
        self._code = codes[self.dtype]
        self._limit = vocabulary_size if vocabulary_size is not None else int(np.iinfo(self.dtype).max) + 1
        self.documents = self.tokens = self._open_tokens = 0
        self.manifest: dict[str, Any] = {}  # further fields for PREFIX.json
        self._sha256, self._finished = hashlib.sha256(), False
        names = [with_suffix(self.prefix, suffix) for suffix in (".bin", ".idx", ".lengths")]
        if work_directory is None:
            self._temporary = [temporary_name(name) for name in names]
        else:
            self._temporary = [Path(work_directory) / name.name for name in names]
        self._bin: IO[bytes] = self._temporary[0].open("wb")
        self._lengths: IO[bytes] = self._temporary[2].open("w+b")

    def append(self, tokens: Any) -> None:
        """Add one document: a 1-D integer array or list. Raises ValueError for other things and other ids."""
        self.write(tokens)
        self.end_document()

    def write(self, tokens: Any) -> None:
        """Add tokens to the open document, for documents that are larger than memory."""
        array = np.asarray(tokens)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"a document must be a 1-D array of integers, got {array.ndim}-D {array.dtype}")
        if self._open_tokens + array.size > MAX_SEQUENCE:
            raise ValueError(
                f"document {self.documents} has over {MAX_SEQUENCE} tokens, the format's limit; split it"
            )
        if array.size and (int(array.min()) < 0 or int(array.max()) >= self._limit):
            bad = int(array.min()) if int(array.min()) < 0 else int(array.max())
            raise ValueError(
                f"token id {bad} of document {self.documents}: ids must be 0 .. {self._limit - 1}"
            )
        data = np.ascontiguousarray(array, self.dtype).data
        self._bin.write(data)
        self._sha256.update(data)
        self._open_tokens += array.size

    def end_document(self) -> None:
        """Close the open document; without tokens it is an empty one."""
        self._lengths.write(struct.pack("<i", self._open_tokens))
        self.documents += 1
        self.tokens += self._open_tokens
        self._open_tokens = 0

    def finish(self) -> None:
        """Write and fsync everything under temporary names. After this only renames remain."""
        assert self._open_tokens == 0, "end_document() first"
        sync_and_close(self._bin)
        with self._temporary[1].open("wb") as index:
            index.write(HEADER.pack(MAGIC, 1, self._code, self.documents, self.documents + 1))
            for lengths in self._spooled_lengths():
                index.write(lengths.data)
            offset = 0
            for lengths in self._spooled_lengths():
                ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize + offset
                starts = np.concatenate(([offset], ends[:-1])).astype("<i8")
                index.write(starts.data)
                offset = int(ends[-1])
            for start in range(0, self.documents + 1, _BLOCK):
                index.write(np.arange(start, min(start + _BLOCK, self.documents + 1), dtype="<i8").data)
            sync_and_close(index)
        self._lengths.close()
        self._temporary[2].unlink()
        self._finished = True

    def _spooled_lengths(self) -> Any:
        self._lengths.flush()
        self._lengths.seek(0)
        while block := self._lengths.read(4 * _BLOCK):
            yield np.frombuffer(block, "<i4")

    def publish(self) -> None:
        """Give the files their names, `.idx` last, which is what makes the corpus exist."""
        assert self._finished, "finish() first"
        index_path = with_suffix(self.prefix, ".idx")
        index_path.unlink(missing_ok=True)  # an old index must never stand beside the new .bin
        self._temporary[0].replace(with_suffix(self.prefix, ".bin"))
        write_json(with_suffix(self.prefix, ".json"), self.summary())
        sync_directory(self.prefix.parent)
        self._temporary[1].replace(index_path)
        sync_directory(self.prefix.parent)

    def summary(self) -> dict[str, Any]:
        """The manifest: format, documents, tokens, dtype, SHA-256 of the .bin, and what `manifest` adds."""
        return {
            "format": "MMIDIDX 1",
            "documents": self.documents,
            "tokens": self.tokens,
            "dtype": self.dtype.name,
            "sha256": self._sha256.hexdigest(),
            **self.manifest,
        }

    def discard(self) -> None:
        """Drop the temporary files. Safe to call more than once."""
        self._bin.close()
        self._lengths.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
                self.publish()
        finally:
            self.discard()  # after publish there is nothing left of it to drop


def refuse_existing(prefix: Path) -> None:
    """ValueError if any of PREFIX.bin, .idx, .json is there already."""
    for suffix in (".bin", ".idx", ".json"):
        if with_suffix(prefix, suffix).exists():
            raise ValueError(
                f"output {with_suffix(prefix, suffix)} exists; choose another prefix or pass --overwrite"
            )

"""Shuffling more documents than memory holds, in two sequential passes.

A document's place in the shuffled corpus is a hash of (seed, file, place in file): nothing else, so neither
the number of workers nor their speed matters, and no permutation has to be held. The hash's top bits choose
a bucket:

    pass 1   each worker appends documents to its own files, one per bucket      BUCKET-WORKER.tokens, .index
    pass 2   bucket by bucket: sort the index records by hash, copy documents in that order

Reads of pass 2 jump about only inside one bucket, which the page cache holds; in memory there is one
bucket's index.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

RECORD = np.dtype(
    [("key", "<u8"), ("file", "<u4"), ("identity", "<u8"), ("offset", "<u8"), ("length", "<u4")]
)
BUCKET_INPUT_BYTES = 256 << 20
MAX_BUCKET_BITS = 6  # two open files per bucket and worker: 64 buckets stay far below any open-file limit
COPY_TOKENS = 1 << 20
MAX_DOCUMENT = 2**31 - 2  # the format's limit on a sequence, less its <|endoftext|>


def bucket_bits(input_bytes: int) -> int:
    """How many bits of the hash name the bucket, so that one bucket stands for about 256 MB of input."""
    return min(MAX_BUCKET_BITS, max(0, (input_bytes // BUCKET_INPUT_BYTES)).bit_length())


def document_key(seed: int, file: int, identity: int) -> int:
    """The document's place in the order: 64 hashed bits. Equal keys are ordered by (file, identity)."""
    packed = struct.pack("<QQQ", seed, file, identity)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class BucketWriter:
    """One worker's side of pass 1. Not thread-safe; every worker has its own `name`."""

    def __init__(self, directory: Path, name: str, seed: int, bits: int, dtype: np.dtype[Any]) -> None:
        self._directory, self._name, self._seed, self._bits, self._dtype = directory, name, seed, bits, dtype
        self._files: dict[int, tuple[IO[bytes], IO[bytes]]] = {}
        self._sizes: dict[int, int] = {}  # tokens in each bucket file so far
        self._open: tuple[int, int, int, int] | None = None  # bucket, key, file, identity
        self._length = 0

    def write(self, file: int, identity: int, ids: list[int]) -> None:
        """Add tokens to the open document, opening it if there is none."""
        if self._open is None:
            key = document_key(self._seed, file, identity)
            self._open = (key >> (64 - self._bits) if self._bits else 0, key, file, identity)
        tokens, _ = self._bucket(self._open[0])
        tokens.write(np.array(ids, self._dtype).data)
        self._length += len(ids)

    def end(self) -> int:
        """Close the open document; returns its tokens."""
        assert self._open is not None, "a document ends that has no tokens"
        bucket, key, file, identity = self._open
        length, offset = self._length, self._sizes[bucket]
        self._files[bucket][1].write(np.array([(key, file, identity, offset, length)], RECORD).tobytes())
        self._sizes[bucket] = offset + length
        self._open, self._length = None, 0
        return length

    @property
    def length(self) -> int:
        """Tokens in the open document."""
        return self._length

    def abort(self) -> None:
        """Forget the open document, if any."""
        if self._open is not None:
            bucket = self._open[0]
            tokens = self._files[bucket][0]
            tokens.seek(self._sizes[bucket] * self._dtype.itemsize)
            tokens.truncate()
        self._open, self._length = None, 0

    def flush(self) -> None:
        """Hand everything to the operating system, where pass 2 will read it."""
        for pair in self._files.values():
            for file in pair:
                file.flush()

    def close(self) -> None:
        """Close the files."""
        for pair in self._files.values():
            for file in pair:
                file.close()

    def _bucket(self, bucket: int) -> tuple[IO[bytes], IO[bytes]]:
        if bucket not in self._files:
            stem = self._directory / f"{bucket:03d}-{self._name}"
            tokens, index = Path(f"{stem}.tokens").open("wb"), Path(f"{stem}.index").open("wb")  # noqa: SIM115
            self._files[bucket] = (tokens, index)
            self._sizes[bucket] = 0
        return self._files[bucket]


def shuffled_documents(directory: Path, dtype: np.dtype[Any]) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Pass 2: every document in shuffled order as (tokens, parts of at most a million tokens)."""
    buckets = sorted({path.name.split("-", 1)[0] for path in directory.glob("*.index")})
    for bucket in buckets:
        paths = sorted(directory.glob(f"{bucket}-*.index"))
        records = [np.fromfile(path, RECORD) for path in paths]
        writer = np.repeat(np.arange(len(paths)), [len(record) for record in records])
        index = np.concatenate(records)
        order = np.lexsort((index["identity"], index["file"], index["key"]))
        with ExitStack() as stack:
            files = [stack.enter_context(path.with_suffix(".tokens").open("rb")) for path in paths]
            for place in order:
                record = index[place]
                length = int(record["length"])
                yield length, _parts(files[writer[place]].fileno(), int(record["offset"]), length, dtype)
        for path in paths:  # give the disk space back as soon as it is copied
            path.unlink()
            path.with_suffix(".tokens").unlink()


def _parts(handle: int, offset: int, length: int, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    # pread, not memmap: mapped pages count as this process's memory, and would grow with the corpus.
    for start in range(0, length, COPY_TOKENS):
        wanted = min(COPY_TOKENS, length - start) * dtype.itemsize
        data = os.pread(handle, wanted, (offset + start) * dtype.itemsize)
        if len(data) != wanted:
            raise OSError(
                f"a temporary token file lost bytes: wanted {wanted}, got {len(data)}; is the disk full?"
            )
        yield np.frombuffer(data, dtype)

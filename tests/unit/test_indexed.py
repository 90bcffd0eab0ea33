"""`.bin/.idx`: byte for byte Megatron's MMIDIDX 1, whole or absent."""

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.data.indexed import IndexedCorpus, IndexedFileError, IndexedWriter, storage_dtype

ROOT = Path(__file__).resolve().parents[2]


def write_by_hand(
    prefix: Path, sequences, code=8, form="H", boundaries=None, version=1, magic=b"MMIDIDX\0\0"
):
    """A pair as the format's description says, with nothing of our writer in it."""
    size = struct.calcsize(form)
    boundaries = list(range(len(sequences) + 1)) if boundaries is None else boundaries
    Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack(f"<{len(s)}{form}", *s) for s in sequences))
    offsets, position = [], 0
    for sequence in sequences:
        offsets.append(position)
        position += len(sequence) * size
    index = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    index += struct.pack("<QQ", len(sequences), len(boundaries))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *offsets)
    index += struct.pack(f"<{len(boundaries)}q", *boundaries)
    Path(f"{prefix}.idx").write_bytes(index)


def write(prefix: Path, documents, **options) -> Path:
    with IndexedWriter(prefix, **(options or {"vocabulary_size": 50257})) as writer:
        for document in documents:
            writer.append(document)
    return prefix


DOCUMENTS = [[1, 2, 3], [], [50256], list(range(100))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 65499), max_size=20), max_size=12),
    st.sampled_from([50257, 65500, 100_000]),
)
def test_round_trip_and_exact_size(documents, vocabulary_size):
    documents = [[token % vocabulary_size for token in document] for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder) / "a", documents, vocabulary_size=vocabulary_size)
        corpus = IndexedCorpus(prefix)
        corpus.verify()
        assert corpus.dtype == (np.uint16 if vocabulary_size < 65500 else np.int32)
        assert [corpus.document(i).tolist() for i in range(corpus.documents)] == documents
        assert corpus.tokens.tolist() == [token for document in documents for token in document]
        assert corpus.lengths.tolist() == [len(document) for document in documents]
        assert corpus.tokens_total == sum(map(len, documents))
        n, d = len(documents), len(documents) + 1
        assert corpus.idx_path.stat().st_size == 34 + 12 * n + 8 * d


def test_what_we_write_is_what_the_description_says(tmp_path):
    write(tmp_path / "ours", DOCUMENTS)
    write_by_hand(tmp_path / "hand", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"hand{suffix}").read_bytes()


def test_fields_stand_where_struct_finds_them(tmp_path):
    data = write(tmp_path / "a", DOCUMENTS).with_suffix(".idx").read_bytes()
    assert struct.unpack_from("<9sQBQQ", data) == (b"MMIDIDX\0\0", 1, 8, 4, 5)
    assert struct.unpack_from("<4i", data, 34) == (3, 0, 1, 100)
    assert struct.unpack_from("<4q", data, 34 + 16) == (0, 6, 6, 8)
    assert struct.unpack_from("<5q", data, 34 + 48) == (0, 1, 2, 3, 4)


def test_reads_documents_of_several_sequences_as_megatron_may_write_them(tmp_path):
    write_by_hand(tmp_path / "a", [[1, 2], [3], [], [4, 5, 6]], code=4, form="i", boundaries=[0, 2, 2, 4])
    corpus = IndexedCorpus(tmp_path / "a")
    corpus.verify()
    assert corpus.documents == 3
    assert [corpus.document(i).tolist() for i in range(3)] == [[1, 2, 3], [], [4, 5, 6]]
    assert corpus.manifest is None


@pytest.mark.parametrize(("code", "form"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_integer_type_is_read(tmp_path, code, form):
    write_by_hand(tmp_path / "a", [[1, 2, 100]], code=code, form=form)
    assert IndexedCorpus(tmp_path / "a").tokens.tolist() == [1, 2, 100]


def test_an_empty_corpus_is_legal(tmp_path):
    corpus = IndexedCorpus(write(tmp_path / "a", []))
    corpus.verify()
    assert (corpus.documents, corpus.tokens_total, len(corpus.tokens)) == (0, 0, 0)


def test_manifest_has_hash_and_counts(tmp_path):
    with IndexedWriter(tmp_path / "a", vocabulary_size=500) as writer:
        writer.manifest["tokenizer_sha256"] = "abc"
        writer.append(np.arange(10))
    manifest = IndexedCorpus(tmp_path / "a.bin").manifest
    assert manifest == json.loads((tmp_path / "a.json").read_text())
    assert manifest["sha256"] == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    assert (manifest["documents"], manifest["tokens"], manifest["tokenizer_sha256"]) == (1, 10, "abc")


def test_a_document_may_be_written_in_parts(tmp_path):
    with IndexedWriter(tmp_path / "parts", vocabulary_size=500) as writer:
        for part in ([1, 2], [], [3]):
            writer.write(part)
        writer.end_document()
        writer.append([4])
    write(tmp_path / "whole", [[1, 2, 3], [4]], vocabulary_size=500)
    assert (tmp_path / "parts.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


def _poke(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b, i: i.unlink(), r"a\.idx does not exist; prepare"),
        (lambda b, i: b.unlink(), r"a\.bin does not exist; prepare"),
        (lambda b, i: i.write_bytes(b"MM"), "2 bytes, less than its header's 34"),
        (lambda b, i: _poke(i, 0, b"X"), "not a Megatron index"),
        (lambda b, i: _poke(i, 9, b"\x02"), "version 2"),
        (lambda b, i: _poke(i, 17, b"\x07"), "dtype code 7"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:-1]), "need 122"),
        (lambda b, i: _poke(i, 18, b"\xff" * 8), "document boundaries need"),
        (lambda b, i: b.write_bytes(b.read_bytes()[:-2]), "cut short"),
        (lambda b, i: b.write_bytes(b.read_bytes() + b"xx"), "longer than its index"),
        (lambda b, i: b.write_bytes(b.read_bytes() + b"x"), "not a multiple of 2"),
        (lambda b, i: _poke(i, 34 + 16 + 8, struct.pack("<q", 8)), "sequence 1 starts at byte 8, not at 6"),
        (lambda b, i: _poke(i, 34 + 48, struct.pack("<q", 1)), "boundaries go from 1"),
        (lambda b, i: b.with_suffix(".json").write_text('{"tokens": 7}'), "says 7 tokens"),
        (lambda b, i: b.with_suffix(".json").write_text("{"), "not valid JSON"),
    ],
)
def test_damage_is_found_at_opening(tmp_path, damage, message):
    write(tmp_path / "a", DOCUMENTS)
    damage(tmp_path / "a.bin", tmp_path / "a.idx")
    with pytest.raises(IndexedFileError, match=message) as caught:
        IndexedCorpus(tmp_path / "a")
    assert str(tmp_path) in str(caught.value)


def test_verify_finds_what_opening_does_not_look_at(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    _poke(tmp_path / "a.bin", 4, b"\x09")
    corpus = IndexedCorpus(tmp_path / "a")
    corpus.verify(check_hash=False)
    with pytest.raises(IndexedFileError, match="SHA-256"):
        corpus.verify()
    # 5000 sequences: opening looks at every fourth pair of neighbours.
    write(tmp_path / "b", [[1]] * 5000)
    _poke(tmp_path / "b.idx", 34 + 4 * 5000 + 8 * 4994, struct.pack("<q", 0))
    with pytest.raises(IndexedFileError, match="sequence 4994 starts at byte 0"):
        IndexedCorpus(tmp_path / "b").verify()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([50257], "token id 50257 of document 1"),
        ([-1], "token id -1"),
        ([[1]], "1-D"),
        ([1.5], "integers"),
    ],
)
def test_bad_documents_are_refused_and_nothing_is_left(tmp_path, document, message):
    def attempt():
        with IndexedWriter(tmp_path / "a", vocabulary_size=50257) as writer:
            writer.append([1])
            writer.append(document)

    with pytest.raises(ValueError, match=message):
        attempt()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_old_corpus_when_overwriting(tmp_path):
    write(tmp_path / "a", [[7]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def attempt():
        with IndexedWriter(tmp_path / "a", vocabulary_size=100, overwrite=True) as writer:
            writer.append([1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_existing_output_needs_overwrite(tmp_path):
    write(tmp_path / "a", [[7]])
    with pytest.raises(ValueError, match="exists"):
        IndexedWriter(tmp_path / "a", vocabulary_size=100)
    write(tmp_path / "a", [[8, 9]], vocabulary_size=100, overwrite=True)
    assert IndexedCorpus(tmp_path / "a").tokens.tolist() == [8, 9]


@pytest.mark.parametrize("rename", [1, 2, 3])
def test_killed_between_any_two_renames_it_is_no_corpus(tmp_path, rename):
    """SIGKILL at the n-th rename while replacing an old corpus: the reader must not see a mixture."""
    write(tmp_path / "a", [[7]])
    script = f"""
import os, pathlib, signal
from megagpt2.data.indexed import IndexedWriter
plain, count = pathlib.Path.replace, 0
def replace(self, target):
    global count
    count += 1
    if count == {rename}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, target)
pathlib.Path.replace = replace
with IndexedWriter({str(tmp_path / "a")!r}, vocabulary_size=100, overwrite=True) as writer:
    writer.append([1, 2, 3])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    with pytest.raises(IndexedFileError, match=r"a\.idx does not exist"):
        IndexedCorpus(tmp_path / "a")


def test_storage_dtype_changes_at_megatrons_limit():
    assert storage_dtype(65499) == np.uint16
    assert storage_dtype(65500) == np.int32
    with pytest.raises(ValueError, match="vocabulary_size 0"):
        storage_dtype(0)


def test_document_numbers_are_checked(tmp_path):
    corpus = IndexedCorpus(write(tmp_path / "a", DOCUMENTS))
    for number in (-1, 4):
        with pytest.raises(IndexError, match="documents 0 .. 3"):
            corpus.document(number)

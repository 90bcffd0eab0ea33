"""Corpus preparation: every document arrives once, whatever the workers; memory is flat."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.data import corpus as corpus_module
from megagpt2.data.corpus import CorpusError, PrepareOptions, prepare_corpus, split_counts
from megagpt2.data.indexed import IndexedCorpus
from megagpt2.data.readers import DocumentEnd, Piece, UnitState, read_unit
from megagpt2.data.shuffle import BucketWriter, shuffled_documents
from megagpt2.data.sources import Problem, ReadOptions, find_sources, plan_units
from megagpt2.data.tokenizer import END_OF_TEXT, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = "A document has some words, and each of them is a token or two; the end is never far.\n"
TOKENIZER = Tokenizer.train([TEXT * 20], 270)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    return folder


def tool(name: str, *arguments, check: bool = False, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, check=check, **options)


def texts_of(prefix: Path) -> list[str]:
    corpus = IndexedCorpus(prefix)
    corpus.verify()
    texts = []
    for number in range(corpus.documents):
        ids = corpus.document(number)
        assert ids[-1] == TOKENIZER.end_of_text
        texts.append(TOKENIZER.decode(ids[:-1]))
    return texts


def jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- what arrives --------------------------------------------------------------------------------------


def test_every_kind_of_file_arrives_whole(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet
    import zstandard

    folder = tmp_path / "in"
    (folder / "deep" / "er").mkdir(parents=True)
    texts = {name: f"{name}: é 世界 \U0001f642 {END_OF_TEXT}\r\n{TEXT}" for name in "abcdefgh"}
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + texts["a"].encode())  # the byte order mark is not text
    (folder / "deep" / "b.txt.gz").write_bytes(gzip.compress(texts["b"].encode()))
    half = len(texts["c"].encode()) // 2  # two zstd frames, the cut inside a line
    frames = [zstandard.compress(texts["c"].encode()[:half]), zstandard.compress(texts["c"].encode()[half:])]
    (folder / "c.txt.zst").write_bytes(b"".join(frames))
    jsonl(folder / "deep" / "er" / "d.jsonl", [texts["d"]])
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts["e"]}).encode()))
    (folder / "f.jsonl.zst").write_bytes(
        zstandard.compress(json.dumps({"text": texts["f"]}).encode() + b"\n\n")
    )
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": [texts["g"]]}), folder / "g.parquet")
    (folder / "h.py").write_bytes(texts["h"].encode())
    (folder / ".hidden.txt").write_text("not me")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    options = PrepareOptions(read=ReadOptions(suffixes=(".py",)), valid_fraction=0.25)
    report = prepare_corpus([str(folder)], TOKENIZER, tmp_path / "out", options)
    assert report.errors_path is None
    train, valid = texts_of(tmp_path / "out_train"), texts_of(tmp_path / "out_valid")
    assert (len(train), len(valid)) == (6, 2)
    assert Counter(train + valid) == Counter(texts.values())


def test_workers_and_cuts_change_nothing(tmp_path, tokenizer_folder, monkeypatch):
    texts = [f"{number} {TEXT * (number % 7)}" for number in range(400)]
    files = [jsonl(tmp_path / "a.jsonl", texts[:250]), jsonl(tmp_path / "b.jsonl", texts[250:])]
    with files[0].open("ab") as file:
        file.write(b"{broken\n")
    arguments = ["--input", *files, "--tokenizer", tokenizer_folder, "--seed", 7]
    for workers in (1, 3):
        tool(
            "prepare_corpus",
            *arguments,
            "--output",
            tmp_path / f"w{workers}" / "out",
            "--workers",
            workers,
            check=True,
        )
    expected = outputs(tmp_path / "w1")
    assert set(expected) == {"out_errors.jsonl"} | {
        f"out_{part}.{suffix}" for part in ("train", "valid") for suffix in ("bin", "idx", "json")
    }
    assert outputs(tmp_path / "w3") == expected
    # Units of 1000 bytes and eight buckets: the same order of the same documents.
    monkeypatch.setattr(corpus_module, "plan_units", functools.partial(plan_units, unit_bytes=1000))
    monkeypatch.setattr(corpus_module, "bucket_bits", lambda size: 3)
    prepare_corpus([str(file) for file in files], TOKENIZER, tmp_path / "cut" / "out", PrepareOptions(seed=7))
    assert outputs(tmp_path / "cut") == expected
    # Another seed is another order, and another split, of the same documents.
    monkeypatch.undo()
    prepare_corpus(
        [str(file) for file in files], TOKENIZER, tmp_path / "seed" / "out", PrepareOptions(seed=8)
    )
    both = [
        texts_of(tmp_path / name / "out_train") + texts_of(tmp_path / name / "out_valid")
        for name in ("w1", "seed")
    ]
    assert Counter(both[0]) == Counter(both[1]) == Counter(texts)
    assert both[0] != both[1] and both[0] != texts


def test_manifest_accounts_for_everything(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [f"{number} {TEXT}" for number in range(40)] + ["", "  \n"])
    report = prepare_corpus([str(file)], TOKENIZER, tmp_path / "out", PrepareOptions(valid_fraction=0.1))
    manifests = [IndexedCorpus(tmp_path / f"out_{part}").manifest for part in ("train", "valid")]
    for manifest in manifests:
        assert manifest["counts"] == {
            "read": 42,
            "written": 40,
            "skipped": 2,
            "skipped_by_reason": {"empty_document": 2},
        }
        assert manifest["tokenizer_sha256"] == TOKENIZER.sha256
        assert manifest["vocabulary_size"] == 270
        assert manifest["sources"] == [{"path": str(file), "bytes": file.stat().st_size}]
        assert manifest["options"]["seed"] == 1234
    assert [manifest["documents"] for manifest in manifests] == [36, 4]
    assert (report.read, report.written) == (42, 40)


@pytest.mark.parametrize(("documents", "fraction", "expected"), [(100, 0.05, (95, 5)), (2, 0.05, (1, 1)),
    (3, 0.9, (1, 2)), (10, 0.0, (10, 0)), (1, 0.0, (1, 0))])  # fmt: skip
def test_split_leaves_neither_part_empty(documents, fraction, expected):
    assert split_counts(documents, fraction) == expected


def test_one_document_is_not_split(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(CorpusError, match="--document-delimiter"):
        prepare_corpus([str(tmp_path / "a.txt")], TOKENIZER, tmp_path / "new" / "out", PrepareOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"], "something was left behind"
    prepare_corpus([str(tmp_path / "a.txt")], TOKENIZER, tmp_path / "out", PrepareOptions(valid_fraction=0.0))
    assert texts_of(tmp_path / "out_train") == [TEXT]
    assert not (tmp_path / "out_valid.idx").exists()


@pytest.mark.parametrize(("delimiter", "content", "expected"), [
    ("<|endoftext|>", "a b\n<|endoftext|>\nc\n\nd\r\n<|endoftext|>\r\ne<|endoftext|>\n",
     ["a b\n", "c\n\nd\r\n", "e<|endoftext|>\n"]),
    ("<|endoftext|>", "<|endoftext|>\na\n<|endoftext|>\nb", ["a\n", "b"]),
    ("<|endoftext|>", "a\n<|endoftext|>", ["a\n"]),
    ("", "\n\na\nb\n\n\n\nc\n\n", ["a\nb\n", "c\n"]),
])  # fmt: skip
def test_delimiter_lines_separate_documents(tmp_path, delimiter, content, expected):
    (tmp_path / "a.txt").write_bytes(content.encode())
    events = list(_read(tmp_path / "a.txt", ReadOptions(delimiter=delimiter)))
    assert [text for _, text in events] == expected


def _read(path: Path, options: ReadOptions, unit_bytes: int = 1 << 30):
    """(identity, text) or Problem of every document, lines numbered from the file's first."""
    sources, problems = find_sources([str(path)], options)
    assert not problems
    earlier = 0
    for unit in plan_units(sources, options, unit_bytes):
        state, pieces = UnitState(lambda count: None), []
        for event in read_unit(unit, options, state):
            if isinstance(event, Piece):
                pieces.append(event.text)
            elif isinstance(event, DocumentEnd):
                yield event.identity, "".join(pieces)
                pieces = []
            else:
                yield Problem(event.file, event.line and event.line + earlier, event.reason, event.detail)
                pieces = []
        earlier += state.lines


LINES = st.sampled_from(
    [b"--", b"", b"a b", b"c\r", b"\xff", b'{"text": "x y"}', b'{"text": 3}', b"{", "é".encode()]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=30), st.integers(1, 40), st.booleans(), st.booleans())
def test_cutting_a_file_anywhere_changes_nothing(tmp_path_factory, lines, unit_bytes, is_json, ends):
    path = tmp_path_factory.mktemp("cut") / ("a.jsonl" if is_json else "a.txt")
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    options = ReadOptions(delimiter=None if is_json else "--")
    assert list(_read(path, options, unit_bytes)) == list(_read(path, options))


def test_newlines_option(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert list(_read(tmp_path / "a.txt", ReadOptions(newlines="unix"))) == [(0, "a\nb\nc\n")]
    assert list(_read(tmp_path / "a.txt", ReadOptions())) == [(0, "a\r\nb\rc\n")]


def test_large_tables_are_cut_by_row_groups(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    texts = [f"{number} é" for number in range(50)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7)
    sources, _ = find_sources([str(tmp_path / "a.parquet")], ReadOptions())
    units = list(plan_units(sources, ReadOptions(), unit_bytes=sources[0].size // 3))
    assert len(units) > 2 and sum(unit.size for unit in units) == sources[0].size
    documents = list(_read(tmp_path / "a.parquet", ReadOptions(), sources[0].size // 3))
    assert documents == list(enumerate(texts))


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), max_size=30),
    st.integers(0, 3),
    st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_shuffle_is_a_permutation_that_knows_no_workers(tmp_path_factory, documents, bits, workers):
    def shuffle(bits, workers):
        folder = tmp_path_factory.mktemp("buckets")
        writers = [BucketWriter(folder, str(w), 5, bits, np.dtype("<u2")) for w in range(workers)]
        for number, document in enumerate(documents):
            writer = writers[number % workers]
            writer.write(0, 10_000 + number, [99])  # a document that goes bad leaves nothing
            writer.abort()
            for token in document:
                writer.write(0, number, [token])
            assert writer.end() == len(document)
        for writer in writers:
            writer.close()
        return [
            [t for part in parts for t in part.tolist()]
            for _, parts in shuffled_documents(folder, np.dtype("<u2"))
        ]

    result = shuffle(bits, workers)
    assert sorted(result) == sorted(documents)
    assert result == shuffle(0, 1)


# -- what does not arrive -------------------------------------------------------------------------------


def bad_inputs(folder: Path) -> dict[str, tuple[Path, int | None, str]]:
    """One file of each kind of badness: (file, line, reason). Each also holds what good text it can."""
    import pyarrow.parquet
    import zstandard

    good = json.dumps({"text": TEXT}).encode() + b"\n"
    noise = np.random.default_rng(0).integers(97, 123, 50_000).astype(np.uint8).tobytes()
    line = json.dumps({"text": noise.decode()}).encode() + b"\n"
    packed = gzip.compress(good + line)
    contents = {
        "bytes.txt": (b"fine\nfine\nbad \xff here\n", 3, "invalid_utf8"),
        "cut.txt": ("fine\né".encode()[:-1], 2, "invalid_utf8"),
        "bytes.jsonl": (good + b'{"text": "\xff"}\n', 2, "invalid_utf8"),
        "broken.jsonl": (good + b'\n{"text": "no end\n', 3, "broken_json"),
        "missing.jsonl": (good + b'{"content": "x"}\n', 2, "missing_field"),
        "number.jsonl": (good + b'{"text": 5}\n', 2, "wrong_type"),
        "null.jsonl": (good + b'{"text": null}\n', 2, "wrong_type"),
        "list.jsonl": (good + b"[1]\n", 2, "wrong_type"),
        "surrogate.jsonl": (good + b'{"text": "\\ud800"}\n', 2, "invalid_text"),
        "empty.jsonl": (good + b'{"text": ""}\n', 2, "empty_document"),
        "blank.txt": (b" \n\n", 2, "empty_document"),
        "nothing.txt": (b"", None, "empty_file"),
        "cut.jsonl.gz": (packed[: len(packed) // 2], 2, "corrupt_gzip"),
        "not.jsonl.gz": (b"this is no gzip", None, "corrupt_gzip"),
        "cut.jsonl.zst": (zstandard.compress(good + 6 * line)[:-9], 7, "corrupt_zstd"),
        "not.txt.zst": (b"this is no zstd", None, "corrupt_zstd"),
        "not.parquet": (b"PAR1 this is no parquet", None, "corrupt_parquet"),
        "picture.png": (b"\x89PNG", None, "unknown_kind"),
    }
    for name, (content, _, _) in contents.items():
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT, None]}), folder / "null.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1]}), folder / "column.parquet")
    found = {name: (folder / name, number, reason) for name, (_, number, reason) in contents.items()}
    found["null.parquet"] = (folder / "null.parquet", 2, "wrong_type")
    found["column.parquet"] = (folder / "column.parquet", None, "missing_field")
    found["gone.txt"] = (folder / "gone.txt", None, "missing_path")
    found["*.gone"] = (folder / "*.gone", None, "missing_path")
    return found


def test_each_kind_of_bad_input_is_counted_and_listed(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "in").mkdir()
    cases = bad_inputs(tmp_path / "in")
    good = jsonl(tmp_path / "good.jsonl", [TEXT] * 3)
    inputs = [str(good), *(str(path) for path, _, _ in cases.values())]
    report = prepare_corpus(inputs, TOKENIZER, tmp_path / "out", PrepareOptions())
    listed = [json.loads(line) for line in (tmp_path / "out_errors.jsonl").read_text().splitlines()]
    found = {
        Path(record["file"]).name: (Path(record["file"]), record["line"], record["reason"])
        for record in listed
    }
    assert found == cases
    assert len(listed) == len(cases)
    assert report.skipped == Counter(reason for _, _, reason in cases.values())
    assert report.read == report.written + len(cases)
    assert len(texts_of(tmp_path / "out_train")) + len(texts_of(tmp_path / "out_valid")) == report.written


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("bytes.txt", 1),
        ("broken.jsonl", 1),
        ("broken.jsonl", 2),
        ("nothing.txt", 1),
        ("not.jsonl.gz", 1),
        ("gone.txt", 1),
    ],
)
def test_on_error_stop_names_the_place_and_leaves_nothing(tmp_path, tokenizer_folder, name, workers):
    pytest.importorskip("pyarrow")
    (tmp_path / "in").mkdir()
    path, line, reason = bad_inputs(tmp_path / "in")[name]
    good = jsonl(tmp_path / "good.jsonl", [TEXT] * 3)
    result = tool("prepare_corpus", "--input", good, path, "--tokenizer", tokenizer_folder, "--output",
                  tmp_path / "new" / "out", "--on-error", "stop", "--workers", workers)  # fmt: skip
    assert result.returncode == 2
    place = f"{path}, line {line}" if line else str(path)
    assert f"{place}: {reason}" in result.stderr
    assert not (tmp_path / "new").exists()


def test_stop_numbers_lines_from_the_files_first_in_any_unit(tmp_path, monkeypatch):
    file = jsonl(tmp_path / "a.jsonl", [TEXT] * 30)
    with file.open("ab") as out:
        out.write(b"{\n")
    monkeypatch.setattr(corpus_module, "plan_units", functools.partial(plan_units, unit_bytes=333))
    with pytest.raises(CorpusError, match="line 31: broken_json"):
        prepare_corpus([str(file)], TOKENIZER, tmp_path / "out", PrepareOptions(on_error="stop"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--input", "GOOD", "--tokenizer", "/nowhere"], "tokenizer directory /nowhere does not exist"),
    (["--input", "/nowhere/at/all"], "missing_path"),
    (["--input", "GOOD", "--valid-fraction", "1.5"], "valid_fraction 1.5"),
    (["--input", "GOOD", "--workers", "0"], "workers 0"),
    (["--input", "GOOD", "--suffix", "py"], "write it with its dot"),
    (["--input", "GOOD", "--text-field", "body"], "no document could be read (3 missing_field)"),
])  # fmt: skip
def test_wrong_requests_exit_2_with_a_reason(tmp_path, tokenizer_folder, arguments, message):
    good = jsonl(tmp_path / "good.jsonl", [TEXT] * 3)
    arguments = [str(good) if argument == "GOOD" else argument for argument in arguments]
    if "--tokenizer" not in arguments:
        arguments += ["--tokenizer", str(tokenizer_folder)]
    result = tool("prepare_corpus", "--workers", "1", "--output", tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["good.jsonl"]


def test_existing_output_is_kept_unless_overwrite(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", [TEXT] * 4)
    prepare_corpus([str(good)], TOKENIZER, tmp_path / "out", PrepareOptions())
    with pytest.raises(ValueError, match="--overwrite"):
        prepare_corpus([str(good)], TOKENIZER, tmp_path / "out", PrepareOptions())
    again = PrepareOptions(valid_fraction=0.0, overwrite=True)
    prepare_corpus([str(good)], TOKENIZER, tmp_path / "out", again)
    assert len(texts_of(tmp_path / "out_train")) == 4
    assert not list(tmp_path.glob("out_valid*")), "the validation part of the earlier run is still there"


# -- crashes and memory ------------------------------------------------------------------------------------


def _start(tmp_path: Path, tokenizer_folder: Path, workers: int) -> subprocess.Popen[str]:
    jsonl(tmp_path / "big.jsonl", [TEXT * 400] * 1500)
    command = [sys.executable, str(ROOT / "tools" / "prepare_corpus.py"),
               "--input", str(tmp_path / "big.jsonl"), "--tokenizer", str(tokenizer_folder),
               "--output", str(tmp_path / "out" / "x"),
               "--workers", str(workers)]  # fmt: skip
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".x.partial-*/*.tokens")):
        assert process.poll() is None and time.monotonic() < deadline, "it never began to write"
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_leaves_nothing(tmp_path, tokenizer_folder, workers):
    process = _start(tmp_path, tokenizer_folder, workers)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; nothing was written" in error
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_no_corpus_and_the_next_one_cleans_up(tmp_path, tokenizer_folder):
    process = _start(tmp_path, tokenizer_folder, 1)
    process.kill()
    process.communicate(timeout=60)
    left = list((tmp_path / "out").iterdir())
    assert [path.name.startswith(".x.partial-") for path in left] == [True], "more than the work folder"
    good = jsonl(tmp_path / "good.jsonl", [TEXT] * 4)
    prepare_corpus([str(good)], TOKENIZER, tmp_path / "out" / "x", PrepareOptions(valid_fraction=0.0))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "x_train.bin",
        "x_train.idx",
        "x_train.json",
    }


MEASURE = """
import pathlib, re, runpy, sys
main = runpy.run_path(sys.argv[1], run_name="tool")["main"]
assert main(sys.argv[2:]) == 0
# Not ru_maxrss: that one starts with the peak of the process that started this one.
print("peak_kib", re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("name", ["documents.jsonl", "document.txt"])
def test_memory_does_not_grow_with_the_input(tmp_path, tokenizer_folder, name):
    """Ten times the input, as many documents or as one: the peak stays. 3 MB, enough to fill every buffer of
    fixed size, against 30 MB of text."""
    # glibc's allocator shall give back what is freed: what it keeps (5 MB, sooner or later) is not what is tested.
    eager = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
    peaks = []
    for scale in (2, 20):
        path = tmp_path / f"{scale}-{name}"
        if name.endswith(".jsonl"):
            jsonl(path, [TEXT * 20] * (800 * scale))
        else:
            path.write_text(TEXT * (16_000 * scale))
        arguments = ["--input", path, "--tokenizer", tokenizer_folder, "--output", tmp_path / f"out{scale}",
                     "--workers", 1, "--valid-fraction", 0]  # fmt: skip
        command = [sys.executable, "-c", MEASURE, ROOT / "tools" / "prepare_corpus.py", *arguments]
        result = subprocess.run(
            [*map(str, command)], text=True, capture_output=True, check=True, env=os.environ | eager
        )
        peaks.append(int(result.stdout.split("peak_kib")[1]))
    assert peaks[1] - peaks[0] < 2 * 1024, f"peak memory grew from {peaks[0]} to {peaks[1]} KiB"


# -- the vocabulary ----------------------------------------------------------------------------------------


def test_train_tokenizer_makes_what_prepare_corpus_reads(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / "in" / f"{number}.py").write_text(
            TEXT * 5 + f"def function_{number}(): return {number}\n" * 3
        )
    arguments = [
        "--input",
        tmp_path / "in",
        "--suffix",
        ".py",
        "--vocab-size",
        280,
        "--output",
        tmp_path / "tok",
    ]
    assert tool("train_tokenizer", *arguments).returncode == 0
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert (tokenizer.vocabulary_size, tokenizer.end_of_text) == (280, 279)
    result = tool("train_tokenizer", *arguments)
    assert result.returncode == 2 and "--overwrite" in result.stderr
    assert tool("train_tokenizer", *arguments, "--overwrite").returncode == 0
    assert Tokenizer.load(tmp_path / "tok").sha256 == tokenizer.sha256, "training is not deterministic"
    report = prepare_corpus(
        [str(tmp_path / "in")],
        tokenizer,
        tmp_path / "out",
        PrepareOptions(read=ReadOptions(suffixes=(".py",))),
    )
    assert report.written == 5


def test_train_tokenizer_refuses_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    for size, message in ((100, "too small"), (50257, "ask for at most")):
        result = tool(
            "train_tokenizer", "--input", tmp_path / "a.txt", "--vocab-size", size, "--output", tmp_path / "t"
        )
        assert result.returncode == 2 and message in result.stderr
        assert not (tmp_path / "t").exists()


def test_max_bytes_bounds_what_is_read(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(TEXT * 200)
    result = tool("train_tokenizer", "--input", tmp_path, "--vocab-size", 270, "--output", tmp_path / "t",
                  "--max-bytes", 2 * len(TEXT) * 200, check=True)  # fmt: skip
    assert "from 0.0 MB" in result.stdout

"""The tokenizer: GPT-2's ids exactly, any bytes there and back, the same ids in transformers."""

import csv
import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.data.tokenizer import END_OF_TEXT, Tokenizer, last_safe_cut, parts_of

TEXT = (
    "the cat sat on the mat, and the dog sat on the log; it's 1234 o'clock.\n  The end!\n"
    "Every document of a corpus is tokenized once, shuffled by a seed and divided in two parts.\n"
) * 40
# Runs of white space must have merges of their own, or a cut inside one could not be told from a right one.
_SMALL = Tokenizer.train([TEXT, " \n  \n\n   \n\r\n    a" * 500], 320)


def data_folder(name: str) -> Path:
    """$MEGAGPT2_DATA/name, or skip."""
    root = os.environ.get("MEGAGPT2_DATA")
    if not root:
        pytest.skip("MEGAGPT2_DATA is not set: this test needs the public data files")
    if not (Path(root) / name).is_dir():
        pytest.skip(f"{root} has no {name}")
    return Path(root) / name


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.load(data_folder("gpt2-tokenizer"))


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return _SMALL


def test_gpt2_vectors_are_exact(gpt2):
    path = data_folder("tokenizer-vectors") / "jtokkit.r50k_base_encodings.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 423
    for row in rows:
        ids = json.loads(row["output"])
        assert gpt2.encode(row["input"]) == ids
        assert gpt2.decode(ids) == row["input"]
        assert gpt2.encode_bytes(row["input"].encode()) == ids


def test_gpt2_constants(gpt2):
    assert (gpt2.vocabulary_size, gpt2.end_of_text) == (50257, 50256)


def test_long_text_is_encoded_in_parts_as_it_would_be_whole(gpt2):
    text = (data_folder("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    ids = gpt2.encode(text)
    assert len(ids) == 338025
    assert gpt2._encode_parts([text])[0] == ids, "parts changed the ids"
    assert gpt2.decode(ids) == text


def test_transformers_gives_the_same_ids(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2.save(tmp_path / "gpt2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    for text in [TEXT, "Привет, 世界! \u00a0\u2003 x\r\n\t\ty  🙂", "  leading", "", "don't  STOP'LL"]:
        assert theirs(text)["input_ids"] == gpt2.encode(text)
        assert theirs.decode(gpt2.encode(text)) == text
    assert theirs.eos_token_id == gpt2.end_of_text
    assert len(theirs) == gpt2.vocabulary_size


@pytest.mark.parametrize(
    "keep", [("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
)
def test_every_layout_loads_to_the_same_tokenizer(small, tmp_path, keep):
    small.save(tmp_path)
    (tmp_path / "encoder.json").write_bytes((tmp_path / "vocab.json").read_bytes())
    (tmp_path / "vocab.bpe").write_bytes((tmp_path / "merges.txt").read_bytes())
    for path in tmp_path.iterdir():
        if path.name not in keep:
            path.unlink()
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == small.sha256
    assert again.encode(TEXT) == small.encode(TEXT)


def test_save_leaves_no_temporary_files(small, tmp_path):
    small.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


def test_training_puts_bytes_first_and_end_of_text_last(small):
    assert small.vocabulary_size == 320
    assert small.end_of_text == 319
    assert sorted(small.decode_bytes([i]) for i in range(256)) == [bytes([b]) for b in range(256)]
    assert len(small.encode(TEXT)) < 0.6 * len(TEXT), "merges do nothing"


def test_training_depends_on_words_not_on_their_order(small):
    lines = TEXT.splitlines(keepends=True)
    assert Tokenizer.train(reversed(lines), 300).sha256 == Tokenizer.train(lines, 300).sha256


def test_training_refuses_sizes_that_the_text_cannot_fill():
    with pytest.raises(ValueError, match="vocabulary_size 256 is too small"):
        Tokenizer.train([TEXT], 256)
    with pytest.raises(ValueError, match="ask for at most 257"):
        Tokenizer.train(["a"], 5000)


def test_end_of_text_in_a_text_is_text(small):
    text = f"one{END_OF_TEXT}two"
    assert small.end_of_text not in small.encode(text)
    assert small.end_of_text not in small.encode_batch([text])[0]
    assert small.encode(text, allow_special=True) == [
        *small.encode("one"),
        small.end_of_text,
        *small.encode("two"),
    ]
    for special in (False, True):
        assert small.decode(small.encode(text, allow_special=special)) == text


@given(st.binary(max_size=300))
def test_any_bytes_come_back(data):
    tokenizer = _SMALL
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert all(0 <= i < tokenizer.vocabulary_size - 1 for i in ids)


@given(st.lists(st.text(max_size=60), max_size=5))
def test_batch_is_one_by_one(texts):
    assert _SMALL.encode_batch(texts) == [_SMALL.encode(text) for text in texts]


SPACES = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "'s", "é", "7", "。", "a", "b!"]
)


@settings(max_examples=300)
@given(st.lists(SPACES, max_size=30).map("".join), st.integers(1, 12))
def test_cutting_a_text_changes_no_token(text, size):
    parts = parts_of(text, size)
    assert "".join(parts) == text
    assert [i for part in parts for i in _SMALL._encode_parts([part])[0]] == _SMALL._encode_parts([text])[0]
    cut = last_safe_cut(text)
    assert _SMALL.encode(text[:cut]) + _SMALL.encode(text[cut:]) == _SMALL.encode(text)


def test_lone_surrogates_and_foreign_ids_are_named(small):
    with pytest.raises(ValueError, match="lone surrogate"):
        small.encode("a\ud800b")
    with pytest.raises(ValueError, match="id 320 is outside the vocabulary 0 .. 319"):
        small.decode([1, 320])


def test_pickling_keeps_everything(small):
    again = pickle.loads(pickle.dumps(small))
    assert (again.sha256, again.encode(TEXT)) == (small.sha256, small.encode(TEXT))


def _break(path: Path, **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: [p.unlink() for p in d.iterdir()], "found none of tokenizer.json"),
        (lambda d: (d / "merges.txt").unlink(), "merges.txt is missing"),
        (lambda d: (d / "vocab.json").unlink(), "vocab.json is missing"),
        (lambda d: (d / "vocab.json").write_text('{"a": 0'), "not valid JSON"),
        (lambda d: (d / "vocab.json").write_text('{"a": 0}'), "no <|endoftext|>"),
        (lambda d: _break(d / "vocab.json", extra=900), "without gaps"),
        (lambda d: (d / "merges.txt").write_text("#version: 0.2\nt h e\n"), "line 2: expected two tokens"),
        (lambda d: (d / "merges.txt").write_text("#version: 0.2\nz z\n"), "do not belong together"),
    ],
)
def test_damaged_folders_are_refused_with_a_reason(small, tmp_path, damage, message):
    small.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    damage(tmp_path)
    with pytest.raises(ValueError, match=message.replace("|", r"\|").replace("<", "[<]")):
        Tokenizer.load(tmp_path)


def test_other_kinds_of_tokenizers_are_refused(small, tmp_path):
    small.save(tmp_path)
    _break(tmp_path / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(ValueError, match="not GPT-2's tokenization"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")

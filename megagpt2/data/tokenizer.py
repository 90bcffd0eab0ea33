"""GPT-2's tokenizer: byte-level BPE, exact to the byte.

Text is cut into words by GPT-2's pattern, each word's UTF-8 bytes become 256 printable characters
(`BYTE_OF` inverts that table), and learned merges join them. Every byte has a token, so nothing is
ever unknown and `decode_bytes(encode_bytes(b)) == b` for any bytes at all. The `tokenizers` library does the
merging; this file adds what it has not: GPT-2's original files, raw bytes, flat memory on long texts, and an
`<|endoftext|>` that text cannot forge.

Reference: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from megagpt2.data.files import atomic_write, sync_directory

END_OF_TEXT = "<|endoftext|>"
# Longer texts are encoded in parts of about this many characters, because the library's bookkeeping
# (offsets, word list) takes some fifty times the text's own memory.
PART_CHARACTERS = 1 << 17
# The pairs of files that hold a vocabulary and its merges, first match wins.
FILE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

_INVALID_BYTES = re.compile("[\udc80-\udcff]+")  # what Python's "surrogateescape" makes of invalid UTF-8


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other 68 bytes for U+0100 upwards, in order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + place): byte for place, byte in enumerate(rest)})
    return table


BYTE_OF = _byte_characters()


def last_safe_cut(text: str, end: int | None = None, look_back: int = 1 << 16) -> int:
    """The last place <= `end` where `text` can be cut without changing its tokens, or 0 if none is near.

    Such a place has a space or newline after it and something other than white space before it. GPT-2's
    pattern never puts the two into one word, and its look-ahead `\\s+(?!\\S)` concerns only a run of white
    space, which such a cut leaves whole. So encode(a) + encode(b) == encode(a + b) there.
    """
    end = len(text) - 1 if end is None else min(end, len(text) - 1)
    for place in range(end, max(0, end - look_back), -1):
        if text[place] in " \n" and not text[place - 1].isspace():
            return place
    return 0


def parts_of(text: str, size: int = PART_CHARACTERS) -> list[str]:
    """`text` in parts of at most about `size` characters whose encodings concatenate to the text's own."""
    parts, start = [], 0
    while len(text) - start > size:
        window = text[start : start + size]
        cut = last_safe_cut(window)
        if cut == 0:  # no space in the whole window: take the next one there is
            match = re.compile(r"(?<=\S)[ \n]").search(text, start + size)
            cut = match.start() - start if match else len(text) - start
        parts.append(text[start : start + cut])
        start += cut
    parts.append(text[start:])
    return parts


class Tokenizer:
    """Text <-> token ids. Immutable; pickles by value, so worker processes can be given one.

    Attributes:
        vocabulary_size: number of ids, 50257 for GPT-2; ids are 0 .. vocabulary_size - 1.
        end_of_text: id of `<|endoftext|>`, which ends every document of a corpus.
        sha256: of the canonical vocabulary and merges: equal hash = equal ids for any text.
    """

    def __init__(
        self, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], origin: str = "tokenizer"
    ) -> None:
        """Build from a vocabulary (token in GPT-2's byte characters -> id) and merges, best first.

        Raises ValueError, naming `origin`, when ids have gaps, a byte or `<|endoftext|>` has no token, or a
        merge's parts or result are not in the vocabulary.
        """
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError(
                f"{origin}: ids must be 0 .. {len(tokens) - 1} without gaps or repeats; the file is damaged"
            )
        if END_OF_TEXT not in vocabulary:
            raise ValueError(
                f"{origin}: no {END_OF_TEXT} in the vocabulary; megagpt2 needs GPT-2's document separator"
            )
        lost = [byte for character, byte in BYTE_OF.items() if character not in vocabulary]
        if lost:
            raise ValueError(
                f"{origin}: bytes {lost[:8]} have no token; this is not a byte-level GPT-2 vocabulary"
            )
        self._vocabulary, self._merges, self._origin = (
            dict(vocabulary),
            [tuple(pair) for pair in merges],
            origin,
        )
        self._bytes = [_bytes_of_token(token) for token in tokens]
        self._byte_ids = [0] * 256
        for character, byte in BYTE_OF.items():
            self._byte_ids[byte] = vocabulary[character]
        try:
            # No special tokens in here: "<|endoftext|>" in a text is text. encode(allow_special) cuts it
            # out first.
            self._backend = _backend(self._vocabulary, self._merges)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{origin}: merges and vocabulary do not belong together: {error}") from error
        self.vocabulary_size = len(tokens)
        self.end_of_text = vocabulary[END_OF_TEXT]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._vocabulary, self._merges, self._origin)

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self._origin!r}, vocabulary_size={self.vocabulary_size}, sha256={self.sha256[:12]})"
        )

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of [tokens by id, merges] as compact ASCII JSON."""
        tokens = sorted(self._vocabulary, key=self._vocabulary.__getitem__)
        canonical = json.dumps([tokens, [" ".join(pair) for pair in self._merges]], separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    # -- reading, learning, writing ----------------------------------------------------------------

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, or `vocab.json` + `merges.txt`, or OpenAI's `encoder.json` + `vocab.bpe`.

        Raises ValueError naming what is missing or damaged.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ValueError(f"tokenizer directory {directory} does not exist or is not a directory")
        if (directory / "tokenizer.json").is_file():
            return cls._from_tokenizer_json(directory / "tokenizer.json")
        for vocabulary_name, merges_name in FILE_PAIRS:
            present = [name for name in (vocabulary_name, merges_name) if (directory / name).is_file()]
            if len(present) == 2:
                vocabulary = _read_json(directory / vocabulary_name)
                if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
                    raise ValueError(
                        f"{directory / vocabulary_name}: expected one JSON object of token -> id"
                    )
                return cls(vocabulary, _read_merges(directory / merges_name), str(directory))
            if present:
                missing = merges_name if present == [vocabulary_name] else vocabulary_name
                raise ValueError(f"tokenizer {directory}: {present[0]} is there but {missing} is missing")
        pairs = ", or ".join(" + ".join(pair) for pair in FILE_PAIRS)
        raise ValueError(f"tokenizer {directory}: found none of tokenizer.json, or {pairs}")

    @classmethod
    def _from_tokenizer_json(cls, path: Path) -> Tokenizer:
        content = _read_json(path)
        try:
            model, cutter, normalizer = content["model"], content["pre_tokenizer"], content["normalizer"]
            merges = [
                tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]
            ]
            vocabulary = dict(model["vocab"])
            # Tokens that text never makes (<|endoftext|>, <|pad|>) may stand here only.
            vocabulary.update({token["content"]: token["id"] for token in content.get("added_tokens") or []})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a tokenizer file of the BPE kind ({type(error).__name__}: {error})"
            ) from error
        plain = (
            isinstance(cutter, dict) and cutter.get("type") == "ByteLevel" and cutter.get("use_regex", True)
        )
        if not plain or cutter.get("add_prefix_space") or normalizer is not None:
            raise ValueError(
                f"{path}: not GPT-2's tokenization (wanted no normalizer and pre_tokenizer ByteLevel without "
                f"add_prefix_space, found normalizer {normalizer!r}, pre_tokenizer {cutter!r})"
            )
        return cls(vocabulary, merges, str(path.parent))

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int, show_progress: bool = False) -> Tokenizer:
        """Learn merges from `texts`: ids 0-255 are the bytes, then merges, `<|endoftext|>` last.

        Depends on the words' counts only, not on the order of texts. Raises ValueError when the text has
        fewer repeated pairs than the vocabulary asks for, or vocabulary_size < 257.
        """
        if vocabulary_size < 257:
            raise ValueError(
                f"vocabulary_size {vocabulary_size} is too small: 256 bytes + {END_OF_TEXT} need 257"
            )
        backend = _backend({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size - 1,
            min_frequency=2,
            show_progress=show_progress,
            special_tokens=[],
            initial_alphabet=sorted(BYTE_OF),
        )
        backend.train_from_iterator((part for text in texts for part in parts_of(text)), trainer)
        model = json.loads(backend.to_str())["model"]
        vocabulary = dict(model["vocab"])
        if len(vocabulary) != vocabulary_size - 1:
            raise ValueError(
                f"vocabulary_size {vocabulary_size}: the text has only enough repeated pairs for "
                f"{len(vocabulary) + 1}; give more text or ask for at most {len(vocabulary) + 1}"
            )
        vocabulary[END_OF_TEXT] = len(vocabulary)
        merges = [
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]
        ]
        return cls(vocabulary, merges, "trained")

    def save(self, directory: str | Path, model_max_length: int = 1024) -> None:
        """Write the Hugging Face GPT-2 layout, each file atomically; transformers' AutoTokenizer opens it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
        configuration = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "add_bos_token": False,
            "errors": "replace",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
            **special,
        }
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in self._merges)]) + "\n"
        backend = _backend(self._vocabulary, self._merges)
        backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
        # tokenizer.json, which load() and transformers prefer, comes last: the others are whole by then.
        contents = {
            "vocab.json": json.dumps(self._vocabulary, ensure_ascii=False),
            "merges.txt": merges,
            "special_tokens_map.json": json.dumps(special, indent=2),
            "tokenizer_config.json": json.dumps(configuration, indent=2),
            "tokenizer.json": backend.to_str(),
        }
        for name, content in contents.items():
            with atomic_write(directory / name) as file:
                file.write(content)
        sync_directory(directory)

    # -- text -> ids -------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. `<|endoftext|>` in it is plain text unless `allow_special`.

        Raises ValueError for a lone surrogate, which has no UTF-8 bytes.
        """
        if allow_special and END_OF_TEXT in text:
            pieces = [self.encode(piece) for piece in text.split(END_OF_TEXT)]
            ids = pieces[0]
            for piece in pieces[1:]:
                ids.append(self.end_of_text)
                ids.extend(piece)
            return ids
        if len(text) <= PART_CHARACTERS:
            return self._encode_parts([text])[0]
        ids = []
        for part in parts_of(text):
            ids.extend(self._encode_parts([part])[0])
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on all cores unless TOKENIZERS_PARALLELISM=false."""
        parts = [parts_of(text) for text in texts]
        encoded = iter(self._encode_parts([part for of_text in parts for part in of_text]))
        return [[i for _ in of_text for i in next(encoded)] for of_text in parts]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: valid UTF-8 as its text, every other byte as that byte's own token."""
        text = data.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        start = 0
        for match in _INVALID_BYTES.finditer(text):
            ids.extend(self.encode(text[start : match.start()]))
            ids.extend(self._byte_ids[ord(character) - 0xDC00] for character in match.group())
            start = match.end()
        ids.extend(self.encode(text[start:]))
        return ids

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        try:
            encodings = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(
                f"text cannot be encoded: {error}; a lone surrogate (U+D800-DFFF) is not valid text, "
                "use encode_bytes for raw bytes"
            ) from error
        return [encoding.ids for encoding in encodings]

    # -- ids -> text -------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`. Raises ValueError for an id outside the vocabulary."""
        table, size = self._bytes, self.vocabulary_size
        ids = [int(i) for i in ids]
        bad = next((i for i in ids if not 0 <= i < size), None)
        if bad is not None:
            raise ValueError(
                f"id {bad} is outside the vocabulary 0 .. {size - 1}; was it made by another tokenizer?"
            )
        return b"".join([table[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 (a sample may stop inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def _backend(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> BackendTokenizer:
    backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=merges, cache_capacity=1 << 16))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _bytes_of_token(token: str) -> bytes:
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode("utf-8")  # an added token, written as itself


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise ValueError(
            f"{path}: not valid JSON ({error}); the file is damaged or incomplete, fetch it again"
        ) from error


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    # Not splitlines(): byte characters include U+0085's neighbours, and only \n separates merges.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(pair):
            raise ValueError(
                f"{path}, line {number}: expected two tokens separated by a space, found {line!r}"
            )
        merges.append(pair)
    return merges

"""What a run reads and where it writes, checked before any process group exists."""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megagpt2.checkpoint.disk import make_folder
from megagpt2.config import Config, ConfigError
from megagpt2.config.rules import Plan
from megagpt2.data.indexed import IndexedCorpus
from megagpt2.data.order import Order
from megagpt2.data.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_SAMPLED = 64  # places at which a corpus without manifest is looked at
_STRETCH = 1 << 14  # tokens at each


@dataclass(frozen=True)
class Material:
    """What a run reads: corpora, and the tokenizer if there is one."""

    train: IndexedCorpus
    valid: IndexedCorpus | None
    tokenizer: Tokenizer | None
    tokenizer_texts: dict[str, str] = field(default_factory=dict)  # its files, which go into every checkpoint

    def identity(self, config: Config) -> dict[str, int | str | None]:
        """What decides which text sample number n is: a resumed run must have the same."""
        return {
            "seed": config.training.seed, "sequence_length": config.sequence_length,
            "corpus_tokens": len(self.train.tokens), "corpus_sha256": (self.train.manifest or {}).get("sha256"),
        }


def open_corpus(prefix: Path, field: str, config: Config) -> IndexedCorpus:
    """A corpus that fits the model, or a ConfigError."""
    try:
        corpus = IndexedCorpus(prefix)
        Order(len(corpus.tokens), config.sequence_length, config.training.seed)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{field}: {error}") from None
    words = (corpus.manifest or {}).get("vocabulary_size", 0)
    if words > config.model.vocabulary:
        raise ConfigError(
            f"{field}: {prefix} was tokenized with a vocabulary of {words}, model.vocabulary is"
            f" {config.model.vocabulary}: set model.vocabulary to {words}"
        )
    if not words:  # another program's files
        refuse_foreign_ids(corpus, field, config.model.vocabulary)
    return corpus


def refuse_foreign_ids(corpus: IndexedCorpus, field: str, vocabulary: int) -> None:
    """Look at some of a corpus whose vocabulary nobody wrote down. (Every batch is looked at again when it is read.)"""
    places = np.linspace(0, max(0, len(corpus.tokens) - _STRETCH), _SAMPLED).astype(np.int64)
    largest = max(int(corpus.tokens[place : place + _STRETCH].max()) for place in np.unique(places))
    if largest >= vocabulary:
        raise ConfigError(
            f"{field}: {corpus.prefix} holds token {largest}, model.vocabulary is {vocabulary}: set it to the size of"
            " the vocabulary that the corpus was tokenized with"
        )


def open_tokenizer(config: Config, corpora: list[IndexedCorpus | None]) -> Tokenizer | None:
    """The tokenizer that fits the model and made the corpora, or a ConfigError."""
    if config.data.tokenizer is None:
        return None
    try:
        tokenizer = Tokenizer.load(config.data.tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.tokenizer: {error}") from None
    if tokenizer.vocabulary_size > config.model.vocabulary:
        raise ConfigError(
            f"data.tokenizer: {config.data.tokenizer} has {tokenizer.vocabulary_size} tokens, model.vocabulary is"
            f" {config.model.vocabulary}: set model.vocabulary to {tokenizer.vocabulary_size}"
        )
    for corpus in filter(None, corpora):
        made_with = (corpus.manifest or {}).get("tokenizer_sha256", tokenizer.sha256)
        if made_with != tokenizer.sha256:  # its samples, and those of every checkpoint, would be gibberish
            raise ConfigError(
                f"data.tokenizer: {config.data.tokenizer} (sha256 {tokenizer.sha256[:12]}) is not the tokenizer that"
                f" made {corpus.prefix} (sha256 {made_with[:12]}): name that one, or prepare the corpus again"
            )
    return tokenizer


def open_material(config: Config, plan: Plan) -> Material:
    """Everything that the configuration names, checked before any process group exists."""
    if config.data.train is None:
        raise ConfigError("data.train is not set: give the PREFIX of a corpus that tools/prepare_corpus.py wrote")
    train = open_corpus(config.data.train, "data.train", config)
    valid = None
    if config.data.valid is not None and config.validation.every:
        valid = open_corpus(config.data.valid, "data.valid", config)
        windows = Order(len(valid.tokens), config.sequence_length, 0, shuffle=False).windows
        if windows < plan.micro_batch * plan.data:
            raise ConfigError(
                f"data.valid: {config.data.valid} has {windows} sequences of {config.sequence_length} tokens, fewer"
                f" than one micro-batch on each of {plan.data} data-parallel ranks ({plan.micro_batch * plan.data}):"
                " use a smaller batch.micro_batch, or validation.every=0"
            )
    tokenizer = open_tokenizer(config, [train, valid])
    texts = {}
    if tokenizer is not None:
        files = (config.data.tokenizer / name for name in TOKENIZER_FILES)
        texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    return Material(train, valid, tokenizer, texts)


def claim_directory(directory: Path) -> int:
    """Create the run's folders and lock them against a second run; the lock lives as long as this process.

    Returns the lock's file descriptor. Raises ConfigError if another process has it, or nothing can be written there.
    """
    try:
        make_folder(directory / "checkpoints")
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run.directory: {directory} can't be written: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"run.directory: another process is training in {directory}: stop it first, or name another folder"
        ) from None
    except OSError:
        pass  # a file system without locks: the run can go on without this protection
    return lock


def leave_directory(directory: Path) -> None:
    """Undo what `claim_directory` created, for a request that is refused after it. An earlier run's folder stays."""
    if {path.name for path in directory.iterdir()} <= {".lock", "checkpoints"}:
        with contextlib.suppress(OSError):  # there are checkpoints
            (directory / "checkpoints").rmdir()
            (directory / ".lock").unlink()
            directory.rmdir()


def check_directory(directory: Path) -> None:
    """Refuse a run.directory that can't be written, without writing: every rank sees the same."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        why = f"{there} is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        why = f"this user may not write in {there}"
    else:
        return
    raise ConfigError(f"run.directory: {directory} can't be written, {why}: name another folder")

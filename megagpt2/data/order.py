"""Which window of the corpus is sample number n: a pure function of (corpus size, sequence length, seed, n).

There is no index to build, no file to share and no state to save (DESIGN D4). Sample n lies in epoch
n // windows; within its epoch, a keyed permutation of [0, windows) decides which window it is, and the epoch's
own offset decides where the windows begin:

    tokens      |..|----window 0----|----window 1----| ... |----window W-1----|...|
                 ^ offset(epoch) in [0, sequence length), so that window borders move from epoch to epoch

The permutation is a Feistel network (Luby and Rackoff 1988) over the next even power of two, walked along its
cycles until it lands inside [0, W) (Black and Rogaway 2002): less than four walks on average, whatever W.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_ROUNDS = 6
_MASK = (1 << 64) - 1


def _hash64(*parts: int | str) -> int:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _mix(value: int, key: int) -> int:
    """A keyed 64-bit mixing function: SplitMix64's finalizer (Steele et al. 2014)."""
    value = (value + key) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A bijection of [0, size) chosen by a key; constant memory, a few microseconds per index."""

    def __init__(self, size: int, *key: int | str) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got size {size}")
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits in each half of the network
        self._keys = [_hash64(*key, round_) for round_ in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside [0, {self.size})")
        value = self._encrypt(index)
        while value >= self.size:  # cycle walking: the orbit of an index inside returns inside
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return left << self._half | right


@dataclass(frozen=True)
class Window:
    """Tokens start .. start + sequence_length of a corpus: one more than the inputs, for the targets."""

    epoch: int
    start: int


class Order:
    """The order of the windows of a corpus, without end: epoch after epoch."""

    def __init__(self, tokens: int, sequence_length: int, seed: int, shuffle: bool = True) -> None:
        """tokens: how many the corpus has. shuffle False: windows in place, the same each epoch (validation)."""
        # Every epoch has as many windows, whatever its offset: the largest offset must leave room for the last target.
        margin = sequence_length - 1 if shuffle else 0
        self.windows = (tokens - 1 - margin) // sequence_length
        if self.windows < 1 and shuffle:  # a corpus of hardly more than one window: no room to shift it
            margin, self.windows = 0, (tokens - 1) // sequence_length
        if self.windows < 1:
            raise ValueError(
                f"a corpus of {tokens} tokens has no window of sequence_length {sequence_length} + 1 tokens:"
                f" use a sequence_length of at most {max(tokens - 1, 0)}, or more text"
            )
        self.tokens, self.sequence_length, self.seed, self.shuffle = tokens, sequence_length, seed, shuffle
        self._margin = margin
        self._epoch, self._permutation = -1, Permutation(1)

    def offset(self, epoch: int) -> int:
        """Where the epoch's first window begins."""
        return _hash64(self.seed, "offset", epoch) % (self._margin + 1)

    def window(self, number: int) -> Window:
        """The window that is sample `number` (0, 1, 2, ...) of a run."""
        epoch, index = divmod(number, self.windows)
        if not self.shuffle:
            return Window(epoch, index * self.sequence_length)
        if epoch != self._epoch:  # keys are derived once per epoch
            self._epoch, self._permutation = epoch, Permutation(self.windows, self.seed, "order", epoch)
        return Window(epoch, self.offset(epoch) + self._permutation(index) * self.sequence_length)

"""From the order of samples to the micro-batches of one data-parallel rank.

    global batch at samples_seen n:   samples n, n + 1, ..., n + B - 1
    micro-batch m of replica r:       the micro_batch samples from n + (m * replicas + r) * micro_batch on

Which samples make a global batch thus depends on nothing but n and B: not on how many replicas share it, nor on
how they cut it (DESIGN D4, I6).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megagpt2.data.order import Order


class MicroBatch(NamedTuple):
    """tokens, targets int64 [micro_batch, sequence]: targets are tokens shifted by one; samples int64 [micro_batch]."""

    tokens: Tensor
    targets: Tensor
    samples: Tensor


class Batches:
    """Micro-batches of one replica from a flat array of tokens."""

    def __init__(
        self, tokens: np.ndarray, order: Order, micro_batch: int, replica: int, replicas: int, vocabulary: int
    ) -> None:
        """tokens: one-dimensional, e.g. the memory map of a .bin file; all must be below `vocabulary`."""
        self.tokens, self.order, self.vocabulary = tokens, order, vocabulary
        self.micro_batch, self.replica, self.replicas = micro_batch, replica, replicas

    def read(self, numbers: range) -> MicroBatch:
        """The samples with these numbers."""
        length = self.order.sequence_length
        rows = np.empty((len(numbers), length + 1), dtype=np.int64)
        for row, number in zip(rows, numbers, strict=True):
            start = self.order.window(number).start
            row[:] = self.tokens[start : start + length + 1]
        if rows.max() >= self.vocabulary:
            # The embedding has rows beyond the last word, for alignment: a wrong id would be a loss, not an error.
            raise ValueError(
                f"samples {numbers.start} to {numbers.stop - 1} hold token {rows.max()}, the vocabulary has"
                f" {self.vocabulary}: the corpus was made with another tokenizer"
            )
        whole = torch.from_numpy(rows)
        samples = torch.arange(numbers.start, numbers.stop)
        return MicroBatch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), samples)

    def global_batch(self, samples_seen: int, size: int) -> Iterator[MicroBatch]:
        """This replica's micro-batches of the `size` samples that follow the first `samples_seen`."""
        stride = self.micro_batch * self.replicas
        if size % stride:
            raise ValueError(
                f"a global batch of {size} samples can't be cut into micro-batches of {self.micro_batch} for"
                f" {self.replicas} data-parallel ranks: use a multiple of {stride}"
            )
        for begin in range(samples_seen + self.replica * self.micro_batch, samples_seen + size, stride):
            yield self.read(range(begin, begin + self.micro_batch))

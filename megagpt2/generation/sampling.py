"""Sampling: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NextLogits = Callable[[Tensor], Tensor]  # tokens int64 [batch, length] -> logits of the next token [batch, vocabulary]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 takes the likeliest; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} is not a number from 0 (greedy) on")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative: use 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]: 1 is off")


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from: [batch, vocabulary], fp32, rows sum to 1."""
    logits = logits.float()
    if sampling.temperature == 0:
        best = torch.zeros_like(logits)
        return best.scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        values, kept = logits.topk(sampling.top_k, dim=1)  # exactly k, also where bf16 logits are equal
        logits = torch.full_like(logits, float("-inf")).scatter_(1, kept, values)
    probabilities = logits.softmax(1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered  # mass of the likelier tokens: the first one always stays
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return probabilities


def generate(
    next_logits: NextLogits, tokens: Tensor, count: int, context: int, sampling: Sampling, seed: int,
    stop: int | None = None,
) -> Tensor:
    """Continue tokens int64 [batch, length] by up to `count`: [batch, length + generated].

    Past `context` tokens the oldest fall out of the model's view. Rows that drew `stop` stay there; when all have,
    generation ends. The same seed gives the same text, on every rank that sees the same logits.
    """
    generator = torch.Generator().manual_seed(seed)
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(count):
        probabilities = filtered_probabilities(next_logits(tokens[:, -context:]).cpu(), sampling)
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        if stop is not None:
            drawn = torch.where(ended, stop, drawn)
            ended |= drawn == stop
        tokens = torch.cat([tokens, drawn[:, None].to(tokens.device)], dim=1)
        if stop is not None and bool(ended.all()):
            break
    return tokens

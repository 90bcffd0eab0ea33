"""Counter-based random bits: a pure function of (key, sample, coordinate), so that no generator state exists.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3) turns a
counter of four 32-bit words and a key of two into four random words. We number the elements of a tensor
row by row; element e is lane e % 4 of the counter

    (low half of e // 4, high half of e // 4, low half of sample, high half of sample)

so any contiguous piece of any tensor can be drawn alone, on any rank, any number of times. csrc/philox draws
the same bits on the CPU, with vector instructions and several threads.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megagpt2.kernels.extension import EXTENSION

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 16  # counters at a time: the ten rounds then stay in a core's cache


def key_of(seed: int, *path: str | int) -> tuple[int, int]:
    """The two key words of a stream named by `seed` and a path, e.g. ("dropout", layer, "attention")."""
    digest = hashlib.sha256("\x1f".join(map(str, (seed, *path))).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * word. int64 wraps, and its wrapped bits are the right ones."""
    product = word * factor
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of random bits per counter. Words are int64 tensors holding values in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def random_bits_reference(key: tuple[int, int], samples: Tensor, start: int, count: int) -> Tensor:
    """`random_bits` in plain torch, on any device."""
    if not count:  # a rank may hold no row of a small vocabulary
        return torch.empty(len(samples), 0, dtype=torch.int64, device=samples.device)
    first, last = start // 4, (start + count + 3) // 4  # counters that cover the elements
    low, high = samples[:, None] & _LOW, (samples[:, None] >> 32) & _LOW  # [batch, 1]
    pieces = []
    for begin in range(first, last, _CHUNK):
        block = torch.arange(begin, min(begin + _CHUNK, last), device=samples.device)[None]  # [1, counters]
        words = philox((block & _LOW, block >> 32, low, high), key)
        pieces.append(torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1))  # [batch, 4 * counters]
    bits = torch.cat(pieces, dim=1) if len(pieces) != 1 else pieces[0]
    return bits[:, start - 4 * first : start - 4 * first + count]


def random_bits(key: tuple[int, int], samples: Tensor, start: int, count: int) -> Tensor:
    """32 random bits for elements start .. start + count - 1 of each sample.

    samples: int64 [batch]. Returns int64 [batch, count] with values in [0, 2**32), on samples' device.
    """
    if EXTENSION.serves(samples):
        return torch.ops.megagpt2.random_bits(*key, samples, start, count)
    return random_bits_reference(key, samples, start, count)


def random_normal(key: tuple[int, int], start: int, count: int) -> Tensor:
    """Standard normal numbers for elements start .. start + count - 1: float32 [count], on the CPU.

    Box and Muller's transform on lanes (0, 1) and (2, 3), in float64, so that the rounded result does not
    depend on which vector instructions a machine has.
    """
    first = start // 4
    cover = 4 * ((start + count + 3) // 4 - first)
    bits = random_bits(key, torch.zeros(1, dtype=torch.int64), 4 * first, cover)[0]
    uniform = (bits.double() + 0.5) * 2.0**-32  # in (0, 1), never 0: the logarithm is finite
    pair = uniform.view(-1, 2)
    radius = torch.sqrt(-2.0 * torch.log(pair[:, 0]))
    angle = 2.0 * math.pi * pair[:, 1]
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten()
    return normal[start - 4 * first : start - 4 * first + count].float()


def _fake(key0, key1, samples, start, count):
    return samples.new_empty((samples.shape[0], count))


if EXTENSION.compiled:  # bits have no gradient
    torch.library.register_fake("megagpt2::random_bits", _fake)

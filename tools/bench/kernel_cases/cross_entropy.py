"""The head with its cross-entropy, forward and backward, and the two passes over a chunk of logits that are ours.

The head's matrix products are torch's on both sides: its limit is their rate, three products for each token, word and
channel. Its memory is what a process holds at most beyond hidden, weight and their gradients.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from megagpt2.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics, head_cross_entropy
from megagpt2.kernels.extension import EXTENSION
from megagpt2.parallel.memory import memory_of_this_process
from tools.bench.kernel_cases import Case, backward, forward, library

ROOT = Path(__file__).resolve().parents[3]


def eager_head(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets)


def our_head(hidden, weight, targets):
    return head_cross_entropy(hidden, weight, targets, 0, len(weight))


def heads(device: str) -> dict:
    """"ours", "eager" and what else is there."""
    liger = library("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy", device)
    return {"ours": our_head, "eager": eager_head} | ({"liger": liger} if liger else {})


def leaves(tokens: int, words: int, width: int, dtype: torch.dtype, device: str):
    """hidden, weight and targets of a head."""
    hidden, weight = (torch.randn(n, width, device=device).to(dtype).requires_grad_() for n in (tokens, words))
    return hidden, weight, torch.randint(words, (tokens,), device=device)


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has instructions for it, as far as torch says."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public: a torch may lack them
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def cases(device: str, small: bool) -> Iterator[Case]:
    """GPT-2's vocabulary. The head in bf16 where there are instructions for its products: else they take minutes."""
    words = 512 if small else 50304
    tokens = 64 if small else 500
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        yield from _passes(tokens, words, name, dtype, device)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        on_cpu = (2048 if name == "fp32" else 8192, words, 768)  # seconds each
        shape = (64, words, 32) if small else on_cpu if device == "cpu" else (16384, words, 1600)
        if small or device == "cuda" or name == "fp32" or cpu_multiplies_bf16():
            yield _head(shape, name, dtype, device)


def _passes(tokens: int, words: int, name: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    logits = torch.randn(tokens, words, device=device).to(dtype)
    targets = torch.randint(words, (tokens,), device=device)
    moved = logits.numel() * logits.element_size()

    yield Case(
        f"cross_entropy_statistics {tokens}x{words} {name}", moved,
        lambda: cross_entropy_statistics(logits, targets, 0, words), forward(logits, targets),
        {"eager": partial(F.cross_entropy, reduction="none")},
    )
    maximum, total, _ = cross_entropy_statistics(logits, targets, 0, words)
    gradient = logits.clone()
    yield Case(
        f"cross_entropy_gradient_ {tokens}x{words} {name}", 2 * moved,
        lambda: cross_entropy_gradient_(gradient, targets, maximum, total, 0, words),
        backward([logits.clone().requires_grad_()], None), {"eager": lambda logits: F.cross_entropy(logits, targets)},
    )


def _head(shape: tuple[int, int, int], name: str, dtype: torch.dtype, device: str) -> Case:
    inputs = leaves(*shape, dtype, device)

    peers = heads(device)

    def timed(head):
        return lambda: torch.autograd.grad(head(*inputs), inputs[:2])

    def memory() -> dict[str, float]:
        return {which: _memory(which, shape, name, device) for which in heads(device)}

    return Case(
        f"cross_entropy forward+backward {'x'.join(map(str, shape))} {name}",
        2 * sum(x.numel() * x.element_size() for x in inputs[:2]),
        timed(peers.pop("ours")), timed, peers, operations=6 * math.prod(shape), memory=memory,
    )


@cache
def _memory(which: str, shape: tuple[int, int, int], name: str, device: str) -> float:
    """Bytes that a head holds at most beyond its inputs and gradients, in a process of its own."""
    end = subprocess.run(
        [sys.executable, "-m", __name__, which, *map(str, shape), name, device], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )
    return float(end.stdout)


def main() -> None:
    """WHICH TOKENS WORDS WIDTH TYPE DEVICE: print what _memory asks for."""
    which, tokens, words, width, name, device = sys.argv[1:]
    if which == "ours" and (problem := EXTENSION.problem(device)):
        sys.exit(f"cross_entropy: {problem}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    warm, inputs = (leaves(n, w, int(width), dtype, device) for n, w in ((256, 256), (int(tokens), int(words))))
    head = heads(device)[which]
    torch.autograd.grad(head(*warm), warm[:2])  # what torch loads and keeps
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = memory_of_this_process("VmRSS"), partial(memory_of_this_process, "VmHWM")
        if not before:
            sys.exit("cross_entropy: this system doesn't say how much memory a process has")
    gradients = torch.autograd.grad(head(*inputs), inputs[:2])
    returned = sum(g.numel() * g.element_size() for g in gradients)
    print(max(peak() - before - returned, 4096))  # what is below a page isn't seen


if __name__ == "__main__":
    main()

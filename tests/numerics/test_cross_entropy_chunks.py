"""The two passes over a chunk of logits: as exact as torch's at every shape, every element written, the same bits every
time; and what the head holds in memory (invariant I8)."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagpt2.kernels.cross_entropy import (
    cross_entropy_gradient_,
    cross_entropy_gradient_reference_,
    cross_entropy_statistics,
    cross_entropy_statistics_reference,
    head_cross_entropy,
)
from tests.support.kernels import TYPES, assert_as_exact, compiled, devices, poisoned


@st.composite
def chunks(draw):
    """Logits of any size with padding full of rubbish, targets of this shard and of others, where the shard begins."""
    words = draw(st.one_of(st.integers(1, 70), st.sampled_from([1000, 2047, 2048, 2049, 4100, 6301])))
    rows, padding, first = draw(st.integers(0, 5)), draw(st.integers(0, 40)), draw(st.sampled_from([0, 7, 50_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    logits = torch.randn(rows, words + padding, generator=generator, dtype=torch.float64)
    logits = logits * draw(st.sampled_from([0.01, 1.0, 8.0])) + draw(st.sampled_from([0.0, 20.0]))
    rubbish = draw(st.sampled_from([torch.nan, torch.inf, 1e4]))
    logits[:, words:] = rubbish
    if draw(st.booleans()):  # the words' own bounds: large jumps, which the running maximum has to follow
        logits[:, :words] = logits[:, :words].sort(dim=1).values
    logits = logits.to(draw(st.sampled_from(TYPES)))
    targets = first + torch.randint(words, (rows,), generator=generator)
    return logits, targets, first, words


def losses_of(statistics: Tensor) -> Tensor:
    peak, total, target = statistics
    return total.log() - (target - peak)


@compiled
@devices
@given(chunks(), st.booleans(), st.sampled_from([1.0, 1024.0]))
@settings(max_examples=120, deadline=None)
def test_losses_and_gradients_are_as_exact_as_torchs(device, chunk, strided, factor):
    logits, targets, first, words = chunk
    logits, targets = logits.to(device), targets.to(device)
    given_logits = torch.stack([logits, logits], dim=-1)[..., 0] if strided else logits
    with poisoned():
        statistics = cross_entropy_statistics(given_logits, targets, first, words)
    local = targets - first
    real = logits[:, :words]
    exact = F.cross_entropy(real.double(), local, reduction="none")
    torchs = F.cross_entropy(real.float(), local, reduction="none")
    size = real.double().abs().max().item() if real.numel() else 0.0
    assert_as_exact(losses_of(statistics), exact, torchs, "loss", scale=size)
    assert torch.equal(statistics[0], real.float().amax(1)) and torch.equal(
        statistics[2], real.float().gather(1, local[:, None])[:, 0]
    )
    onehot = F.one_hot(local, words)
    found = logits.clone()
    cross_entropy_gradient_(found, targets, statistics[0], statistics[1], first, words, factor)
    assert (found[:, words:] == 0).all()
    expected = factor * (real.double().softmax(1) - onehot)
    torchs = (factor * (real.float().softmax(1) - onehot)).to(logits.dtype)
    assert_as_exact(found[:, :words], expected, torchs, "gradient")


@devices
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shift", [-2000, 2000])
def test_another_ranks_targets_are_left_alone(device, dtype, shift):
    """Their logit is 0 here, and nothing is subtracted: the row sums to 1, each term off by a few units in its last
    place."""
    logits = torch.randn(3, 1000, device=device).to(dtype)
    targets = torch.tensor([5, 0, 999], device=device) + shift
    peak, total, target = cross_entropy_statistics(logits, targets, 0, 1000)
    assert (target == 0).all()
    cross_entropy_gradient_(logits, targets, peak, total, 0, 1000)
    assert (logits >= 0).all() and ((logits.double().sum(1) - 1).abs() < 4 * torch.finfo(dtype).eps).all()


@devices
@pytest.mark.parametrize("operator", [cross_entropy_statistics, cross_entropy_statistics_reference])
def test_infinities_and_nans(device, operator):
    """-inf is a word of probability 0, in the first piece of 2048 too; an all -inf shard counts nothing; NaN shows."""
    infinity = float("inf")
    logits = torch.zeros(4, 5000, device=device)
    logits[0, :3000] = -infinity
    logits[1] = -infinity
    logits[2, 4000] = torch.nan
    logits[3, 17] = infinity
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    peak, total, _ = operator(logits, targets, 0, 5000).cpu()
    assert peak[0] == 0 and total[0] == 2000
    assert peak[1] == -infinity and total[1] == 0
    assert total[2].isnan() and total[3].isnan()
    empty = operator(logits, targets, 0, 0).cpu()
    assert (empty[0] == -infinity).all() and (empty[1:] == 0).all()


@devices
@pytest.mark.parametrize("operator", [cross_entropy_gradient_, cross_entropy_gradient_reference_])
def test_a_factor_of_two_to_the_tenth_is_exact(device, operator):
    """In fp32 it changes exponents alone. In fp16 it keeps the digits of a probability of 1e-7: without, one bit."""
    logits, targets = torch.randn(3, 1000, device=device), torch.tensor([5, 0, 999], device=device)
    peak, total, _ = cross_entropy_statistics(logits, targets, 0, 1000)
    once, scaled = logits.clone(), logits.clone()
    operator(once, targets, peak, total, 0, 1000)
    operator(scaled, targets, peak, total, 0, 1000, 1024.0)
    assert torch.equal(scaled, 1024 * once)
    rare = torch.tensor([[16.0, 0.0]], device=device).half()  # e**-16 = 1.125e-7
    ones = torch.ones(1, device=device)
    operator(rare, targets[1:2], 16 * ones, ones, 0, 2, 1024.0)
    assert abs(rare[0, 1].item() / (1024 * math.exp(-16)) - 1) < 2**-11


@compiled
@given(chunks())
@settings(max_examples=40)
def test_the_references_compute_the_same(chunk):
    """Up to the order of additions and two roundings of the exponential: 4 units in the last place of the largest."""
    logits, targets, first, words = chunk
    found = cross_entropy_statistics(logits, targets, first, words)
    expected = cross_entropy_statistics_reference(logits, targets, first, words)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    gradients = logits.clone(), logits.clone()
    cross_entropy_gradient_(gradients[0], targets, found[0], found[1], first, words)
    cross_entropy_gradient_reference_(gradients[1], targets, found[0], found[1], first, words)
    torch.testing.assert_close(*gradients, rtol=2 * torch.finfo(logits.dtype).eps, atol=1e-6)


@compiled
def test_the_number_of_threads_decides_nothing():
    logits, targets = torch.randn(37, 9000), torch.randint(8900, (37,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            statistics, gradient = cross_entropy_statistics(logits, targets, 0, 8900), logits.clone()
            cross_entropy_gradient_(gradient, targets, statistics[0], statistics[1], 0, 8900)
            results.append((statistics, gradient))
    finally:
        torch.set_num_threads(before)
    for statistics, gradient in results:
        assert torch.equal(statistics, results[0][0]) and torch.equal(gradient, results[0][1])


@compiled
def test_opcheck():
    logits, targets, ones = torch.randn(3, 8).bfloat16(), torch.tensor([1, 5, 9]), torch.ones(3)
    torch.library.opcheck(torch.ops.megagpt2.cross_entropy_statistics.default, (logits, targets, 0, 7))
    torch.library.opcheck(torch.ops.megagpt2.cross_entropy_gradient_.default, (logits, targets, ones, ones, 0, 7, 8.0))


@compiled
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"logits": torch.zeros(3)}, "tokens, rows of the vocabulary"),
        ({"logits": torch.zeros(3, 8, dtype=torch.int64)}, "float32, bfloat16 and float16"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "one for each of the 3 rows"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "int64"),
        ({"words": 9}, "columns of logits"),
        ({"words": -1}, "columns of logits"),
        ({"maximum": torch.zeros(2)}, "one for each of the 3 rows"),
        ({"normalizer": torch.zeros(3).double()}, "float32"),
        ({"logits": torch.zeros(8, 3).T}, "contiguous"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes, complaint):
    arguments = {
        "logits": torch.zeros(3, 8), "targets": torch.zeros(3, dtype=torch.int64), "maximum": torch.zeros(3),
        "normalizer": torch.ones(3), "first": 0, "words": 8,
    }
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.megagpt2.cross_entropy_gradient_(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"hidden is \[3, 5\]"),
        ({"hidden": torch.zeros(3, 4).bfloat16()}, "of one type"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"give int64 \[3\]"),
        ({"targets": torch.zeros(3)}, r"give int64 \[3\]"),
        ({"rows": 9}, "rows is 9"),
        ({"weight": torch.zeros(0, 4), "rows": 0}, r"weight is \[0, 4\]: give at least one row"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(changes, complaint):
    arguments = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(8, 4), "targets": torch.zeros(3, dtype=torch.int64),
        "first": 0, "rows": 8,
    }
    with pytest.raises(ValueError, match=complaint):
        head_cross_entropy(**(arguments | changes))


def head(dtype: torch.dtype):
    """Leaves of a small head and its targets."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype).requires_grad_() for n in (20, 128))
    return hidden, weight, torch.randint(101, (20,), generator=generator)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_there_is_one_backward_pass(dtype):
    """The gradients are scaled in place: going backward again raises, it gives no wrong numbers. Also where hooks keep
    the saved tensors, which autograd then no longer watches."""
    hidden, weight, targets = head(dtype)
    for hooks in (contextlib.nullcontext(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)):
        with hooks:
            loss = head_cross_entropy(hidden, weight, targets, 0, 101)
        loss.backward(retain_graph=True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="second backward pass"):
                loss.backward()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_autograd_sees_what_is_overwritten(dtype):
    """A backward pass that saved the logits raises; so does asking for a gradient that the operator doesn't have."""
    targets, ones = torch.tensor([1, 2, 3]), torch.ones(3)
    x = torch.randn(3, 8).to(dtype).requires_grad_()
    y = x.exp()  # which its backward pass needs
    cross_entropy_gradient_(y.detach(), targets, ones, ones, 0, 8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    before = x.detach().clone()
    with pytest.raises(ValueError, match="logits requires a gradient"):
        cross_entropy_gradient_(x, targets, ones, ones, 0, 8)
    with pytest.raises(ValueError, match="normalizer requires a gradient"):
        cross_entropy_gradient_(x.detach(), targets, ones, ones.clone().requires_grad_(), 0, 8)
    with pytest.raises(ValueError, match="give a contiguous tensor"):
        cross_entropy_gradient_(x.detach().T, torch.arange(8), torch.ones(8), torch.ones(8), 0, 3)
    assert torch.equal(x, before)
    with torch.no_grad():
        cross_entropy_gradient_(x, targets, ones, ones, 0, 8)
    assert not torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_compile_sees_the_whole(dtype):
    """No graph break, in the shape it was traced with and in others."""

    def function(hidden, weight, targets):
        return head_cross_entropy(hidden * 1.5, weight, targets, 0, 101) * 2

    traced = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    hidden, weight, targets = head(dtype)
    for tokens in (7, 9, 20):
        inputs = hidden[:tokens].detach().requires_grad_(), weight
        found, expected = (torch.autograd.grad(f(*inputs, targets[:tokens]), inputs) for f in (traced, function))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


PEAK = """
import sys, torch
from megagpt2.kernels.cross_entropy import head_cross_entropy
tokens, rows, width, dtype = int(sys.argv[1]), 16384, 256, getattr(torch, sys.argv[2])
torch.set_num_threads(1)
hidden, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (tokens, rows))
targets = torch.randint(rows, (tokens,))
head_cross_entropy(hidden[:256], weight[:256], targets[:256] * 0, 0, 256).backward()  # what torch itself loads
hidden.grad = weight.grad = None
held = lambda what: int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) * 1024
start = held("VmRSS")
head_cross_entropy(hidden, weight, targets, 0, rows).backward()
returned = sum(t.grad.numel() * t.element_size() for t in (hidden, weight))
print(held("VmHWM") - start - returned)
"""


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_a_chunk_and_half_an_accumulator(dtype):
    """4608 tokens of 16,384 words, three chunks: all their logits would be three times as much. The limit: one chunk,
    the lower halves of d weight for 16 bits, a block of a product with torch's fp32 copy, and 24 MB for what torch
    packs and the allocator keeps."""
    end = subprocess.run(
        [sys.executable, "-c", PEAK, "4608", dtype], capture_output=True, text=True, timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert end.returncode == 0, end.stderr
    size = 4 if dtype == "float32" else 2
    chunk, halves = 1536 * 16384 * size, 0 if size == 4 else 2 * 16384 * 256
    blocks = 0 if size == 4 else (4 + 2) * (1 << 20)
    assert chunk / 2 < int(end.stdout) < chunk + halves + blocks + 24e6

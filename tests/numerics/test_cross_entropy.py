"""The fused head against plain torch: loss, gradients, padding, chunks, a vocabulary cut over ranks (I8, I9)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt2.kernels import cross_entropy
from megagpt2.kernels.cross_entropy import head_cross_entropy, token_losses
from megagpt2.parallel.tensor import TensorBuilder
from megagpt2.parallel.topology import Topology
from tests.support.kernels import TYPES, compiled, devices

TOKENS, WIDTH, WORDS = 37, 16, 101


def inputs(
    dtype=torch.float32, words: int = WORDS, padding: int = 0, tokens: int = TOKENS, std: float = 1.0, device="cpu"
):
    """hidden, weight (its padding rows hold rubbish: none may show), targets with the first and the last word."""
    generator = torch.Generator().manual_seed(tokens + words)
    hidden = (std * torch.randn(tokens, WIDTH, generator=generator)).to(dtype)
    weight = torch.randn(words + padding, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(words, (tokens,), generator=generator)
    targets[0], targets[-1] = 0, words - 1
    return hidden.to(device), weight.to(device), targets.to(device)


def differentiate(function, hidden: Tensor, weight: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of function(hidden, weight)."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


def fused(targets: Tensor, words: int = WORDS):
    return lambda hidden, weight: head_cross_entropy(hidden, weight, targets, 0, words)


def plain(targets: Tensor, words: int = WORDS):
    return lambda hidden, weight: F.cross_entropy(hidden @ weight[:words].T, targets)


def mixed(targets: Tensor, words: int = WORDS):
    """Plain torch with the loss in fp32: the only one that bears a loss scale in fp16."""
    return lambda hidden, weight: F.cross_entropy((hidden @ weight[:words].T).float(), targets)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, words: int = WORDS):
    return differentiate(plain(targets, words), hidden.double(), weight.double())


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@devices
@pytest.mark.parametrize("padding", [0, 27])
@pytest.mark.parametrize("std", [1.0, 30.0])
def test_fp32_is_float64(device, padding, std):
    """Sums of 16 and 101 products of fp32's 6e-8: 1e-6 relative to the largest, with logits up to 500 as well."""
    hidden, weight, targets = inputs(padding=padding, std=std, device=device)
    expected = reference(hidden, weight, targets)
    # A logit of 500 is itself rounded by 3e-5, and softmax turns that into a relative error.
    tolerance = 1e-6 if std == 1.0 else 1e-4
    for ours, theirs in zip(differentiate(fused(targets), hidden, weight), expected, strict=True):
        assert error(ours, theirs) < tolerance
    losses = token_losses(hidden, weight, targets, 0, WORDS)
    each = F.cross_entropy(hidden.double() @ weight[:WORDS].double().T, targets, reduction="none")
    assert error(losses, each) < tolerance


def test_gradcheck():
    hidden, weight, targets = inputs(torch.float64, words=7, padding=2, tokens=5)
    arguments = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(fused(targets, 7), arguments)  # its own tolerances, for float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_are_nowhere(dtype):
    """Their gradient is exactly 0, and loss and gradients are bit by bit those without them but for the GEMM's order
    of adding, which may follow the shape: 1e-6 in fp32, one bf16 rounding (2**-8) in bf16."""
    hidden, weight, targets = inputs(dtype, padding=27)
    loss, d_hidden, d_weight = differentiate(fused(targets), hidden, weight)
    assert (d_weight[WORDS:] == 0).all()
    without = differentiate(fused(targets), hidden, weight[:WORDS])
    for ours, theirs in zip((loss, d_hidden, d_weight[:WORDS]), without, strict=True):
        assert error(ours, theirs) < (1e-6 if dtype == torch.float32 else 2**-8)


@devices
@pytest.mark.parametrize("tokens_at_a_time", [1, 2, 5, 36])
def test_chunks_change_nothing(monkeypatch, device, tokens_at_a_time):
    """Only the order of additions: of 37 losses, and of 37 products in each weight gradient. 5e-7: 8 fp32 roundings."""
    hidden, weight, targets = inputs(padding=27, device=device)
    whole, losses = differentiate(fused(targets), hidden, weight), token_losses(hidden, weight, targets, 0, WORDS)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", tokens_at_a_time * len(weight))
    for ours, theirs in zip(differentiate(fused(targets), hidden, weight), whole, strict=True):
        assert error(ours, theirs) < 5e-7
    assert error(token_losses(hidden, weight, targets, 0, WORDS), losses) < 5e-7


@devices
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("std", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("tokens", [5, 1000])
def test_the_error_is_at_most_twice_torchs(monkeypatch, device, dtype, std, tokens):
    """I8, on each of loss and gradients; with chunks of 64 tokens, as a large vocabulary has them.

    torch's loss of bf16 logits is bf16: the error allowed is at least one rounding of fp32's, 1e-6. fp16 has a loss
    scale, with which the gradients of the mean over 5 tokens are still finite.
    """
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 64 * (WORDS + 27))
    scale, torch_head = (2.0**10, mixed) if dtype == torch.float16 else (1.0, plain)
    hidden, weight, targets = inputs(dtype, padding=27, tokens=tokens, std=std, device=device)
    expected = reference(hidden, weight, targets)
    ours = differentiate(fused(targets), hidden, weight, scale)
    torchs = differentiate(torch_head(targets), hidden, weight, scale)
    for what, a, b, exact in zip(("loss", "d hidden", "d weight"), ours, torchs, expected, strict=True):
        unit = 1.0 if what == "loss" else scale
        assert error(a.double() / unit, exact) <= max(2 * error(b.double() / unit, exact), 1e-6), what


def test_the_scale_of_the_loss_reaches_the_gradients():
    """A loss scale of 2**16 multiplies fp32 gradients exactly."""
    hidden, weight, targets = inputs()
    _, *once = differentiate(fused(targets), hidden, weight)
    _, *scaled = differentiate(fused(targets), hidden, weight, scale=2.0**16)
    for a, b in zip(scaled, once, strict=True):
        assert torch.equal(a, b * 2.0**16)


@devices
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_fp16_gradients_are_neither_lost_nor_infinite(device, scale):
    """4096 tokens: gradients of 1e-3 / 4096 are below fp16's least normal number 6e-5. d weight's largest are not, and
    a loss scale lifts d hidden's.

    One fp16 rounding is 2**-11 relative; 8 of them for what the products of fp16 numbers add up to.
    """
    hidden, weight, targets = inputs(torch.float16, tokens=4096, device=device)
    expected = reference(hidden, weight, targets)
    _, d_hidden, d_weight = differentiate(fused(targets), hidden, weight, scale)
    assert d_hidden.isfinite().all() and d_weight.isfinite().all()
    assert error(d_weight.double() / scale, expected[2]) < 8 * 2**-11
    if scale > 1:
        assert error(d_hidden.double() / scale, expected[1]) < 8 * 2**-11


def test_rare_words_keep_their_digits_in_fp16():
    """Each row of d weight by itself, since Adam divides by a row's own size: of words at p = 1e-7, where unscaled d
    logits have two bits of fp16's, and whatever their rank a relative error of at most twice plain torch's, whose d
    logits have the loss scale of 2**16 in them; for nine rows out of ten at most two roundings to fp16, 2**-10."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, words, common, scale = 1024, 32, 1000, 200, 2.0**16
    hidden, weight = (torch.randn(n, width, generator=generator) for n in (tokens, words))
    weight /= width**0.5
    hidden[:, 0] = 8.0  # a model that has learnt which words are frequent
    weight[:common, 0] += 0.8
    weight[common:, 0] -= 0.4
    hidden, weight = hidden.half(), weight.half()
    targets = torch.randint(common, (tokens,), generator=generator)
    probabilities = (hidden.double() @ weight.double().T).softmax(1)[:, common:]
    assert 1e-8 < probabilities.median() < 1e-7
    exact = reference(hidden, weight, targets, words)[2]
    errors = []
    for head in (fused(targets, words), mixed(targets, words)):
        *_, d_weight = differentiate(head, hidden, weight, scale)
        rows = (d_weight.double() / scale - exact).norm(dim=1) / exact.norm(dim=1)
        errors.append(rows[common:].sort().values)
    ours, torchs = errors
    assert (ours <= 2 * torchs).all()
    assert ours[int(0.9 * len(ours))] < 2**-10


@pytest.mark.parametrize(("mean", "share"), [(64.0, 0.18), (30.0, 1.0)])
def test_a_frequent_words_sum_has_room_in_fp16(mean, share):
    """A chunk's sum over 8192 tokens, of which `share` have one target, is 94,000 and 240,000: more than fp16's 65504.
    The mean is not: 8 roundings to fp16 as above."""
    generator = torch.Generator().manual_seed(0)
    tokens, words = 8192, 64
    hidden = (mean + torch.randn(tokens, WIDTH, generator=generator)).half()
    weight = (0.02 * torch.randn(words, WIDTH, generator=generator)).half()
    targets = torch.randint(words, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < share] = 0
    *_, d_weight = differentiate(fused(targets, words), hidden, weight)
    exact = reference(hidden, weight, targets, words)[2]
    assert exact.abs().max() * tokens > torch.finfo(torch.float16).max
    assert error(d_weight, exact) < 8 * 2**-11


@compiled
def test_a_product_of_fp16_takes_little_memory(monkeypatch):
    """On a CPU it is made of fp32 copies, and each is at most as large as the block that docs/kernels.md counts."""
    monkeypatch.setattr(cross_entropy, "_CPU_BLOCK", 64 * WIDTH)

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                self.found = max(self.found, result.numel())
            return result

    hidden, weight, targets = inputs(torch.float16, tokens=500)
    with Largest() as largest:
        differentiate(fused(targets), hidden, weight)
    # the scaling's copy of d hidden's piece is of a chunk's size: 500 tokens here, some hundreds of 1600 in GPT-2
    assert 64 * WIDTH <= largest.found <= hidden.numel()
    with Largest() as largest:
        cross_entropy._product(hidden[:, :8], hidden)
    assert largest.found <= 64 * WIDTH


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*arguments, **(keywords or {}))


@devices
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_frozen_costs_nothing(device, dtype):
    """A frozen weight or hidden: two products of three, nothing kept for it, and the other's gradient bit by bit."""
    hidden, weight, targets = inputs(dtype, padding=27, device=device)
    _, d_hidden, d_weight = differentiate(fused(targets), hidden, weight)
    kept = {"hidden": 1, "weight": 1 if dtype == torch.float32 else 2}  # d weight of 16 bits has lower halves
    for wanted, expected in (("hidden", d_hidden), ("weight", d_weight)):
        leaves = {"hidden": hidden.clone(), "weight": weight.clone()}
        leaves[wanted].requires_grad_()
        with Products() as products:
            loss = head_cross_entropy(**leaves, targets=targets, first=0, rows=WORDS)
        assert products.count == 2
        assert sum(x is not None for x in loss.grad_fn.saved_tensors) == kept[wanted]
        loss.backward()
        assert torch.equal(leaves[wanted].grad, expected)
        assert all(x.grad is None for name, x in leaves.items() if name != wanted)


@pytest.mark.parametrize("target", [-100, -1, WORDS, WORDS + 5, 10**9])
def test_a_target_that_is_no_word_shows(target):
    """NaN, in the loss and in every gradient; of the tokens' losses in its own. Padding, from WORDS on, is no word."""
    hidden, weight, targets = inputs(padding=27)
    expected = token_losses(hidden, weight, targets, 0, WORDS)
    targets[3] = target
    loss, d_hidden, d_weight = differentiate(fused(targets), hidden, weight)
    assert loss.isnan() and d_hidden[3].isnan().all() and d_weight[:WORDS].isnan().all()
    found = token_losses(hidden, weight, targets, 0, WORDS)
    assert found[3].isnan()
    others = torch.arange(TOKENS) != 3
    assert torch.equal(found[others], expected[others])


def test_a_second_derivative_is_refused():
    """It would be silently zero beside another term, as in a penalty on the gradient."""
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss = head_cross_entropy(hidden, weight, targets, 0, WORDS)
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        torch.autograd.grad(gradient.square().sum() + hidden.square().sum(), hidden)


def test_without_gradients_it_is_the_mean_of_the_tokens():
    hidden, weight, targets = inputs(padding=27)
    with torch.no_grad():
        value = head_cross_entropy(hidden.requires_grad_(), weight, targets, 0, WORDS)
    assert not value.requires_grad
    assert error(value, differentiate(fused(targets), hidden.detach(), weight)[0]) < 5e-7  # order of additions


class Ranks:
    """Threads in the place of ranks: each has reductions over all of them, one after the other in step."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=20)
        self.slots: list[Tensor] = [torch.empty(0)] * count

    def reduce(self, rank: int, how):
        def reduced(x: Tensor) -> Tensor:
            self.slots[rank] = x
            self.barrier.wait()
            assert len({slot.shape for slot in self.slots}) == 1, "the ranks are in different places"
            result = how(torch.stack(self.slots))
            self.barrier.wait()
            return result

        return reduced

    def run(self, function) -> list:
        """function(rank, maximum, total) on every rank."""

        def one(rank: int):
            try:
                maximum = self.reduce(rank, lambda x: x.amax(0))
                return function(rank, maximum, self.reduce(rank, lambda x: x.sum(0)))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(one, range(self.count)))


def shards(words: int, padded: int, ranks: int):
    """What the sharded builder gives each rank: (spec, first word, rows that are words)."""
    with torch.device("meta"):
        tables = [
            TensorBuilder(0, Topology(tensor=ranks, rank=rank), False).tied_embedding("wte", words, padded, WIDTH, 0.02)
            for rank in range(ranks)
        ]
    return [(table.weight.spec, table.first, table.rows) for table in tables]


@devices
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("chunk", [1 << 22, 200])
@pytest.mark.parametrize(("words", "ranks"), [(101, 2), (101, 3), (129, 5), (40, 4)], ids=str)
def test_a_vocabulary_in_shards_is_the_whole(monkeypatch, device, words, ranks, chunk, dtype):
    """129 words over 5 ranks and 40 over 4 leave ranks without a word. Sums in another order: 1e-6 in fp32. In 16 bits
    logits, their gradients and up to five partial sums are rounded, by half an eps each: 4 eps. A target that is no
    rank's word is NaN on every rank."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk)
    padded = -(-words // 128) * 128
    tolerance = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    hidden, weight, targets = inputs(dtype, words=words, device=device)
    outside = targets.clone()
    outside[-1] = words
    parts = shards(words, padded, ranks)
    if (words, ranks) != (101, 2) and words != 101:
        assert any(rows == 0 for _, _, rows in parts)

    def one(rank, maximum, total):
        spec, first, rows = parts[rank]
        local = spec.local(weight)
        evaluated = token_losses(hidden, local, targets, first, rows, maximum, total)
        lost = token_losses(hidden, local, outside, first, rows, maximum, total)
        assert lost[-1].isnan() and torch.equal(lost[:-1], evaluated[:-1])
        return evaluated, *differentiate(
            lambda h, w: head_cross_entropy(h, w, targets, first, rows, maximum, total), hidden, local
        )

    answers = Ranks(ranks).run(one)
    loss, d_hidden, d_weight = reference(hidden, weight, targets, words)
    each = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    for evaluated, value, _, _ in answers:
        assert torch.equal(value, answers[0][1])  # every rank reports the same number
        assert error(value, loss) < tolerance
        assert error(evaluated, each) < tolerance
    assert error(sum(answer[2] for answer in answers), d_hidden) < tolerance  # partial sums, as the contract says
    whole = torch.full_like(weight, float("nan"))
    for (spec, _, rows), (*_, gradient) in zip(parts, answers, strict=True):
        spec.place(gradient, whole)
        assert (gradient[rows:] == 0).all()
    assert error(whole, d_weight) < tolerance


@given(st.integers(1, 5000), st.integers(1, 40))
@settings(max_examples=50)
def test_shards_have_equally_many_rows_and_every_word_once(words, ranks):
    """The rows decide how many tokens make a chunk: with unequal rows the ranks' reductions would not meet."""
    parts = shards(words, -(-words // 128) * 128, ranks)
    assert len({spec.local_shape for spec, _, _ in parts}) == 1
    assert [word for _, first, rows in parts for word in range(first, first + rows)] == list(range(words))
    assert all(spec.ranges == ((first, first + rows),) for spec, first, rows in parts)


def test_the_gradients_factor_is_not_rounded_to_bf16():
    """1 / 3075 rounded to bf16 is 0.3% off, and would scale the whole network's gradient by that."""
    torch.manual_seed(0)
    tokens, width, words = 3075, 16, 50
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    weight = torch.randn(words, width).bfloat16()
    targets = torch.randint(0, words, (tokens,))
    head_cross_entropy(hidden, weight, targets, 0, words).backward()
    exact = hidden.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(exact @ weight.double().T, targets).backward()
    slope = (hidden.grad.double() * exact.grad).sum() / (exact.grad**2).sum()
    # 49,200 independent roundings of relative size 2**-9 average out to below 1e-4
    assert abs(slope - 1) < 5e-4

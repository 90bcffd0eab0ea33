"""Attention weights of csrc/: as exact as torch's at every shape, whatever is hidden, and the same bits every time."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt2.kernels.dropout import keep_mask, threshold_and_scale
from megagpt2.kernels.philox import key_of
from megagpt2.kernels.scale_mask_softmax import (
    WeightDropout,
    hidden_keys,
    scale_mask_softmax,
    scale_mask_softmax_reference,
)
from tests.support import cuda_kernels
from tests.support.kernels import TYPES, assert_as_exact, compiled, devices, poisoned, with_gradients

ROOT = Path(__file__).resolve().parents[2]
KEY = key_of(1234, "attention")
# Around a vector of 4, 8 or 16, several of them, a group of 16 queries, and what a warp's or a block's registers hold.
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129, 250]))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, elsewhere in memory."""
    if layout == "heads last":  # rows stay whole
        return x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]
    if layout == "padded":  # rows that are not aligned
        return torch.nn.functional.pad(x, (1, 2), value=math.nan)[..., 1:-2]
    return x


@st.composite
def inputs(draw):
    """scores of any shape and layout, scale, what is hidden, what is dropped, and dy."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(LENGTHS), draw(LENGTHS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(TYPES))
    scores = torch.randn(shape, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 30.0]))
    dy = torch.randn(shape, generator=generator)
    scores, dy = (
        laid_out(t.to(dtype), draw(st.sampled_from(["contiguous", "heads last", "transposed", "strided", "padded"])))
        for t in (scores, dy)
    )
    arguments = {"scale": draw(st.sampled_from([1.0, 0.125, -0.3])), "causal": draw(st.booleans())}
    if draw(st.booleans()):
        sizes = [1 if draw(st.booleans()) else size for size in shape][draw(st.integers(0, 3)):]
        arguments["mask"] = torch.rand(sizes, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    if draw(st.booleans()):
        samples = torch.randint(0, 2**62, shape[:1], generator=generator)
        start = draw(st.one_of(st.integers(0, 9), st.integers(0, 2**40)))
        arguments["dropout"] = WeightDropout(samples, KEY, draw(st.sampled_from([0.0, 0.1, 0.7])), start)
    return scores, dy, arguments


def moved(arguments: dict, device: str) -> dict:
    """The arguments with their tensors on a device."""
    arguments = dict(arguments)
    if "mask" in arguments:
        arguments["mask"] = arguments["mask"].to(device)
    if "dropout" in arguments:
        arguments["dropout"] = arguments["dropout"]._replace(samples=arguments["dropout"].samples.to(device))
    return arguments


def chain(scores, scale, causal=False, mask=None, dropout=None):
    """What torch users write: rounded after every step. Rows that see nothing are mended."""
    hidden = hidden_keys(scores, causal, mask)
    weights = (scores * scale).masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0.0)
    if dropout is None:
        return weights
    keep = keep_mask(dropout.key, dropout.probability, dropout.samples, dropout.start, scores[0].numel())
    return torch.where(keep.view(scores.shape), weights * threshold_and_scale(dropout.probability)[1], 0.0)


@compiled
@devices
@given(given_inputs=inputs())
@settings(max_examples=200)
def test_values_and_gradients_are_as_exact_as_torchs(device, given_inputs):
    scores, dy, arguments = given_inputs
    with poisoned():
        found = with_gradients(partial(scale_mask_softmax, **moved(arguments, device)), [scores.to(device)],
                               dy.to(device))
    torchs = with_gradients(partial(chain, **arguments), [scores], dy)
    exact = with_gradients(partial(scale_mask_softmax_reference, **arguments), [scores.double()], dy.double())
    hidden = hidden_keys(scores, arguments["causal"], arguments.get("mask"))
    dropout = arguments.get("dropout")
    factor = 1.0 / (1.0 - dropout.probability) if dropout else 1.0
    exponent = (scores.double() * arguments["scale"]).abs().max().item()  # exp has its argument's absolute error
    size = exact[0].max().item()
    gradient = abs(arguments["scale"]) * factor * dy.abs().max().item()
    scales = [exponent * size, (1 + exponent) * gradient]
    # Weights p are kept rounded, by at most eps p / 2: |scale| p (dy - sum(dy p)) is off by up to eps |scale| |dy| p.
    kept = [0.0, torch.finfo(scores.dtype).eps * gradient * size]
    for name, scale, off, mine, *two in zip(["y", "d scores"], scales, kept, found, exact, torchs, strict=True):
        assert torch.equal(mine.cpu() == 0.0, (mine.cpu() == 0.0) | hidden), name  # exactly zero where hidden
        assert_as_exact(mine.cpu(), *two, name, scale, off)


@compiled
@devices
@pytest.mark.parametrize(
    ("query", "key"), [(3, 1023), (2, 1024), (2, 4096), (1, 16_384), (2, 16_385), (1, 40_000), (40_000, 1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_length_is_too_long(device, query, key, dtype):
    """One row's sum over many keys, and rows that see all but the last few."""
    generator = torch.Generator().manual_seed(0)
    scores, dy = (torch.randn(1, 2, query, key, generator=generator).to(dtype) for _ in range(2))
    dropout = WeightDropout(torch.tensor([2**40]), KEY, 0.1, 3)
    for arguments in ({"causal": True}, {"causal": True, "dropout": dropout}):
        found = with_gradients(partial(scale_mask_softmax, scale=1.5, **moved(arguments, device)), [scores.to(device)],
                               dy.to(device))
        torchs = with_gradients(partial(chain, scale=1.5, **arguments), [scores], dy)
        exact = with_gradients(
            partial(scale_mask_softmax_reference, scale=1.5, **arguments), [scores.double()], dy.double()
        )
        for name, mine, *two in zip(["y", "d scores"], found, exact, torchs, strict=True):
            assert_as_exact(mine.cpu(), *two, name)


@compiled
@devices
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_visible_infinities_are_torchs(device, dtype, masked, value):
    """One such score, a row of them, and one among the hidden: only what is visible counts, hidden weights stay 0."""
    scores = torch.randn(1, 2, 40, 50).to(dtype)
    mask = torch.rand(40, 50) < 0.3 if masked else None
    scores[0, 0, 7, 3] = value
    scores[0, 0, 9, :] = value
    hidden = hidden_keys(scores, True, mask)
    scores[0, 1] = torch.where(hidden, value, scores[0, 1])
    found = scale_mask_softmax(scores.to(device), 0.5, True, None if mask is None else mask.to(device)).cpu()
    expected = (scores.double() * 0.5).masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0.0)
    assert torch.equal(found.isnan(), expected.isnan())
    assert not found[0, 1].isnan().any()
    assert torch.allclose(found.double().nan_to_num(), expected.nan_to_num(), atol=2 * torch.finfo(dtype).eps)


@devices
@pytest.mark.parametrize("dtype", [*TYPES, torch.float64], ids=str)
def test_queries_that_see_nothing_have_weights_and_gradients_of_zero(device, dtype):
    """By a mask, and as there are fewer keys than queries. Nor do the scores there matter."""
    scores = torch.randn(2, 1, 9, 5).to(device, dtype)
    scores[:, :, :3] = math.nan
    scores.requires_grad_()
    mask = torch.zeros(2, 1, 9, 1, dtype=torch.bool, device=device)
    mask[1, 0, 6] = True
    y = scale_mask_softmax(scores, 2.0, causal=True, mask=mask)
    [gradient] = torch.autograd.grad(y, scores, torch.randn_like(y))
    for t in (y, gradient):
        assert not t[:, :, :4].any() and not t[1, 0, 6].any() and not t.isnan().any()
    assert torch.allclose(y.sum(-1)[0, 0, 4:].double(), torch.ones(5, dtype=torch.float64, device=device), atol=1e-2)


@compiled
@devices
def test_what_causality_hides_does_not_count_in_the_gradient_either(device):
    scores, dy = (torch.randn(1, 2, 33, 40, device=device) for _ in range(2))
    [_, expected] = with_gradients(partial(scale_mask_softmax, scale=1.0, causal=True), [scores], dy)
    hidden = hidden_keys(scores, True, None)
    scores, dy = (t.masked_fill(hidden, math.nan) for t in (scores, dy))
    [_, found] = with_gradients(partial(scale_mask_softmax, scale=1.0, causal=True), [scores], dy)
    assert torch.equal(found, expected)


def unreadable_above_the_diagonal(values: torch.Tensor, memory: list) -> torch.Tensor:
    """The same [n, n] where what lies right of the diagonal is on pages that may not be read: reading it is the end.

    memory: keeps the pages alive. Row r ends with its element r at a page's end, and the next page is forbidden.
    """
    libc, page, n, size = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, len(values), values.element_size()
    pages = mmap.mmap(-1, 2 * n * page)
    memory.append(pages)
    flat = torch.frombuffer(pages, dtype=values.dtype)
    stride = (2 * page - size) // size  # a row further, its diagonal is one element further
    rows = flat.as_strided((n, n), (stride, 1), (page - size) // size)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for row in range(n):
        rows[row, : row + 1] = values[row, : row + 1]
    for row in range(n):
        assert libc.mprotect(ctypes.c_void_p(begin + (2 * row + 1) * page), ctypes.c_size_t(page), 0) == 0
    return rows[None, None]


UNREAD = """
import torch
from tests.numerics.test_scale_mask_softmax import KEY, unreadable_above_the_diagonal
forward, backward = torch.ops.megagpt2.scale_mask_softmax, torch.ops.megagpt2.scale_mask_softmax_backward
memory = []
for dtype in (torch.float32, torch.bfloat16):
    for n in (1, 5, 16, 17, 40, 70):
        scores, dy = (torch.randn(n, n).to(dtype) for _ in range(2))
        for samples in (None, torch.tensor([3])):
            rest = (samples, *KEY, 0.2, 0)
            y, weights = forward(scores[None, None], 0.5, True, None, *rest)
            kept = y if samples is None else weights
            dx = backward(dy[None, None], kept, 0.5, True, *rest)
            hidden = [unreadable_above_the_diagonal(t, memory) for t in (scores, dy, kept[0, 0])]
            found = forward(hidden[0], 0.5, True, None, *rest)
            assert torch.equal(found[0], y) and torch.equal(found[1], weights)
            assert torch.equal(backward(hidden[1], hidden[2], 0.5, True, *rest), dx)
print("not read", flush=True)
import os
os._exit(0)
"""


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="lays out pages as Linux does")
def test_what_causality_hides_is_not_read():
    """In a process of its own, which a read would kill."""
    end = subprocess.run([sys.executable, "-c", UNREAD], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert end.stdout == "not read\n", (end.returncode, end.stderr)


@compiled
@devices
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_gradient_of_a_hidden_weight_counts_for_nothing(device, value):
    """Whatever it is: a value of a padding token may be anything."""
    scores, dy = (torch.randn(1, 2, 6, 21, device=device) for _ in range(2))
    mask = torch.rand(6, 21, device=device) < 0.3
    mask[2] = True
    dy = dy.masked_fill(mask, value)
    [_, found] = with_gradients(partial(scale_mask_softmax, scale=0.5, mask=mask), [scores], dy)
    [_, expected] = with_gradients(
        partial(scale_mask_softmax_reference, scale=0.5, mask=mask), [scores], dy.masked_fill(mask, 0.0)
    )
    assert (found[:, :, mask] == 0).all()
    torch.testing.assert_close(found, expected)


@compiled
@devices
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.125, 0.0])
def test_scores_may_be_as_large_as_their_type_allows(device, dtype, scale):
    """A row of them all alike, as what is added to hide padding leaves, and rows in which some are larger."""
    largest = torch.finfo(dtype).max
    some = torch.rand(30)
    rows = [torch.full((30,), -largest), torch.full((30,), largest), largest / 4 * some, 2e4 + 9e3 * some]
    scores = torch.stack(rows).to(device, dtype)[None, None]
    for mask in (None, torch.rand(30, device=device) < 0.3):
        found = scale_mask_softmax(scores, scale, mask=mask)
        exact = scale_mask_softmax_reference(scores.double(), scale, mask=mask)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=torch.finfo(dtype).eps)


@compiled
@devices
@pytest.mark.parametrize("scale", [0.0, 1e-46, -1e-46, 1e-44, -1e-40, 3e-37, 2e-36, 2.3e38])
def test_a_scale_may_be_almost_any_number_of_fp32(device, scale):
    """At 0 and below the smallest all finite scores are alike; from 2.36e38 on the exponent's factor is its largest."""
    scores = torch.tensor([[3e38, -3e38, 0.0, 1.0], [1e-38, 0.0, -1e-38, 2e-38], [0.0, -math.inf, 1.0, 2.0]])
    if scale > 1:
        scores = scores[1:2]
    scores = scores.to(device)[None, None]
    for arguments in ({}, {"causal": True}, {"mask": torch.tensor([False, True, False, False], device=device)}):
        found = scale_mask_softmax(scores, scale, **arguments)
        expected = scale_mask_softmax_reference(scores, scale, **arguments)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, equal_nan=True)


@compiled
@pytest.mark.skipif(cuda_kernels.ENVIRONMENT in os.environ, reason="a GPU's weights are exact beside the largest")
def test_small_weights_are_exact_in_proportion():
    """On the CPU not only beside the largest: 2^x is made of a product that is never rounded as a whole."""
    scores = -torch.linspace(0, 80, 4001)[:, None] * torch.tensor([0.0, 1.0])
    found = scale_mask_softmax(scores[None, None], 0.7)[0, 0, :, 1].double()
    exact = scale_mask_softmax_reference(scores[None, None].double(), 0.7)[0, 0, :, 1]
    assert ((found - exact).abs() / exact).max() < 4 * 2**-23


@compiled
def test_rows_without_keys_have_samples_too():
    """A million rows: the numbers of samples that aren't there would lie in memory that isn't there."""
    dropout = WeightDropout(torch.arange(1), KEY, 0.1)
    scores = torch.empty(1, 1, 1_000_000, 0, requires_grad=True)
    y = scale_mask_softmax(scores, 1.0, dropout=dropout)
    y.backward(torch.empty(scores.shape))
    assert y.shape == scores.grad.shape == scores.shape


@compiled
@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_query_that_sees_nothing_has_no_gradient_whatever_the_scale(scale):
    scores, mask = torch.randn(1, 1, 2, 40), torch.tensor([[True], [False]]).expand(2, 40)
    function = partial(scale_mask_softmax, scale=scale, mask=mask)
    y, gradient = with_gradients(function, [scores], torch.randn(1, 1, 2, 40))
    assert not y[..., 0, :].any() and not gradient[..., 0, :].any()
    assert y[..., 1, :].isnan().any()


@compiled
@devices
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_same_bits_every_time(device, dtype):
    """On any number of threads: the work is shared row by row."""
    scores = torch.randn(2, 3, 100, 120).to(device, dtype)
    arguments = moved({"mask": torch.rand(100, 120) < 0.2, "dropout": WeightDropout(torch.arange(2), KEY, 0.1)}, device)
    function = partial(scale_mask_softmax, scale=0.3, causal=True, **arguments)
    expected, before = with_gradients(function, [scores], scores), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, with_gradients(function, [scores], scores), expected))
    finally:
        torch.set_num_threads(before)


@compiled
@devices
def test_a_share_of_the_heads_draws_its_part_of_the_mask(device):
    scores = torch.zeros(2, 5, 7, 9, device=device)
    samples = torch.tensor([3, 2**50], device=device)
    whole = scale_mask_softmax(scores, 1.0, dropout=WeightDropout(samples, KEY, 0.5))
    part = scale_mask_softmax(scores[:, 2:], 1.0, dropout=WeightDropout(samples, KEY, 0.5, 2 * 7 * 9))
    assert torch.equal(whole[:, 2:], part)
    assert torch.equal(whole != 0, keep_mask(KEY, 0.5, samples, 0, 5 * 7 * 9).view(scores.shape))


@compiled
@devices
def test_what_is_kept_for_the_gradient_are_the_weights_before_dropout(device):
    scores = torch.randn(2, 3, 20, 33, device=device)
    with poisoned():
        y, none = torch.ops.megagpt2.scale_mask_softmax(scores, 0.5, True, None, None, 0, 0, 0.0, 0)
        _, weights = torch.ops.megagpt2.scale_mask_softmax(
            scores, 0.5, True, None, torch.tensor([1, 2], device=device), *KEY, 0.5, 0
        )
    assert torch.equal(weights, y) and not none.numel()


WORST_ERRORS = """
import torch
from functools import partial
from megagpt2.kernels.scale_mask_softmax import WeightDropout, scale_mask_softmax, scale_mask_softmax_reference
from tests.support.kernels import TYPES, with_gradients
torch.manual_seed(0)
for dtype in TYPES:
    worst = 0.0
    for key in [*range(1, 36), 255]:
        scores, dy, mask = torch.randn(2, 1, 9, key), torch.randn(2, 1, 9, key), torch.rand(9, key) < 0.3
        drawn = WeightDropout(torch.tensor([1, 2]), (3, 4), 0.4, 5)
        results = [
            with_gradients(partial(function, scale=4.0, causal=True, mask=mask, dropout=drawn), [scores.to(dtype)], dy)
            for function in (scale_mask_softmax, scale_mask_softmax_reference)
        ]
        worst = max([worst, *((a - b).abs().max().item() for a, b in zip(*results))])
    print(worst / torch.finfo(dtype).eps)
"""


@compiled
@pytest.mark.parametrize("name", ["portable", "avx2"])  # the tests above run with the best there is
def test_every_set_of_vector_instructions_computes_the_same(name):
    """Up to rounding, at every width of a tail. Values are below 2 and gradients below 40: here in units of epsilon."""
    found = subprocess.run(
        [sys.executable, "-c", WORST_ERRORS], env=os.environ | {"MEGAGPT2_CPU": name}, capture_output=True, text=True,
        timeout=120,
    )
    if found.returncode and "which this processor has not" in found.stderr and name != "portable":
        pytest.skip(f"this processor has no {name}")
    assert found.returncode == 0, found.stderr
    assert all(float(line) <= 16 for line in found.stdout.split()) and found.stdout.count("\n") == 3, found.stdout


@compiled
def test_the_mask_of_dropout_is_not_stored():
    scores = torch.randn(2, 3, 40, 40, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = scale_mask_softmax(scores, 1.0, True, dropout=WeightDropout(torch.arange(2), KEY, 0.1))
    assert sorted(saved) == sorted([scores.shape, (2,)]) and y.shape == scores.shape  # weights and sample numbers


@pytest.mark.parametrize("dropout", [None, WeightDropout(torch.tensor([1, 2]), KEY, 0.3, 5)], ids=["", "dropout"])
def test_gradcheck_of_the_reference(dropout):
    scores = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 4) < 0.3
    assert torch.autograd.gradcheck(
        lambda x: scale_mask_softmax_reference(x, 0.7, True, mask, dropout), (scores,)
    )


@compiled
@devices
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_opcheck(device, dtype):
    """Schema, fake tensors, autograd registration, and tracing with shapes that change."""
    scores = torch.randn(2, 3, 5, 6).to(device, dtype).requires_grad_()
    mask = (torch.rand(5, 6) < 0.3).to(device).expand(scores.shape)
    samples = torch.tensor([7, 2**40], device=device)
    forward, backward = torch.ops.megagpt2.scale_mask_softmax, torch.ops.megagpt2.scale_mask_softmax_backward
    for x, hidden in ((scores, mask), (scores.mT, None), (scores.detach()[:, :0], None)):
        for drawn in (None, samples):
            rest = (drawn, *KEY, 0.1, 3)
            torch.library.opcheck(forward.default, (x, 0.5, True, hidden, *rest))
            torch.library.opcheck(backward.default, (x.detach(), x.detach(), 0.5, True, *rest))


def test_torch_compile_sees_the_whole():
    """No graph break, in the shape it was traced with and in others."""
    def function(scores, mask, samples):
        return scale_mask_softmax(scores + 1, 0.5, True, mask, WeightDropout(samples, KEY, 0.1, 3)) * 2

    traced = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 11):
        scores, mask = torch.randn(2, 3, length, length + 1, requires_grad=True), torch.rand(length, 1) < 0.1
        results = []
        for one in (traced, function):
            y = one(scores, mask, torch.tensor([7, 8]))
            results.append((y, *torch.autograd.grad(y.sum(), scores)))
        assert all(map(torch.equal, *results))


SCORES = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("scores", "arguments", "complaint"),
    [
        (SCORES[0], {}, "give .batch, heads, query, key"),
        (SCORES, {"mask": torch.zeros(4, 5)}, "give bool"),
        (SCORES, {"mask": torch.zeros(4, 4, dtype=torch.bool)}, "broadcasts to the scores"),
        (SCORES, {"mask": torch.zeros(1, 2, 3, 4, 5, dtype=torch.bool)}, "broadcasts to the scores"),
        (SCORES, {"dropout": WeightDropout(torch.tensor([1]), KEY, 0.1)}, "give an int64 number for each"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(scores, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        scale_mask_softmax(scores, 1.0, **arguments)


@compiled
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scores": SCORES.double()}, "float32, bfloat16 and float16"),
        ({"scores": SCORES[0]}, "must be .batch"),
        ({"mask": SCORES[:1] > 0}, "of the scores' shape"),
        ({"mask": SCORES}, "must be bool"),
        ({"samples": torch.tensor([1])}, "give one for each"),
        ({"samples": torch.tensor([1.0, 2.0])}, "int64"),
        ({"probability": 1.0}, "below 1"),
        ({"key0": -1}, "0, 2"),
        ({"start": -1}, "have numbers from 0"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes, complaint):
    arguments = {
        "scores": SCORES, "scale": 1.0, "causal": True, "mask": None, "samples": torch.tensor([1, 2]), "key0": 1,
        "key1": 2, "probability": 0.1, "start": 0,
    }
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.megagpt2.scale_mask_softmax(**(arguments | changes))

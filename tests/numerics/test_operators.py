"""What all operators of csrc/ must do alike: on every processor, for any number of rows, where torch is faster."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from megagpt2.kernels import cross_entropy
from megagpt2.kernels.extension import EXTENSION, Extension, Worth
from tests.support.kernels import assert_as_exact, compiled, devices, with_gradients
from tests.support.operators import operators

NAMES = [operator.name for operator in operators(1, 1)]
PLAIN = [name for name in NAMES if name != "scale_mask_softmax"]  # with sums over rows


def operator_of(name: str, rows: int, width: int, probability: float = 0.0, device: str = "cpu"):
    return next(operator for operator in operators(rows, width, probability, device) if operator.name == name)


def run_operators(instructions: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """tests/support/operators.py on these vector instructions; the test is skipped where the processor lacks them."""
    end = subprocess.run(
        [sys.executable, "-m", "tests.support.operators", *arguments], capture_output=True, text=True, timeout=200,
        env=os.environ | {"MEGAGPT2_CPU": instructions, **environment},
    )
    if end.returncode and "which this processor has not" in end.stderr and instructions != "portable":
        pytest.skip(f"this processor has no {instructions}")
    return end


@compiled
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_every_set_of_vector_instructions_is_as_exact(instructions):
    end = run_operators(instructions, OMP_NUM_THREADS="1")
    assert end.stdout == "as exact\n", end.stderr


@compiled
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_what_is_written_past_the_caches_is_the_same(instructions):
    """Large tensors are: here all are that can be."""
    past, plain = (
        run_operators(instructions, "bits", OMP_NUM_THREADS="2", MEGAGPT2_LAST_CACHE=size) for size in ("0", str(2**40))
    )
    assert len(past.stdout) == 65, past.stderr
    assert past.stdout == plain.stdout


@compiled
@pytest.mark.parametrize("name", PLAIN)
def test_sums_over_many_rows_are_as_exact_as_torchs(name):
    """Where a sum one after the other had lost two digits: torch's own adds halves of halves."""
    operator = operator_of(name, 60_000, 3)
    torch.manual_seed(1)
    inputs = operator.inputs(torch.float32)
    dy = torch.randn(operator.reference(*inputs).shape)
    found, torchs = (with_gradients(f, inputs, dy) for f in (operator.ours, operator.reference))
    exact = with_gradients(operator.reference, [t.double() for t in inputs], dy.double())
    for three in zip(found, exact, torchs, strict=True):
        if three[0].dim() == 1:
            assert_as_exact(*three, name)


@compiled
@devices
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(device, name):
    """Result and gradients, the sums over 1,200 rows too."""
    operator = operator_of(name, 600, 257, 0.3, device)
    torch.manual_seed(1)
    inputs = operator.inputs(torch.bfloat16, device)
    dy = torch.randn_like(operator.ours(*inputs))
    first, *others = (with_gradients(operator.ours, inputs, dy) for _ in range(4))
    assert all(torch.equal(one, other) for found in others for one, other in zip(first, found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_rows_beyond_the_31st_bit(name):
    """The last rows of 2^31 elements and some more are what they are by themselves: no index is of 32 bits."""
    operator = operator_of(name, 2**19 + 3, 2048, device="cuda")
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of the GPU's memory")
    inputs = operator.inputs(torch.bfloat16, "cuda")
    with torch.no_grad():
        dy = torch.randn_like(operator.ours(*inputs))
    found = with_gradients(operator.ours, inputs, dy)
    last = [x[..., -5:, :].clone() if x.dim() > 1 else x for x in inputs]
    expected = with_gradients(operator.ours, last, dy[..., -5:, :].clone())
    assert found[0].numel() > 2**31
    for one, other in zip(found, expected, strict=True):
        if one.dim() > 1:  # not the sums over all rows
            assert torch.equal(one[..., -5:, :], other)


@compiled
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_a_second_derivative_is_refused_and_not_zero(name, probability):
    """A gradient penalty: through the gradient with respect to x, whose dy needs none."""
    operator = operator_of(name, 4, 5, probability)
    x, *others = operator.inputs(torch.float32)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(operator.ours(x, *others).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: set MEGAGPT2_REFERENCE=1"):
        (gradient.square().sum() + x.sum()).backward()


@compiled
@pytest.mark.parametrize("name", PLAIN)
def test_shapes_where_torch_is_faster_are_left_to_torch(name, monkeypatch):
    """Small tensors and short rows; unless ours are asked for, as everywhere else in these tests."""
    module = importlib.import_module(f"megagpt2.kernels.{name}")
    taken = []
    reference = getattr(module, f"{name}_reference")
    monkeypatch.setattr(module, f"{name}_reference", lambda *a, **k: taken.append(1) or reference(*a, **k))
    narrow = module.WORTH.narrowest - 1
    for always in (False, True):
        monkeypatch.setattr(module, "EXTENSION", dataclasses.replace(EXTENSION, always=always))
        for shape, left in {(2048, 768): 0, (1, 768): 1, (2**20 // narrow, narrow): 1}.items():
            operator = operator_of(name, *shape)
            operator.ours(*operator.inputs(torch.bfloat16))
            assert len(taken) == (0 if always else left), shape
            taken.clear()


@compiled
@pytest.mark.parametrize(
    ("shape", "causal", "trained", "left"),
    [
        ((1, 1, 32, 32), True, False, False), ((1, 8, 512, 31), True, False, True), ((1, 8, 8, 8), True, True, True),
        ((1, 4, 64, 64), True, True, False), ((1, 8, 4096, 31), True, True, True),
        ((1, 12, 1, 64), True, False, True),  # the last query sees all keys, as without a mask
        ((1, 4, 128, 128), False, False, False), ((1, 64, 128, 16), False, False, True),
        ((1, 4, 128, 128), False, True, True), ((1, 8, 256, 256), False, True, False),
    ],
)
def test_attention_weights_that_torch_makes_faster_are_left_to_torch(monkeypatch, shape, causal, trained, left):
    module = importlib.import_module("megagpt2.kernels.scale_mask_softmax")
    taken = []
    reference = module.scale_mask_softmax_reference
    monkeypatch.setattr(module, "scale_mask_softmax_reference", lambda *a: taken.append(1) or reference(*a))
    scores = torch.randn(shape, requires_grad=trained)
    for always in (False, True):
        monkeypatch.setattr(module, "EXTENSION", dataclasses.replace(EXTENSION, always=always))
        module.scale_mask_softmax(scores, 0.5, causal)
        assert bool(taken) == (left and not always)
        taken.clear()


@compiled
def test_the_heads_passes_over_few_words_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(cross_entropy, "EXTENSION", dataclasses.replace(EXTENSION, always=False))
    taken = []
    for name in ("cross_entropy_statistics_reference", "cross_entropy_gradient_reference_"):
        function = getattr(cross_entropy, name)
        monkeypatch.setattr(cross_entropy, name, lambda *a, f=function: taken.append(1) or f(*a))
    for words, left in ((15, 2), (16, 0)):
        logits, targets = torch.randn(6, words), torch.arange(6)
        maximum, total, _ = cross_entropy.cross_entropy_statistics(logits, targets, 0, words)
        cross_entropy.cross_entropy_gradient_(logits, targets, maximum, total, 0, words)
        assert len(taken) == left
        taken.clear()


@pytest.fixture
def gpus(monkeypatch):
    """Let torch find GPUs of these compute capabilities."""

    def found(capabilities: list[tuple[int, int]]) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    return found


def test_one_gpu_of_several_is_enough_to_refuse(gpus):
    """A rank asks before it knows which is its own, and all ranks must agree."""
    gpus([(9, 0), (8, 0)])
    assert "a GPU of compute capability 8.0" in Extension(True, cuda="sm_90").problem("cuda")


def test_only_a_cpu_looks_at_shapes(gpus):
    gpus([(9, 0)])
    worth = Worth(fewest=8, narrowest=4)
    for shape, served in (((2, 4), True), ((1, 4), False), ((4, 2), False)):
        assert Extension(True).serves(torch.empty(shape), worth=worth) == served
        assert Extension(True, always=True).serves(torch.empty(shape), worth=worth)
        with FakeTensorMode():
            assert Extension(True, cuda="sm_90").serves(torch.empty(shape, device="cuda"), worth=worth)
    x = torch.empty(9, device="meta")  # which has no operator of its own: the references
    assert not Extension(True, cuda="sm_90").serves(x)


@compiled
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_derivatives_are_the_references(name, probability):
    """Not silently zero: the compiled operators have none."""
    operator = operator_of(name, 3, 5, probability)
    inputs = tuple(operator.inputs(torch.float32))
    tangents = tuple(map(torch.randn_like, inputs))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        found, expected = (forward_ad.unpack_dual(f(*duals)).tangent for f in (operator.ours, operator.reference))
    assert torch.equal(found, expected) and found.abs().max() > 0


@compiled
@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap"])
@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_functions_take_the_references(name, transform):
    operator = operator_of(name, 3, 5)
    inputs = tuple(operator.inputs(torch.float32))

    def results(function):
        if transform == "vmap":
            return torch.func.vmap(function)(*(torch.stack((x, -x)) for x in inputs))
        if transform == "jvp":
            return torch.func.jvp(function, inputs, inputs)[1]
        return getattr(torch.func, transform)(lambda *t: function(*t).square().sum())(*inputs)

    found, expected = (results(function) for function in (operator.ours, operator.reference))
    assert torch.equal(found, expected) and found.abs().max() > 0


@pytest.mark.parametrize(
    ("built", "capability", "says"),
    [
        ("sm_80 sm_90 compute_90", (7, 5), "8.0 or newer, and here is one of 7.5"),
        ("sm_80 sm_90 compute_90", (8, 0), None),
        ("sm_80 sm_90 compute_90", (8, 9), None),  # runs 8.0's
        ("sm_80 sm_90 compute_90", (10, 0), None),  # compiles the PTX
        ("sm_80 sm_90", (10, 0), "built for sm_80 sm_90, and here is a GPU of compute capability 10.0"),
        ("sm_90 compute_90", (8, 0), "TORCH_CUDA_ARCH_LIST=8.0 make setup"),
        ("sm_86", (8, 0), "built for sm_86"),
        ("sm_90a compute_90a", (9, 0), None),
        ("sm_90a compute_90a", (10, 0), "built for sm_90a"),
        ("sm_100f compute_100f", (10, 3), None),  # of the family
        ("sm_100f compute_100f", (12, 0), "built for sm_100f"),
    ],
)
def test_gpus_that_the_operators_are_not_for_are_named(gpus, built, capability, says):
    """And are not served: where references are allowed, they are what runs."""
    gpus([capability])
    extension = Extension(True, cuda=built)
    problem = extension.problem("cuda")
    assert problem is None if says is None else says in problem
    with FakeTensorMode():
        assert extension.serves(torch.empty(3, device="cuda")) == (says is None)
    assert extension.problem("cpu") is None
    assert "without cuda" in Extension(True).problem("cuda")

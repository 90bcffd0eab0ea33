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

from megagpt2.kernels.extension import EXTENSION, Extension
from tests.support.kernels import assert_as_exact, compiled, devices, with_gradients
from tests.support.operators import operators

NAMES = [operator.name for operator in operators(1, 1)]
PLAIN = [name for name in NAMES if name != "scale_mask_softmax"]  # its reference is slower at any size


def operator_of(name: str, rows: int, width: int, probability: float = 0.0, device: str = "cpu"):
    return next(operator for operator in operators(rows, width, probability, device) if operator.name == name)


@compiled
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_every_set_of_vector_instructions_is_as_exact(instructions):
    end = subprocess.run(
        [sys.executable, "-m", "tests.support.operators"], capture_output=True, text=True, timeout=200,
        env=os.environ | {"MEGAGPT2_CPU": instructions, "OMP_NUM_THREADS": "1"},
    )
    if end.returncode and "which this processor has not" in end.stderr and instructions != "portable":
        pytest.skip(f"this processor has no {instructions}")
    assert end.stdout == "as exact\n", end.stderr


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
def test_small_tensors_are_left_to_torch(name, monkeypatch):
    """Unless they are asked for, as everywhere else in these tests: there a call of ours costs more than it saves."""
    module = importlib.import_module(f"megagpt2.kernels.{name}")
    taken = []
    reference = getattr(module, f"{name}_reference")
    monkeypatch.setattr(module, f"{name}_reference", lambda *a, **k: taken.append(1) or reference(*a, **k))
    for always, rows, expected in ((True, 1, 0), (False, 1, 1), (False, 2048, 0)):
        monkeypatch.setattr(module, "EXTENSION", dataclasses.replace(EXTENSION, always=always))
        operator = operator_of(name, rows, 768)
        operator.ours(*operator.inputs(torch.float32))
        assert len(taken) == expected
        taken.clear()


def test_a_device_that_is_no_cpu_serves_tensors_of_any_size():
    x = torch.empty(1, device="meta")
    assert not Extension(True).serves(torch.empty(1), fewest=2) and Extension(True).serves(torch.empty(2), fewest=2)
    assert not Extension(True, cuda="sm_90").serves(x)  # meta tensors have no operator of their own: the references


@compiled
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_derivatives_are_the_references(name, probability):
    """Not silently zero: the compiled operators have none."""
    operator = operator_of(name, 3, 5, probability)
    inputs = tuple(operator.inputs(torch.float32))
    tangents = tuple(map(torch.randn_like, inputs))
    (_, found), (_, expected) = (torch.func.jvp(f, inputs, tangents) for f in (operator.ours, operator.reference))
    assert torch.equal(found, expected) and found.abs().max() > 0


@pytest.mark.parametrize(
    ("built", "capability", "says"),
    [
        ("sm_80 sm_90 compute_90", (7, 5), "8.0 or newer, and this one has 7.5"),
        ("sm_80 sm_90 compute_90", (8, 0), None),
        ("sm_80 sm_90 compute_90", (8, 9), None),  # runs 8.0's
        ("sm_80 sm_90 compute_90", (10, 0), None),  # compiles the PTX
        ("sm_80 sm_90", (10, 0), "built for sm_80 sm_90, and this GPU's compute capability is 10.0"),
        ("sm_90 compute_90", (8, 0), "TORCH_CUDA_ARCH_LIST=8.0 make setup"),
        ("sm_86", (8, 0), "built for sm_86"),
        ("sm_90a compute_90a", (9, 0), None),
        ("sm_90a compute_90a", (10, 0), "built for sm_90a"),
    ],
)
def test_gpus_that_the_operators_are_not_for_are_named(monkeypatch, built, capability, says):
    """And are not served: where references are allowed, they are what runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    extension = Extension(True, cuda=built)
    problem = extension.problem("cuda")
    assert problem is None if says is None else says in problem
    with FakeTensorMode():
        assert extension.serves(torch.empty(3, device="cuda")) == (says is None)
    assert extension.problem("cpu") is None
    assert "without cuda" in Extension(True).problem("cuda")

"""The compiled random bits and dropout are the references', bit for bit, wherever they are used: DESIGN D5, D7."""

from __future__ import annotations

import importlib
import math
import os
import runpy
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from megagpt2.kernels import extension
from megagpt2.kernels.dropout import dropout, dropout_reference
from megagpt2.kernels.extension import EXTENSION, Extension
from megagpt2.kernels.philox import key_of, random_bits, random_bits_reference, random_normal
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.layers import DenseBuilder, Dropout
from megagpt2.parallel.tensor import TensorBuilder
from megagpt2.parallel.topology import Topology
from tests.support.kernels import compiled, devices
from tests.support.models import dense_model, dropped, gradients, model_config, random_tokens

KEY = key_of(1234, "test")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Around what a counter of 4, a tile of 256 and a word of 32 bits (2**34 elements) have as their edges.
STARTS = st.one_of(
    st.integers(0, 9), st.integers(250, 260), st.integers(2**34 - 600, 2**34 + 9), st.integers(0, 2**62)
)
SAMPLES = st.one_of(st.integers(0, 9), st.integers(2**32 - 2, 2**32 + 2), st.integers(0, 2**63 - 1))


def test_the_operators_are_built():
    """The tests below skip without them, so that someone without a compiler can run the rest: this one does not."""
    for name in ("MEGAGPT2_NO_EXT", "MEGAGPT2_REFERENCE"):
        if os.environ.get(name) == "1":
            pytest.skip(f"{name}=1")
    assert EXTENSION.compiled, f"{EXTENSION.reason} (or say that none are wanted: MEGAGPT2_NO_EXT=1)"


@compiled
@devices
@given(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), st.lists(SAMPLES, max_size=3), STARTS,
       st.integers(0, 600))
def test_bits_are_the_references(device, key, samples, start, count):
    samples = torch.tensor(samples, dtype=torch.int64, device=device)
    found = random_bits(key, samples, start, count)
    expected = random_bits_reference(key, samples, start, count)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@st.composite
def inputs(draw):
    """x of any shape and layout, with values that round, overflow and underflow, and the samples it holds."""
    shape = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    x = x * torch.exp2(torch.randint(-26, 17, shape, generator=generator))
    x = x.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()) and x.numel():
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from([math.inf, -math.inf, math.nan]))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
    if layout == "transposed":
        x = x.transpose(0, -1)
    elif layout == "strided":
        x = x[..., ::2]
    elif layout == "expanded":
        x = x[:1].expand(3, *shape[1:]) if shape[0] else x
    samples = torch.tensor(draw(st.lists(SAMPLES, min_size=len(x), max_size=len(x))), dtype=torch.int64)
    return x, samples


@compiled
@devices
@given(inputs(), st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True)), STARTS)
@settings(max_examples=300)
def test_values_and_gradients_are_the_references(device, given_inputs, probability, start):
    """Equal, not close: one rounding, of the same product. A NaN stays where it is kept, and only there."""
    x, samples = (t.to(device) for t in given_inputs)
    results = []
    for function in (dropout, dropout_reference):
        leaf = x.detach().requires_grad_()  # with the strides that x has
        y = function(leaf, samples, KEY, probability, start)
        y.backward(x)
        results.append((y.detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_known_answer():
    """Random123's vector for the zero key and counter, 6627e8d5 e169c58d bc57ac4c 9b00dbd8, lower halves first: half of
    them are dropped at p = 0.75 (c000 in 16 bits), and the rest is divided by 0.25."""
    x = torch.tensor([[3.0, math.nan, 3.0, 3.0, math.nan, math.nan, 3.0, math.nan]])
    y = dropout(x, torch.tensor([0]), (0, 0), 0.75)
    assert torch.equal(y, torch.tensor([[12.0, 0.0, 12.0, 12.0, 0.0, 0.0, 12.0, 0.0]]))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 3])
def test_opcheck(dtype, start):
    """Schema, fake tensors, autograd registration, and tracing with shapes that change."""
    x, samples = torch.randn(2, 5, 8).to(dtype).requires_grad_(), torch.tensor([7, 2**40])
    for piece in (x, x.transpose(1, 2), x.detach()[:, :0]):
        torch.library.opcheck(torch.ops.megagpt2.dropout.default, (piece, samples, *KEY, 0.1, start))
    torch.library.opcheck(torch.ops.megagpt2.random_bits.default, (*KEY, samples, start, 10))


@compiled
def test_gradients_of_the_gradient():
    """The operator is linear: its second derivative with respect to the gradient is the operator again."""
    x, samples = torch.randn(2, 9, dtype=torch.float64, requires_grad=True), torch.tensor([7, 8])
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, samples, KEY, 0.3, 2) ** 2, (x,))


def test_torch_compile_sees_the_whole():
    """No graph break, in the shape it was traced with and in others."""
    samples = torch.tensor([7, 2**40])

    def function(x, samples):
        return dropout(x + 1, samples, KEY, 0.1, 3) * 2

    traced = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 11):
        x = torch.randn(2, length, 7, requires_grad=True)
        y = traced(x, samples)
        assert torch.equal(y, function(x, samples))
        [gradient] = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, torch.autograd.grad(function(x, samples).sum(), x)[0])


@compiled
def test_nothing_but_the_sample_numbers_is_saved():
    saved = []
    x = torch.randn(2, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        dropout(x, torch.tensor([1, 2]), KEY, 0.1)
    assert saved == [(2,)]


def test_recomputation_draws_the_same_mask():
    x, samples = torch.randn(2, 100, requires_grad=True), torch.tensor([1, 2])

    def function(x):
        return torch.tanh(dropout(torch.tanh(x), samples, KEY, 0.4))

    [expected] = torch.autograd.grad(function(x).sum(), x)
    y = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    with torch.no_grad():
        assert torch.equal(function(x), y)


@compiled
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_trains_the_same_with_either(monkeypatch, recompute):
    """Loss and gradients of a GPT-2 with dropout everywhere: as their bits are equal, so is everything after them."""
    config = dropped(model_config())
    batch = random_tokens(config)
    model = dense_model(config, recompute)
    loss, found = gradients(model, *batch)
    for kernel in ("philox", "dropout"):
        module = importlib.import_module(f"megagpt2.kernels.{kernel}")
        monkeypatch.setattr(module, "EXTENSION", Extension(False, "this test"))
    model = dense_model(config, recompute)
    expected_loss, expected = gradients(model, *batch)
    assert torch.equal(loss, expected_loss)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@compiled
def test_the_number_of_threads_decides_nothing():
    x, samples = torch.randn(3, 100_003), torch.tensor([1, 2, 2**50])  # about ten tasks for the threads
    expected = dropout_reference(x, samples, KEY, 0.1, 5)
    bits = random_bits_reference(KEY, samples, 5, 100_003)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(dropout(x, samples, KEY, 0.1, 5), expected)
            assert torch.equal(random_bits(KEY, samples, 5, 100_003), bits)
    finally:
        torch.set_num_threads(before)


DRAW = """
import hashlib, sys, torch
from megagpt2.kernels import dropout, philox
samples = torch.tensor([3, 2**40])
digest = hashlib.sha256(philox.random_bits((1, 2), samples, 2**34 - 77, 1003).numpy().tobytes())
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = torch.linspace(-2, 2, 2006).view(2, 1003).to(dtype)
    digest.update(dropout.dropout(x, samples, (1, 2), 0.1, 2**34 - 77).double().numpy().tobytes())
print(digest.hexdigest())
"""


def drawn(environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", DRAW], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@compiled
def test_every_set_of_vector_instructions_draws_the_same():
    """And MEGAGPT2_REFERENCE=1 does; processors that lack a set say so."""
    names = ("portable", "avx2", "avx512")
    environments = [{"MEGAGPT2_REFERENCE": "1"}, *({"MEGAGPT2_CPU": name} for name in (*names, "sse"))]
    with ThreadPoolExecutor() as processes:  # they mostly import torch
        expected, *each, refused = processes.map(drawn, environments)
    assert expected.returncode == 0, expected.stderr
    for name, found in zip(names, each, strict=True):
        if found.returncode and "which this processor has not" in found.stderr and name != "portable":
            continue
        assert found.returncode == 0, found.stderr
        assert found.stdout == expected.stdout, name
    assert "set it to portable, avx2 or avx512" in refused.stderr


@compiled
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"samples": torch.tensor([1])}, "1 samples: give one for each"),
        ({"samples": torch.tensor([1, 2], dtype=torch.int32)}, "int64"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "float32, bfloat16 and float16"),
        ({"x": torch.tensor(1.0)}, "give one for each"),
        ({"probability": 1.0}, "below 1"),
        ({"probability": math.nan}, "below 1"),
        ({"key0": -1}, "0, 2"),
        ({"key1": 2**32}, "0, 2"),
        ({"start": -1}, "elements have numbers"),
        ({"start": 2**63 - 2}, "elements have numbers"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes, complaint):
    arguments = {
        "x": torch.zeros(2, 3), "samples": torch.tensor([1, 2]), "key0": 1, "key1": 2, "probability": 0.1, "start": 0,
    }
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.megagpt2.dropout(**(arguments | changes))


def test_initial_weights_are_the_references(monkeypatch):
    found = random_normal(KEY, 3, 10_001)
    monkeypatch.setattr("megagpt2.kernels.philox.EXTENSION", Extension(False, "this test"))
    assert torch.equal(found, random_normal(KEY, 3, 10_001))


class TestWhichIsUsed:
    """extension.load with the module replaced: built, missing, broken, out of date."""

    def load(self, monkeypatch, tmp_path, module=None, error=None, **environment) -> Extension:
        def import_module(name):
            if error:
                raise error
            return module

        monkeypatch.setattr(extension.importlib, "import_module", import_module)
        return extension.load(environment, tmp_path)

    def built(self, tmp_path, cuda=""):
        return SimpleNamespace(SOURCES=f"s{extension.hash_of_sources(tmp_path)}", CUDA=cuda)

    def test_a_build_of_what_is_there(self, monkeypatch, tmp_path):
        found = self.load(monkeypatch, tmp_path, self.built(tmp_path))
        assert found.compiled and found.describe("cpu") == "C++"
        assert "without cuda" in found.describe("cuda")
        assert found.serves(torch.zeros(1)) and not found.serves(torch.zeros(1), torch.zeros(1, device="meta"))

    def test_a_build_for_gpus_says_which(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
        assert self.load(monkeypatch, tmp_path, self.built(tmp_path, "sm_90-compute_90")).describe("cuda") == "CUDA"
        found = self.load(monkeypatch, tmp_path, self.built(tmp_path, "sm_80-sm_90")).describe("cuda")
        assert "was built for sm_80 sm_90" in found

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (ModuleNotFoundError("No module named 'megagpt2._C'"), "not built: make setup"),
            (ImportError("undefined symbol: _ZN3c10"), "again with make setup: undefined symbol"),
        ],
        ids=["missing", "broken"],
    )
    def test_no_build(self, monkeypatch, tmp_path, error, reason):
        found = self.load(monkeypatch, tmp_path, error=error)
        assert not found.compiled and reason in found.describe("cpu")
        assert not found.serves(torch.zeros(1))

    def test_a_build_out_of_date(self, monkeypatch, tmp_path):
        (tmp_path / "philox").mkdir()
        source = tmp_path / "philox" / "philox.h"
        source.write_text("a")
        module = self.built(tmp_path)
        (tmp_path / "notes.txt").write_text("no source")
        assert self.load(monkeypatch, tmp_path, module).compiled
        source.write_text("b")
        assert "other sources" in self.load(monkeypatch, tmp_path, module).reason
        assert self.load(monkeypatch, tmp_path / "not there", self.built(tmp_path)).compiled  # installed, no sources

    def test_the_reference_can_be_asked_for(self, monkeypatch, tmp_path):
        module = self.built(tmp_path)
        assert self.load(monkeypatch, tmp_path, module, MEGAGPT2_REFERENCE="1").reason == "MEGAGPT2_REFERENCE=1"
        assert self.load(monkeypatch, tmp_path, module, MEGAGPT2_NO_EXT="1").reason == "MEGAGPT2_NO_EXT=1"
        assert self.load(monkeypatch, tmp_path, module, MEGAGPT2_REFERENCE="0").compiled


def test_setup_and_the_import_hash_alike(tmp_path):
    """setup.py stands alone (it runs before the package can), so both have the function."""
    namespace = runpy.run_path(str(extension.SOURCES.parent / "setup.py"))
    (tmp_path / "a").mkdir()
    for name in ("a/b.cpp", "a.h", "c.cu", "d.o"):
        (tmp_path / name).write_text(name)
    assert namespace["hash_of_sources"](tmp_path) == extension.hash_of_sources(tmp_path)


def keys(model) -> dict[tuple[str, int], int]:
    """How often each key occurs among a model's dropouts."""
    return Counter(module.key for module in model.modules() if isinstance(module, Dropout))


@pytest.mark.parametrize("builder", [DenseBuilder(5), TensorBuilder(5, Topology(tensor=2, rank=1), True)])
def test_every_layer_and_site_has_a_key_of_its_own(builder):
    """Three sites in a block and one at the embedding: none shares its masks with another, on any layout."""
    config = dropped(model_config(layers=3))
    sites = [(layer, site) for layer in range(3) for site in ("attention", "attention_residual", "mlp_residual")]
    expected = {key_of(5, "dropout", layer, site) for layer, site in [(0, "embedding"), *sites]}
    with torch.device("meta"):
        found = keys(GPT2(config, builder))
    assert len(expected) == 10 and set(found) == expected and set(found.values()) == {1}

"""Implementations to choose from: each name in the configuration reaches the code it names.

NVIDIA apex itself needs a GPU and a build of its own; stand-ins with its interface are here in its place.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from megagpt2.config import facts
from megagpt2.config.schema import OptimizerConfig
from megagpt2.kernels.choice import Kernels
from megagpt2.kernels.layer_norm import BACKENDS, layer_norm
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.layers import DenseBuilder, LayerNorm
from megagpt2.parallel.tensor import TensorBuilder
from megagpt2.parallel.topology import Topology
from megagpt2.training.optimizer import build_optimizer, set_updates
from tests.support.models import dense_model, model_config


class FusedAdam(torch.optim.Optimizer):
    """apex.optimizers.FusedAdam's arguments and where it counts its steps."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode


@pytest.fixture
def apex(monkeypatch):
    """Modules under apex's names."""
    names = ("apex", "apex.optimizers", "apex.normalization", "apex.normalization.fused_layer_norm")
    modules = {name: ModuleType(name) for name in names}
    modules["apex.optimizers"].FusedAdam = FusedAdam
    modules["apex.normalization.fused_layer_norm"].fused_layer_norm_affine = (
        lambda x, weight, bias, shape, eps: F.layer_norm(x, shape, weight, bias, eps)
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


CONFIG = OptimizerConfig(learning_rate=1e-3, beta1=0.8, beta2=0.9, epsilon=1e-6)


@pytest.mark.parametrize("name, fused", [("fused", True), ("torch", False)])
def test_torchs_adams(name, fused):
    optimizer = build_optimizer(dense_model(model_config()), CONFIG, name, Topology())
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is fused
    set_updates(optimizer, 7)  # they count in each parameter's state, which masters.py fills
    assert all("step" not in group for group in optimizer.param_groups)


def test_apexs_adam(apex):
    optimizer = build_optimizer(dense_model(model_config()), CONFIG, "apex", Topology())
    assert type(optimizer) is FusedAdam and optimizer.adam_w_mode
    defaults = {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-6}
    assert {key: optimizer.defaults[key] for key in defaults} == defaults
    set_updates(optimizer, 7)
    assert [group["step"] for group in optimizer.param_groups] == [7] * len(optimizer.param_groups)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_layer_norm_is_the_same(name, apex):
    x, weight, bias = torch.randn(4, 7), torch.randn(7), torch.randn(7)
    torch.testing.assert_close(BACKENDS[name](x, weight, bias, 1e-5), layer_norm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("make", [DenseBuilder, lambda seed, kernels: TensorBuilder(
    seed, Topology(tensor=2, rank=1), True, kernels)], ids=["dense", "sequence parallel"])
def test_a_model_uses_the_one_that_is_asked_for(name, make):
    with torch.device("meta"):
        model = GPT2(model_config(), make(0, kernels=Kernels(layer_norm=name)))
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    assert len(norms) == 5 and all(norm.normalize is BACKENDS[name] for norm in norms)


def test_whether_apex_is_there(monkeypatch, apex):
    """The package index's "apex" is another project: it can be found, its parts can't."""
    found = {
        "apex": True, "apex.normalization": True, "apex.optimizers": False, "fused_layer_norm_cuda": True,
        "amp_C": False,
    }
    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda name: found.get(name) or None)
    assert "another project" in facts.apex_problem()
    found["apex.optimizers"] = True
    assert "amp_C is missing" in facts.apex_problem()  # a build of its Python alone
    found["amp_C"] = True
    assert facts.apex_problem() is None
    found["apex"] = False
    assert "can't be imported" in facts.apex_problem()

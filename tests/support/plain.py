"""The same training in plain torch: no DeepSpeed, no ranks, nothing sharded, no operator of ours. What every layout is
compared with."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from megagpt2.data.batches import Batches
from megagpt2.data.order import Order
from megagpt2.kernels.choice import Kernels
from megagpt2.kernels.extension import Extension
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.initialize import initial_value
from megagpt2.model.layers import DenseBuilder
from megagpt2.model.parameters import Spec
from tests.support.train import corpus, small_config

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@patch.object(Extension, "serves", lambda *tensors, **types: False)
def train(changes: dict, steps: int) -> dict:
    """Losses, gradient norms and weights as tests.support.train.train gives them for a rank that holds everything.

    Mixed precision as usual: the network in bf16, fp32 masters and moments, gradients accumulated in fp32.
    """
    config = small_config(**changes)
    model = GPT2(config.model, DenseBuilder(config.training.seed, Kernels("reference", "torch")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(initial_value(parameter.spec, config.training.seed))
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(_DTYPE[config.training.precision])
    optimizer = _optimizer(config.optimizer, list(model.parameters()), masters)
    tokens, size = corpus(config.model.vocabulary), config.batch.global_batch
    order = Order(len(tokens), config.sequence_length, config.training.seed)
    batches = Batches(tokens, order, config.batch.micro_batch, 0, 1, config.model.vocabulary)
    answer = {"losses": [], "norms": [], "before": _weights(model), "place": (0, 0, 0)}
    for step in range(steps):
        loss, gradients = _gradients(model, list(batches.global_batch(step * size, size)))
        norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
        factor = min(1.0, config.optimizer.clip / (norm + 1e-6)) if config.optimizer.clip else 1.0
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient * factor
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True):
                parameter.copy_(master)
        answer["losses"].append(loss)
        answer["norms"].append(norm)
    answer["after"] = _weights(model)
    model.eval()
    with torch.no_grad():
        held_out = [float(model(t, s, y)) for t, y, s in batches.global_batch(0, size)]
    return answer | {"validation": sum(held_out) / len(held_out)}


def _optimizer(config, parameters: list, masters: list[Tensor]) -> torch.optim.Optimizer:
    decay = [master for parameter, master in zip(parameters, masters, strict=True) if parameter.spec.decay]
    rest = [master for parameter, master in zip(parameters, masters, strict=True) if not parameter.spec.decay]
    if config.name == "sgd":
        return torch.optim.SGD(masters, lr=config.learning_rate)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon)


def _gradients(model: GPT2, micro_batches: list) -> tuple[float, list[Tensor]]:
    """Mean loss, and its gradients in fp32."""
    sums = [torch.zeros(parameter.shape) for parameter in model.parameters()]
    total = 0.0
    for tokens, targets, samples in micro_batches:
        loss = model(tokens, samples, targets)
        total += loss.item()
        for accumulated, gradient in zip(sums, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            accumulated += gradient.float() / len(micro_batches)
    return total / len(micro_batches), sums


def _weights(model: GPT2) -> dict[str, tuple[Spec, np.ndarray]]:
    return {p.spec.name: (p.spec, p.detach().float().numpy().copy()) for p in model.parameters()}

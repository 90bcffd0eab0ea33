"""Small models in one process, with their initial weights, and checkpoints of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megagpt2.checkpoint.save import Ranks, save_checkpoint
from megagpt2.checkpoint.shards import Slices
from megagpt2.checkpoint.snapshot import Snapshot, TrainingState, contribution
from megagpt2.config.schema import ModelConfig
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.initialize import initial_value
from megagpt2.model.layers import DenseBuilder
from megagpt2.model.parameters import Extent
from megagpt2.parallel.topology import Topology


def model_config(**changes) -> ModelConfig:
    """2 layers, 3 heads of 8, a vocabulary that needs padding, no dropout; weights large enough to matter."""
    fields = {"layers": 2, "width": 24, "heads": 3, "vocabulary": 301, "context": 16, "initial_std": 0.2}
    return ModelConfig.model_validate(fields | changes)


def dropped(config: ModelConfig, probability: float = 0.1) -> ModelConfig:
    """The same model with dropout everywhere."""
    sites = ("embedding_dropout", "attention_dropout", "residual_dropout")
    return config.model_copy(update=dict.fromkeys(sites, probability))


@torch.no_grad()
def dense_model(config: ModelConfig, recompute: str = "none", seed: int = 5) -> GPT2:
    """The whole model, initialized; biases and norms are moved off their constants, so that they take part."""
    model = GPT2(config, DenseBuilder(seed), recompute)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(initial_value(parameter.spec, seed))
        if parameter.spec.standard_deviation is None:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def random_tokens(config: ModelConfig, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, targets [batch, context], samples [batch]."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(config.vocabulary, (batch, config.context + 1), generator=generator)
    return whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), torch.arange(batch) + 100


def gradients(model: GPT2, tokens: Tensor, targets: Tensor, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and every parameter's gradient by its name in a checkpoint."""
    model.zero_grad()
    loss = model(tokens, samples, targets)
    loss.backward()
    return loss.detach(), {parameter.spec.name: parameter.grad.clone() for parameter in model.parameters()}


def save_model(model: GPT2, config: ModelConfig, checkpoints: Path, step: int = 1) -> Path:
    """A checkpoint of a model that has not been trained, by one process: no moments, weights as they are."""
    dtype = next(model.parameters()).dtype
    extents = [Extent.whole(parameter.spec) for parameter in model.parameters()]
    values = [parameter.detach().flatten() for parameter in model.parameters()]
    state = TrainingState(step=step, samples_seen=8 * step, updates=step)
    snapshot = Snapshot(extents, values, Slices(), state, config, dtype)
    return save_checkpoint(checkpoints, contribution(snapshot, Topology()), Ranks(Topology()))

"""The optimizer that DeepSpeed partitions: torch's own, so that nothing is compiled and resuming is bitwise."""

from __future__ import annotations

import torch
from torch import nn

from megagpt2.config.schema import OptimizerConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Decayed and not decayed parameters (biases and norms). A pipeline stage may lack one kind: no empty groups."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.spec.decay]
    plain = [p for p in parameters if not p.spec.decay]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or plain SGD, whose steps are gradients."""
    groups = parameter_groups(module, config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )

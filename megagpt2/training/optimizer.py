"""The optimizer that DeepSpeed partitions: torch's own, so that nothing is compiled and resuming is bitwise.

ZeRO flattens each parameter group and updates stretches of it, and a vectorized loop rounds the last elements of a
stretch differently (no fused multiply-add there). What several ranks hold alike must therefore lie in buffers of equal
length with equal cuts, or replicas drift apart by single bits. So there are up to five groups:

    tied embedding (on two stages)        decayed | sharded     decayed | replicated
                                          plain   | sharded     plain   | replicated

sharded parameters' sizes differ between ranks where heads don't divide; replicated ones' and the tied pair's don't.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from megagpt2.config.schema import OptimizerConfig
from megagpt2.model.parameters import Spec, specified
from megagpt2.parallel.topology import Topology

_TIED, _DECAY, _SHARDED = 4, 2, 1


def _kind(spec: Spec) -> int:
    return _TIED * spec.tied + _DECAY * spec.decay + _SHARDED * spec.sharded


def _kinds_of_all_stages(module: nn.Module, topology: Topology) -> list[int]:
    """The groups that any stage of the pipeline has, in one order for all."""
    device = next(module.parameters()).device
    present = torch.zeros(8, dtype=torch.int32, device=device)
    for parameter in specified(module):
        present[_kind(parameter.spec)] = 1
    if topology.pipeline > 1:
        dist.all_reduce(present, op=dist.ReduceOp.MAX, group=topology.model_group)
    return [kind for kind in reversed(range(8)) if present[kind]]


def parameter_groups(module: nn.Module, weight_decay: float, topology: Topology) -> list[dict]:
    """The groups of this rank's parameters.

    DeepSpeed reduces a norm per group over all stages: they must have the same groups. A stage that lacks one gets a
    placeholder, a parameter without spec that never has a gradient.
    """
    groups: dict[int, list[nn.Parameter]] = {kind: [] for kind in _kinds_of_all_stages(module, topology)}
    for parameter in specified(module):
        groups[_kind(parameter.spec)].append(parameter)
    like = next(specified(module))
    for kind, parameters in groups.items():
        if not parameters:
            placeholder = nn.Parameter(torch.zeros(4 * topology.data, dtype=like.dtype, device=like.device))
            placeholder.model_parallel = bool(kind & _SHARDED)
            module.register_parameter(f"placeholder_{kind}", placeholder)
            parameters.append(placeholder)
    return [
        {"params": parameters, "weight_decay": weight_decay if kind & _DECAY else 0.0}
        for kind, parameters in groups.items()
    ]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, adam: str, topology: Topology
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) by the implementation named `adam` (kernels.adam in the configuration), or
    plain SGD, whose steps are gradients."""
    groups = parameter_groups(module, config.weight_decay, topology)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
    if adam == "apex":
        from apex.optimizers import FusedAdam  # optional

        return FusedAdam(groups, adam_w_mode=True, **options)
    return torch.optim.AdamW(groups, fused=adam == "fused", **options)


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Tell an optimizer that counts in its groups, as apex's does, how many updates were made. torch's counts in the
    state of each parameter."""
    if not isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = updates

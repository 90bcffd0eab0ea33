"""The fp32 masters and Adam's moments by parameter name, wherever DeepSpeed's ZeRO put them.

ZeRO flattens parameters and hands each data-parallel rank a stretch of them. A Fragment is what one rank holds of
one parameter: elements start .. stop - 1 of its flattened local tensor (the tensor-parallel shard), and views
of the master and the moments there. Writing through the views changes the training state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagpt2.model.parameters import Spec, specified
from megagpt2.parallel.quiet_deepspeed import deepspeed
from megagpt2.parallel.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
Values = Callable[[Spec], Tensor]  # the local part of a parameter's fp32 value


@dataclass(frozen=True)
class Fragment:
    """One rank's piece of one parameter's training state."""

    spec: Spec
    start: int
    tensors: dict[str, Tensor]  # "master", and the moments where the optimizer has them; fp32 [stop - start]

    @property
    def stop(self) -> int:
        return self.start + self.tensors["master"].numel()


def _is_stage_3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def _stage_3_fragment(engine, parameter: nn.Parameter, replica: int) -> Fragment | None:
    """ZeRO-3 cuts every parameter by itself into equal stretches, the last one padded."""
    zero = engine.optimizer
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    start = replica * parameter.ds_tensor.ds_numel
    count = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)
    if count <= 0:
        return None
    flat = zero.fp32_partitioned_groups_flat[group]
    tensors = {"master": flat.detach().narrow(0, offset, count)}
    state = zero.optimizer.state.get(flat, {})
    tensors |= {key: state[key].narrow(0, offset, count) for key in MOMENTS if key in state}
    return Fragment(parameter.spec, start, tensors)


def _flat_fragment(parameter: nn.Parameter) -> Fragment | None:
    """ZeRO-1, ZeRO-2 and BF16_Optimizer cut the concatenation of a group's parameters."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    tensors = {"master": mapping.hp_fragment.detach()}
    tensors |= {key: value for key, value in (mapping.optim_fragment or {}).items() if key in MOMENTS}
    return Fragment(parameter.spec, mapping.lp_fragment_address.start, tensors)


def fragments(engine, topology: Topology) -> Iterator[Fragment]:
    """This rank's pieces, in the module's order."""
    for parameter in specified(engine.module):
        fragment = (
            _stage_3_fragment(engine, parameter, topology.replica)
            if _is_stage_3(parameter)
            else _flat_fragment(parameter)
        )
        if fragment is not None:
            yield fragment


def base_optimizer(engine) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's."""
    return engine.optimizer.optimizer


def _flat_partitions(engine) -> list[Tensor]:
    """The tensors that torch's optimizer updates: flat fp32 stretches."""
    zero = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        if hasattr(zero, name):
            return getattr(zero, name)
    raise RuntimeError(f"{type(zero).__name__} has none of DeepSpeed 0.19's fp32 partitions")


def create_moments(engine, step: int) -> None:
    """Make Adam's state before the first step, so that it can be filled. `step`: updates made so far."""
    optimizer = base_optimizer(engine)
    for flat in _flat_partitions(engine):
        optimizer.state[flat] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=flat.device),
            **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS},
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def set_values(engine, topology: Topology, values: Values) -> None:
    """Set every parameter and its master. Masters keep fp32 where the parameter is rounded to bf16 or fp16."""
    for parameter in specified(engine.module):
        value = values(parameter.spec)
        if _is_stage_3(parameter):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # counted in the data-parallel group
                parameter.data.copy_(value)
            fragment = _stage_3_fragment(engine, parameter, topology.replica)
        else:
            parameter.data.copy_(value)
            fragment = _flat_fragment(parameter)
        if fragment is not None:
            fragment.tensors["master"].copy_(value.flatten()[fragment.start : fragment.stop])


@torch.no_grad()
def local_weights(engine) -> Iterator[tuple[Spec, Tensor]]:
    """This rank's part of every weight as it is computed with; ZeRO-3 gathers each one, on all ranks together."""
    for parameter in specified(engine.module):
        with deepspeed.zero.GatheredParameters([parameter], enabled=_is_stage_3(parameter)):
            yield parameter.spec, parameter.detach()

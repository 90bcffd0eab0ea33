"""The fp32 masters and Adam's moments by parameter name, wherever DeepSpeed's ZeRO put them.

ZeRO flattens parameters and hands each data-parallel rank a stretch of them. A Fragment is what one rank holds of
one parameter: elements start .. stop - 1 of its flattened local tensor (the tensor-parallel shard), and views
of the master and the moments there. Writing through the views changes the training state.

State on NVMe is in memory one sub-group at a time, while it is looked at or filled: a fragment's tensors hold only
until the next fragment is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megagpt2.model.parameters import Extent, specified
from megagpt2.parallel.quiet_deepspeed import deepspeed
from megagpt2.parallel.topology import Topology
from megagpt2.training.optimizer import set_updates

MOMENTS = ("exp_avg", "exp_avg_sq")


class Source(Protocol):
    """What training state is filled with: a checkpoint, or initial values."""

    def weight(self, extent: Extent, dtype: torch.dtype) -> Tensor:
        """As computed with, [elements]: the master, rounded to dtype."""

    def state_of(self, kind: str, extent: Extent) -> Tensor:
        """"master" or one of MOMENTS, fp32 [elements]."""


@dataclass(frozen=True)
class Fragment(Extent):
    """One rank's piece of one parameter's training state."""

    tensors: dict[str, Tensor]  # "master", and the moments where the optimizer has them; fp32 [stop - start]


def _is_stage_3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def _stage_3(engine) -> bool:
    return any(_is_stage_3(parameter) for parameter in specified(engine.module))


def _is_file(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps the parameter's stretch on NVMe."""
    return parameter.ds_tensor.final_location == "nvme"


def _stage_3_extent(parameter: nn.Parameter, replica: int) -> Extent | None:
    """ZeRO-3 cuts every parameter by itself into equal stretches, the last one padded."""
    start = replica * parameter.ds_tensor.ds_numel
    stop = min(start + parameter.ds_tensor.ds_numel, parameter.ds_numel)
    return Extent(parameter.spec, start, stop) if start < stop else None


def _stage_3_fragment(zero, parameter: nn.Parameter, replica: int) -> Fragment | None:
    extent = _stage_3_extent(parameter, replica)
    if extent is None:
        return None
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    count = extent.stop - extent.start
    flat = zero.fp32_partitioned_groups_flat[group]
    tensors = {"master": flat.detach().narrow(0, offset, count)}
    state = zero.optimizer.state.get(flat, {})
    tensors |= {key: state[key].narrow(0, offset, count) for key in MOMENTS if key in state}
    return Fragment(parameter.spec, extent.start, extent.stop, tensors)


def _flat_fragment(parameter: nn.Parameter) -> Fragment | None:
    """ZeRO-1, ZeRO-2 and BF16_Optimizer cut the concatenation of a group's parameters."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    tensors = {"master": mapping.hp_fragment.detach()}
    tensors |= {key: value for key, value in (mapping.optim_fragment or {}).items() if key in MOMENTS}
    start = mapping.lp_fragment_address.start
    return Fragment(parameter.spec, start, start + tensors["master"].numel(), tensors)


@contextlib.contextmanager
def _in_memory(zero, group: int, changed: bool) -> Iterator[None]:
    """Have one of ZeRO-3's sub-groups in memory, and write it back where it is changed."""
    if not zero._swappable_optimizer_subgroup(group):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        if changed:
            zero._optimizer_states_and_gradient_swap_out(group)
        else:
            zero._release_swap_buffers(group)


def fragments(engine, topology: Topology) -> Iterator[Fragment]:
    """This rank's pieces, in the order of `extents`; the tensors of each hold until the next is asked for."""
    if not _stage_3(engine):
        yield from filter(None, map(_flat_fragment, specified(engine.module)))
        return
    zero = engine.optimizer
    for group, parameters in enumerate(zero.fp16_groups):
        with _in_memory(zero, group, changed=False):
            for parameter in parameters:
                fragment = _stage_3_fragment(zero, parameter, topology.replica)
                if fragment is not None:
                    yield fragment


def extents(engine, topology: Topology) -> list[Extent]:
    """Which pieces this rank has, without a look at them."""
    if not _stage_3(engine):
        return [Extent(f.spec, f.start, f.stop) for f in fragments(engine, topology)]
    parameters = (parameter for group in engine.optimizer.fp16_groups for parameter in group)
    return list(filter(None, (_stage_3_extent(parameter, topology.replica) for parameter in parameters)))


def base_optimizer(engine) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's."""
    return engine.optimizer.optimizer


def _flat_partitions(engine) -> list[Tensor]:
    """The tensors that torch's optimizer updates below stage 3: flat fp32 stretches."""
    zero = engine.optimizer
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        if hasattr(zero, name):
            return getattr(zero, name)
    raise RuntimeError(f"{type(zero).__name__} has none of DeepSpeed 0.19's fp32 partitions")


def _create_moments(optimizer: torch.optim.Optimizer, flat: Tensor, updates: int) -> None:
    """Make Adam's state before the first step, so that it can be filled; what is there already is reset in place, for
    DeepSpeed's swapping remembers the tensors themselves."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device=flat.device)
        state.update({key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS})
    state["step"].fill_(float(updates))
    set_updates(optimizer, updates)
    for key in MOMENTS:
        state[key].zero_()


def _fill(fragment: Fragment | None, source: Source, kinds: Iterable[str]) -> None:
    if fragment is not None:
        for kind in kinds:
            fragment.tensors[kind].copy_(source.state_of(kind, fragment))


def _whole(parameter: nn.Parameter, source: Source) -> Tensor:
    extent = Extent.whole(parameter.spec)
    return source.weight(extent, parameter.dtype).view(parameter.spec.local_shape)


@torch.no_grad()
def set_values(engine, topology: Topology, source: Source, updates: int | None = None) -> None:
    """Set every parameter, its master and, where the optimizer has moments, those.

    updates: how many updates those moments have seen; None where there are none. Each rank asks for what it holds;
    memory beside the state itself is one such piece at a time.
    """
    if _stage_3(engine):
        _set_stage_3(engine, topology, source, updates)
        return
    for parameter in specified(engine.module):
        parameter.data.copy_(_whole(parameter, source))
        _fill(_flat_fragment(parameter), source, ["master"])
    if updates is None:
        return
    for flat in _flat_partitions(engine):
        _create_moments(base_optimizer(engine), flat, updates)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for fragment in fragments(engine, topology):
        _fill(fragment, source, MOMENTS)


def _set_stage_3(engine, topology: Topology, source: Source, updates: int | None) -> None:
    """One sub-group after the other, so that each is read and written once."""
    zero = engine.optimizer
    kinds = ("master",) if updates is None else ("master", *MOMENTS)
    for group, parameters in enumerate(zero.fp16_groups):
        with _in_memory(zero, group, changed=True):
            if updates is not None:
                _create_moments(zero.optimizer, zero.fp32_partitioned_groups_flat[group], updates)
            for parameter in parameters:
                _set_stage_3_weight(parameter, topology.replica, source)
                _fill(_stage_3_fragment(zero, parameter, topology.replica), source, kinds)


def _set_stage_3_weight(parameter: nn.Parameter, replica: int, source: Source) -> None:
    """A rank's stretch of a parameter: nobody needs the whole, but for those that are gathered at the moment and those
    whose stretches are files."""
    partition = parameter.ds_tensor
    if _is_file(parameter):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # counted in the group
            parameter.data.copy_(_whole(parameter, source))
        return
    extent = _stage_3_extent(parameter, replica)
    if extent is not None:
        piece = source.weight(extent, partition.dtype)
        partition.data.narrow(0, 0, extent.elements).copy_(piece)
    if parameter.ds_status == deepspeed.zero.ZeroParamStatus.AVAILABLE:
        parameter.data.copy_(_whole(parameter, source))


def weight_extents(engine, topology: Topology) -> list[Extent]:
    """Which elements of every weight this rank holds, in the order of the parameters: its part, or ZeRO-3's stretch of
    it, which may be empty."""
    return [
        _stage_3_extent(parameter, topology.replica) or Extent(parameter.spec, 0, 0)
        if _is_stage_3(parameter) else Extent.whole(parameter.spec)
        for parameter in specified(engine.module)
    ]


@torch.no_grad()
def weight_stretches(engine, topology: Topology) -> Iterator[Tensor]:
    """Those elements, one-dimensional, as computed with. Of weights that are files each holds until the next is asked
    for, by all ranks together."""
    for parameter, extent in zip(specified(engine.module), weight_extents(engine, topology), strict=True):
        if not _is_stage_3(parameter):
            yield parameter.detach().flatten()
        elif _is_file(parameter):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield parameter.detach().flatten()[extent.start : extent.stop]
        else:
            yield parameter.ds_tensor.detach().narrow(0, 0, extent.elements)

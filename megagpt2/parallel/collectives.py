"""The collectives of tensor and sequence parallelism, each with the collective that is its gradient.

Shoeybi et al. 2019 (Megatron-LM, section 3) call copy_to_shards f and sum_over_shards g; Korthikanti et al. 2022
(section 4.2) split the residual stream along the sequence and replace them by gather and scatter:

    forward            backward
    copy               all-reduce        copy_to_shards
    all-reduce         copy              sum_over_shards
    all-gather         reduce-scatter    gather_sequence
    reduce-scatter     all-gather        scatter_sum
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed these; older ones, which we support, have only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: ProcessGroup, op=dist.ReduceOp.SUM) -> Tensor:
    """A reduced copy of x. torch's reduction is in place; autograd may still need x."""
    if group.size() == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=op, group=group)
    return x


def all_gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[batch, sequence / n, ...] of each of n ranks -> [batch, sequence, ...]."""
    n = group.size()
    if n == 1:
        return x
    out = x.new_empty((n, *x.shape))
    _all_gather(out.view(n * x.shape[0], *x.shape[1:]), x.contiguous(), group=group)
    return out.transpose(0, 1).reshape(x.shape[0], n * x.shape[1], *x.shape[2:])


def reduce_scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over n ranks of [batch, sequence, ...], of which each keeps its [batch, sequence / n, ...]."""
    n = group.size()
    if n == 1:
        return x
    batch, sequence, *rest = x.shape
    pieces = x.view(batch, n, sequence // n, *rest).transpose(0, 1).contiguous()  # [n, batch, sequence / n, ...]
    out = x.new_empty((batch, sequence // n, *rest))
    _reduce_scatter(out, pieces.view(n * batch, sequence // n, *rest), group=group)
    return out


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather_sequence(x, group)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter_sequence(grad, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return reduce_scatter_sequence(x, group)

    @staticmethod
    def backward(ctx, grad):
        return all_gather_sequence(grad, ctx.group), None


def copy_to_shards(x: Tensor, group: ProcessGroup) -> Tensor:
    """x as it is, for computations that differ between ranks; their gradients are summed."""
    return _CopyToShards.apply(x, group) if group.size() > 1 else x


def sum_over_shards(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' partial results, on every rank."""
    return _SumOverShards.apply(x, group) if group.size() > 1 else x


def gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """The whole sequence from the ranks' pieces of it [batch, sequence / n, width]."""
    return _GatherSequence.apply(x, group) if group.size() > 1 else x


def scatter_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' partial results [batch, sequence, width], each rank keeping its piece of the sequence."""
    return _ScatterSum.apply(x, group) if group.size() > 1 else x


class _GatheredLinear(torch.autograd.Function):
    """gather_sequence followed by a linear layer, keeping only the piece for the backward pass and gathering again
    (Korthikanti et al. 2022, section 4.2.2: else sequence parallelism would not save this memory)."""

    @staticmethod
    def forward(ctx, x, weight, bias, group):
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.has_bias = group, bias is not None
        return torch.nn.functional.linear(all_gather_sequence(x, group), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        whole = all_gather_sequence(x, ctx.group).flatten(0, 1)  # [batch * sequence, in]
        d_x = reduce_scatter_sequence(grad @ weight, ctx.group)
        flat = grad.flatten(0, 1)  # [batch * sequence, out]
        return d_x, flat.T @ whole, flat.sum(0) if ctx.has_bias else None, None


def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> Tensor:
    """linear(gather_sequence(x)), saving only x for the backward pass."""
    return _GatheredLinear.apply(x, weight, bias, group)

"""The sharded builder: tensor parallelism (Shoeybi et al. 2019) and sequence parallelism (Korthikanti et al. 2022).

                     residual stream          between column and row      residual stream
    tensor           [b, s, w] on all   ->    [b, s, share of units]  ->  [b, s, w] on all
    + sequence       [b, s/n, w]        ->    [b, s, share of units]  ->  [b, s/n, w]

Units (heads, feed-forward channels) need not divide by the number of ranks, see `partition`; words are padded.
Parameters used on a piece of the sequence (norms, positions, row biases) pass through copy_to_shards, whose
gradient is the sum over the pieces: they stay equal on all ranks, under every ZeRO stage, with no hook.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagpt2.kernels import cross_entropy
from megagpt2.kernels.choice import DEFAULT, Kernels
from megagpt2.kernels.philox import key_of
from megagpt2.model.layers import Builder, DenseBuilder, Dropout, LayerNorm, Linear, PositionEmbedding, TiedEmbedding
from megagpt2.model.parameters import Spec, partition
from megagpt2.parallel.collectives import (
    all_reduce,
    copy_to_shards,
    gather_sequence,
    gathered_linear,
    scatter_sum,
    sum_over_shards,
)
from megagpt2.parallel.topology import Topology


class ColumnLinear(Linear):
    """y_r = x W_r^T + b_r: each rank computes its share of the outputs from the whole input."""

    def __init__(self, weight: Spec, bias: Spec, topology: Topology, sequence_parallel: bool) -> None:
        super().__init__(weight, bias)
        self.group, self.sequence_parallel = topology.tensor_group, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gathered_linear(x, self.weight, self.bias, self.group)
        return F.linear(copy_to_shards(x, self.group), self.weight, self.bias)


class RowLinear(Linear):
    """x = sum_r y_r W_r^T + b: each rank computes a partial sum from its share of the inputs."""

    def __init__(self, weight: Spec, bias: Spec, topology: Topology, sequence_parallel: bool) -> None:
        super().__init__(weight, bias)
        self.group, self.sequence_parallel = topology.tensor_group, sequence_parallel

    def forward(self, y: Tensor) -> Tensor:
        partial = F.linear(y, self.weight)
        if self.sequence_parallel:
            return scatter_sum(partial, self.group) + copy_to_shards(self.bias, self.group)
        return sum_over_shards(partial, self.group) + self.bias


class PieceLayerNorm(LayerNorm):
    """Layer norm of a piece of the sequence."""

    def __init__(self, name: str, width: int, epsilon: float, backend: str, topology: Topology) -> None:
        super().__init__(name, width, epsilon, backend)
        self.group = topology.tensor_group

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = copy_to_shards(self.weight, self.group), copy_to_shards(self.bias, self.group)
        return self.normalize(x, weight, bias, self.epsilon)


class PiecePositionEmbedding(PositionEmbedding):
    """Positions of a piece of the sequence."""

    def __init__(self, name: str, context: int, width: int, std: float, topology: Topology) -> None:
        super().__init__(name, context, width, std)
        self.topology = topology

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        first += self.topology.shard * x.shape[1]
        weight = copy_to_shards(self.weight, self.topology.tensor_group)
        return x + weight[first : first + x.shape[1]]


class VocabularyParallelEmbedding(TiedEmbedding):
    """Each rank holds some words' rows: it looks up its own, and computes its own words' logits."""

    def __init__(self, weight: Spec, first: int, rows: int, topology: Topology, sequence_parallel: bool) -> None:
        super().__init__(weight, first, rows)
        self.group, self.sequence_parallel = topology.tensor_group, sequence_parallel

    def embed(self, tokens: Tensor) -> Tensor:
        local = tokens - self.first
        mine = (local >= 0) & (local < self.rows)
        partial = F.embedding(local.clamp(0, max(self.rows - 1, 0)), self.weight) * mine[..., None]
        return scatter_sum(partial, self.group) if self.sequence_parallel else sum_over_shards(partial, self.group)

    def whole_hidden(self, hidden: Tensor) -> Tensor:
        return (gather_sequence if self.sequence_parallel else copy_to_shards)(hidden, self.group)

    def loss(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy.head_cross_entropy(
            self.whole_hidden(hidden).flatten(0, -2), weight, targets.flatten(), self.first, self.rows,
            maximum=lambda x: all_reduce(x, self.group, dist.ReduceOp.MAX),
            total=lambda x: all_reduce(x, self.group),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """All words' logits, on every rank: for sampling, never for the loss."""
        local = F.linear(self.whole_hidden(hidden), self.weight).contiguous()  # [..., rows], padding included
        pieces = [torch.empty_like(local) for _ in range(self.group.size())]
        dist.all_gather(pieces, local, group=self.group)
        return torch.cat(pieces, dim=-1)[..., : self.weight.spec.shape[0]]


class ShardedDropout(Dropout):
    """Draws this rank's slice of the one mask: its heads, or its piece of the sequence."""

    def __init__(self, probability: float, key: tuple[int, int], rank: int, first_head: int | None) -> None:
        super().__init__(probability, key)
        self.rank, self.first_head = rank, first_head

    def start(self, x: Tensor) -> int:
        if self.first_head is not None:  # [batch, heads, query, key]
            return self.first_head * x[0, 0].numel()
        return self.rank * x[0].numel()  # [batch, sequence / n, width]


class TensorBuilder(DenseBuilder):
    """Layers whose weights are cut over the topology's tensor-parallel group."""

    def __init__(
        self, seed: int, topology: Topology, sequence_parallel: bool, kernels: Kernels = DEFAULT
    ) -> None:
        super().__init__(seed, kernels)
        self.topology, self.sequence_parallel = topology, sequence_parallel

    def share(self, units: int) -> tuple[int, int]:
        return partition(units, self.topology.tensor, self.topology.shard)

    def column_linear(self, name, width_in, *, parts, units, unit, std):
        start, stop = self.share(units)
        out = parts * units * unit
        ranges = tuple(((part * units + start) * unit, (part * units + stop) * unit) for part in range(parts))
        weight = Spec(
            f"{name}.weight", (out, width_in), standard_deviation=std, decay=True, dim=0, ranges=ranges
        )
        bias = Spec(f"{name}.bias", (out,), dim=0, ranges=ranges)
        return ColumnLinear(weight, bias, self.topology, self.sequence_parallel)

    def row_linear(self, name, width_out, *, units, unit, std):
        start, stop = self.share(units)
        weight = Spec(
            f"{name}.weight", (width_out, units * unit), standard_deviation=std, decay=True, dim=1,
            ranges=((start * unit, stop * unit),),
        )
        return RowLinear(weight, Spec(f"{name}.bias", (width_out,)), self.topology, self.sequence_parallel)

    def layer_norm(self, name, width, epsilon):
        if self.sequence_parallel:
            return PieceLayerNorm(name, width, epsilon, self.kernels.layer_norm, self.topology)
        return super().layer_norm(name, width, epsilon)

    def position_embedding(self, name, context, width, std):
        if self.sequence_parallel:
            return PiecePositionEmbedding(name, context, width, std, self.topology)
        return super().position_embedding(name, context, width, std)

    def tied_embedding(self, name, vocabulary, padded, width, std):
        # As many rows on every rank, the last ones padded further: the loss cuts its chunks by them, in step.
        rows = -(-padded // self.topology.tensor)
        first, last = (min(shard * rows, vocabulary) for shard in (self.topology.shard, self.topology.shard + 1))
        spec = Spec(
            f"{name}.weight", (vocabulary, width), standard_deviation=std, decay=True, tied=True, dim=0,
            ranges=((first, last),), padding=rows - (last - first),
        )
        return VocabularyParallelEmbedding(spec, first, last - first, self.topology, self.sequence_parallel)

    def dropout(self, probability, layer, site, heads=None):
        key = key_of(self.seed, "dropout", layer, site)
        if heads is not None:
            return ShardedDropout(probability, key, 0, first_head=self.share(heads)[0])
        return ShardedDropout(probability, key, self.topology.shard if self.sequence_parallel else 0, None)


def builder_for(
    seed: int, topology: Topology, sequence_parallel: bool, kernels: Kernels = DEFAULT
) -> Builder:
    """The dense builder for one shard, the sharded one otherwise."""
    if topology.tensor == 1:
        return DenseBuilder(seed, kernels)
    return TensorBuilder(seed, topology, sequence_parallel, kernels)


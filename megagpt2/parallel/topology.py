"""Which rank holds which part: the grid of ranks and its process groups, passed as an argument, never global.

    rank = (stage * data + replica) * tensor + shard

so the ranks of a tensor-parallel group are neighbours (they talk most, within a node), and this is the order
of DeepSpeed's PipeModelDataParallelTopology. TP2 x PP2 x DP2:

                 stage 0              stage 1
    replica 0    ranks 0 1            ranks 4 5       shards of one layer side by side
    replica 1    ranks 2 3            ranks 6 7       ZeRO's groups: 0 2, 1 3, 4 6, 5 7
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Topology:
    """The grid's sizes, this process's place in it, and the groups it talks in (None in a group of one)."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    rank: int = 0
    tensor_group: ProcessGroup | None = None
    pipeline_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    model_group: ProcessGroup | None = None  # all shards of all stages of one replica

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def shard(self) -> int:
        return self.rank % self.tensor

    @property
    def replica(self) -> int:
        return self.rank // self.tensor % self.data

    @property
    def stage(self) -> int:
        return self.rank // (self.tensor * self.data)

    @property
    def first_stage(self) -> bool:
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        return self.stage == self.pipeline - 1

    def place_of(self, rank: int) -> Topology:
        """The same grid seen from another rank, without groups."""
        return Topology(self.tensor, self.pipeline, self.data, rank)

    def rank_at(self, stage: int, replica: int, shard: int) -> int:
        return (stage * self.data + replica) * self.tensor + shard

    def tensor_ranks(self, stage: int, replica: int) -> list[int]:
        return [self.rank_at(stage, replica, shard) for shard in range(self.tensor)]

    def pipeline_ranks(self, replica: int, shard: int) -> list[int]:
        return [self.rank_at(stage, replica, shard) for stage in range(self.pipeline)]

    def data_ranks(self, stage: int, shard: int) -> list[int]:
        return [self.rank_at(stage, replica, shard) for replica in range(self.data)]

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"

    def close(self) -> None:
        """Give the process groups back (tests build many topologies in one process)."""
        groups = {self.tensor_group, self.pipeline_group, self.data_group, self.model_group} - {None}
        for group in groups:
            dist.destroy_process_group(group)


def _members(topology: Topology) -> Iterator[tuple[str, list[list[int]]]]:
    stages, replicas, shards = range(topology.pipeline), range(topology.data), range(topology.tensor)
    yield "tensor_group", [topology.tensor_ranks(s, r) for s in stages for r in replicas]
    yield "pipeline_group", [topology.pipeline_ranks(r, t) for r in replicas for t in shards]
    yield "data_group", [topology.data_ranks(s, t) for s in stages for t in shards]
    yield "model_group", [[topology.rank_at(s, r, t) for s in stages for t in shards] for r in replicas]


def build_topology(
    tensor: int, pipeline: int, new_group: Callable[[list[int]], ProcessGroup] | None = None
) -> Topology:
    """The topology of the initialized process group; data parallelism takes the ranks that are left.

    Every rank creates every group, in the same order, as torch.distributed demands.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % (tensor * pipeline):
        raise ValueError(
            f"{world} ranks can't be cut into tensor_parallel {tensor} x pipeline_parallel {pipeline}"
            f" = {tensor * pipeline}: start a multiple of {tensor * pipeline}"
        )
    grid = Topology(tensor, pipeline, world // (tensor * pipeline), rank)
    new_group = new_group or dist.new_group
    groups = {}
    for name, lists in _members(grid):
        for ranks in lists:
            group = new_group(ranks)
            if rank in ranks:
                groups[name] = group
    return Topology(tensor, pipeline, grid.data, rank, **groups)


class ModelParallelUnit:
    """A topology under the names that DeepSpeed's plain engine asks for ("mpu")."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def get_model_parallel_rank(self) -> int:
        return self.topology.shard

    def get_model_parallel_world_size(self) -> int:
        return self.topology.tensor

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.topology.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.topology.replica

    def get_data_parallel_world_size(self) -> int:
        return self.topology.data

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.topology.data_group

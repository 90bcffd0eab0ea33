"""Do replicas still hold the same bits (invariant I5)? Parameters are held alike

    by the data-parallel ranks                          below ZeRO-3, which cuts them
    by the tensor-parallel ranks                        what is not sharded: norms, biases added after a sum, positions
    by the first and the last pipeline stage            the tied embedding

and drift apart by hardware faults, by kernels that are not deterministic, or by a mistake in a reduction. Nothing in
training would tell: each rank goes on with its own numbers, and the loss is only a little worse.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt2.model.parameters import specified
from megagpt2.parallel.messages import gather_texts
from megagpt2.parallel.topology import Topology

_COLUMNS = 1024
_PIECE = 4096 * _COLUMNS
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class ReplicasDiffer(RuntimeError):  # noqa: N818 - it says what is the case
    """Copies of a parameter have different bits; `differences` names them."""

    def __init__(self, differences: list[Difference]) -> None:
        self.differences = differences
        shown = "\n".join(f"  {difference}" for difference in differences[:8])
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        super().__init__(
            f"parameters that ranks hold alike have different bits:\n{shown}{more}\nThis state was not saved. Look at"
            " the ranks that stand alone (their device's memory, their log), and resume from the newest checkpoint: its"
            " replicas were compared before it was written"
        )


@dataclass(frozen=True, order=True)
class Difference:
    """ranks: those whose bits differ from those of most holders; all holders where no majority is."""

    parameter: str
    ranks: tuple[int, ...]
    holders: tuple[int, ...]

    def __str__(self) -> str:
        if self.ranks == self.holders:
            return f"{self.parameter}: ranks {_listed(self.holders)} differ among each other"
        others = [rank for rank in self.holders if rank not in self.ranks]
        plural = "s" * (len(self.ranks) > 1)
        return f"{self.parameter}: rank{plural} {_listed(self.ranks)} against {_listed(others)}"


def _listed(ranks) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def checksum(tensor: Tensor) -> Tensor:
    """Two int64 that any changed bit changes, the same in every order of summation: sums of the elements' bits,
    weighted by their row and by their column in rows of 1024."""
    words = tensor.detach().contiguous().flatten().view(_INTEGER[tensor.element_size()])
    by_row = torch.zeros((), dtype=torch.int64, device=tensor.device)
    columns = torch.zeros(_COLUMNS, dtype=torch.int64, device=tensor.device)
    for piece in range(0, words.numel(), _PIECE):  # sums of integers may convert what they read: not all at once
        part = words[piece : piece + _PIECE]
        table = F.pad(part, (0, -part.numel() % _COLUMNS)).view(-1, _COLUMNS)  # [rows, 1024]
        by_row += (table.sum(1, dtype=torch.int64) * _odd(len(table), tensor.device, piece // _COLUMNS)).sum()
        columns += table.sum(0, dtype=torch.int64)
    return torch.stack([by_row, (columns * _odd(_COLUMNS, tensor.device)).sum()])


def _odd(count: int, device: torch.device, start: int = 0) -> Tensor:
    """Odd numbers, as weights: they keep the lowest bits."""
    return 2 * torch.arange(start, start + count, device=device) + 1


def _held(parameter: nn.Parameter, replica: int) -> Tensor:
    """What this rank keeps of a parameter between steps: under ZeRO-3 its partition, without the padding, which is
    whatever was in memory."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter
    if not partition.numel():
        return partition  # it is in a file
    count = partition.ds_numel
    return partition.flatten()[: max(0, min(count, parameter.ds_numel - replica * count))]


def _compare(names: list[str], sums: Tensor, group: ProcessGroup | None, ranks: list[int]) -> list[Difference]:
    """sums int64 [parameters, 2] of this rank, compared within a group of ranks; the same answer on all of them."""
    if not names or len(ranks) < 2:
        return []
    every = [torch.empty_like(sums) for _ in ranks]
    dist.all_gather(every, sums, group=group)
    table = torch.stack(every).cpu()  # [ranks, parameters, 2]
    differences = []
    for index in (table != table[0]).any(dim=2).any(dim=0).nonzero().flatten().tolist():
        values = [tuple(row) for row in table[:, index].tolist()]
        (common, count), *_ = Counter(values).most_common(1)
        majority = 2 * count > len(ranks)
        alone = tuple(r for r, value in zip(ranks, values, strict=True) if not majority or value != common)
        differences.append(Difference(names[index], alone, tuple(ranks)))
    return differences


def check_replicas(module: nn.Module, topology: Topology) -> int:
    """Compare checksums of everything that ranks hold alike; how many parameters of this rank were compared.

    A collective call. Raises ReplicasDiffer on every rank if copies differ anywhere.
    """
    parameters = list(specified(module))
    names = [parameter.spec.name for parameter in parameters]
    held = [_held(parameter, topology.replica) for parameter in parameters]
    sums = torch.stack([checksum(tensor) for tensor in held])
    cut = [hasattr(parameter, "ds_tensor") for parameter in parameters]
    whole = [index for index, is_cut in enumerate(cut) if not is_cut]
    alike = [
        index for index, parameter in enumerate(parameters) if not parameter.spec.sharded and held[index].numel()
    ]  # what lies in a file, on all of these ranks alike, isn't compared
    stage, replica, shard = topology.stage, topology.replica, topology.shard
    found = _compare(
        [names[i] for i in whole], sums[whole], topology.data_group, topology.data_ranks(stage, shard)
    )
    found += _compare(
        [names[i] for i in alike], sums[alike], topology.tensor_group, topology.tensor_ranks(stage, replica)
    )
    found += _compare_tied(parameters, sums, topology)
    _tell_all(found, sums.device)
    compared = set(whole if topology.data > 1 else []) | set(alike if topology.tensor > 1 else [])
    tied = {i for i, parameter in enumerate(parameters) if parameter.spec.tied and topology.pipeline > 1}
    return len(compared | tied)


def _compare_tied(parameters: list[nn.Parameter], sums: Tensor, topology: Topology) -> list[Difference]:
    """The tied embedding's copies on the first and the last stage. The stages between take part in the exchange."""
    if topology.pipeline == 1:
        return []
    mine = [index for index, parameter in enumerate(parameters) if parameter.spec.tied]
    sent = sums[mine[0]] if mine else torch.zeros_like(sums[0])
    every = [torch.empty_like(sent) for _ in range(topology.pipeline)]
    dist.all_gather(every, sent, group=topology.pipeline_group)
    if torch.equal(every[0], every[-1]):
        return []
    ranks = topology.pipeline_ranks(topology.replica, topology.shard)
    ends = (ranks[0], ranks[-1])
    return [Difference("wte.weight (tied)", ends, ends)]


def _tell_all(found: list[Difference], device: torch.device) -> None:
    """Raise on every rank what any rank found: those of another group must not go on alone."""
    mine = json.dumps([astuple(difference) for difference in found]) if found else ""
    told = [json.loads(text) for text in gather_texts(mine, device) if text]
    if told:
        every = {Difference(name, tuple(ranks), tuple(holders)) for found in told for name, ranks, holders in found}
        raise ReplicasDiffer(sorted(every))

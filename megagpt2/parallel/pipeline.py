"""Pipeline parallelism: the layer list cut into stages, as a DeepSpeed PipelineModule (Huang et al. 2019, GPipe;
Narayanan et al. 2021 for the 1F1B schedule that DeepSpeed runs).

    stage 0: wte wpe h.0 h.1   ->   stage 1: h.2 h.3 h.4   ->   stage 2: h.5 h.6 ln_f head (wte again)

The first and the last stage both hold wte; `reduce_tied_gradients` keeps their copies equal. Where the list is cut is
decided in stages.py.
"""

from __future__ import annotations

import contextlib
import io

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt2.config.schema import ModelConfig
from megagpt2.model.gpt2 import LayerPlan
from megagpt2.model.layers import Builder
from megagpt2.parallel.quiet_deepspeed import deepspeed
from megagpt2.parallel.topology import Topology

TIED = "embedding"


class _PlannedLayer(deepspeed.pipe.LayerSpec):
    """A LayerPlan in the form DeepSpeed builds layers from: only a stage's own layers are ever built."""

    def __init__(self, plan: LayerPlan, builder: Builder) -> None:
        super().__init__(nn.Module)
        self.plan, self.builder = plan, builder

    def build(self, log: bool = False) -> nn.Module:
        return self.plan.build(self.builder)


class _TiedLayer(deepspeed.pipe.TiedLayerSpec):
    """One of the two uses of the tied embedding."""

    def __init__(self, plan: LayerPlan, builder: Builder, use) -> None:
        super().__init__(TIED, nn.Module, forward_fn=use)
        self.plan, self.builder = plan, builder

    def build(self, log: bool = False) -> nn.Module:
        return self.plan.build(self.builder)


def _embed(embedding: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, samples = inputs
    return embedding(tokens), samples


def _pass_hidden(embedding: nn.Module, state: tuple[Tensor, Tensor]) -> Tensor:
    return state[0]  # the loss function applies the head: logits never leave it


class Pipeline(deepspeed.pipe.PipelineModule):
    """This rank's stage of the model."""

    def __init__(self, plans: list[LayerPlan], bounds: list[int], builder: Builder, topology: Topology) -> None:
        self.__dict__["_bounds"] = bounds  # the base class cuts the list while it is constructed
        first, *rest = plans
        specs = [_TiedLayer(first, builder, _embed)]
        specs += [_PlannedLayer(plan, builder) for plan in rest[:-1]]
        specs += [_TiedLayer(first, builder, _pass_hidden)]
        grid = deepspeed.runtime.pipe.topology.PipeModelDataParallelTopology
        # DeepSpeed prints its own account of the stages, and broadcasts the tied weights where autograd would see it.
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            super().__init__(
                layers=specs,
                topology=grid(topology.pipeline, topology.tensor, topology.data),
                loss_fn=self.head_loss,
                activation_checkpoint_interval=0,  # recomputation is the block's own
            )

    def _partition_layers(self, method: str = "uniform") -> None:
        """Replaces the base class's cut, which counts layers or builds all of them to count parameters."""
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self._bounds
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @property
    def embedding(self) -> nn.Module:
        """The tied embedding, on the first and the last stage."""
        return self.tied_modules[TIED]

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.embedding(hidden, targets)


def adapt_engine(engine) -> None:
    """Replace the one instruction of DeepSpeed's schedule that is not exact."""
    reduce = deepspeed.runtime.pipe.schedule.ReduceTiedGrads
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, reduce: reduce_tied_gradients}


def reduce_tied_gradients(engine) -> None:
    """Sum the tied embedding's gradients over the first and the last stage, in place of DeepSpeed's own.

    DeepSpeed adds the pair before the data-parallel mean: with three replicas or more the two sums round
    differently and the copies drift. Here the mean comes first, with the same arithmetic on both stages; the
    mean of equal numbers that DeepSpeed takes afterwards changes both alike.
    """
    for weight, group in engine.module.get_tied_weights_and_groups():
        gradient = next(
            (g for name in ("_hp_grad", "grad_accum", "grad") if (g := getattr(weight, name, None)) is not None), None
        )
        if gradient is None:
            raise RuntimeError("the tied embedding has no gradient where DeepSpeed 0.19 keeps one")
        replicas = engine.mpu.get_data_parallel_group()
        if dist.get_world_size(replicas) > 1:
            dist.all_reduce(gradient, group=replicas)
            gradient /= dist.get_world_size(replicas)
        dist.all_reduce(gradient, group=group)


@torch.no_grad()
def forward_through_stages(
    stage: Pipeline, topology: Topology, tokens: Tensor, position: int, model: ModelConfig, pieces: int
) -> Tensor:
    """Logits [batch, vocabulary] after `position` of tokens int64 [batch, sequence], fp32, on every rank.

    One micro-batch and no schedule, for sampling: each stage receives its predecessor's hidden states (of which a rank
    holds 1 / pieces of the sequence) and passes on its own; the last one sends its logits to all.
    """
    batch, sequence = tokens.shape
    samples = torch.zeros(batch, dtype=torch.int64, device=tokens.device)

    def neighbour(distance: int) -> int:
        return topology.rank_at(topology.stage + distance, topology.replica, topology.shard)

    state = (tokens, samples)
    if not topology.first_stage:
        dtype = next(stage.parameters()).dtype
        hidden = torch.empty(batch, sequence // pieces, model.width, dtype=dtype, device=tokens.device)
        dist.recv(hidden, neighbour(-1))
        state = (hidden, samples)
    state = stage(state)
    logits = torch.empty(batch, model.vocabulary, device=tokens.device)
    if topology.last_stage:
        logits.copy_(stage.embedding(state)[:, position])
    else:
        dist.send(state[0].contiguous(), neighbour(1))
    last = topology.rank_at(topology.pipeline - 1, topology.replica, topology.shard)
    dist.broadcast(logits, last, group=topology.pipeline_group)
    return logits

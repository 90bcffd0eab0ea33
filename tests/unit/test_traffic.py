"""What docs/parallelism.md says a block, the embedding and the head send: counted on a group that moves nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagpt2.model.gpt2 import layer_plans
from megagpt2.parallel import collectives
from megagpt2.parallel.stages import Stage
from megagpt2.parallel.tensor import TensorBuilder
from megagpt2.parallel.topology import Topology
from tests.support.models import dropped, model_config

WHOLE, SMALL = "whole", "small"
BATCH, SEQUENCE, WIDTH, SHARDS = 2, 16, 24, 2


@pytest.fixture
def group():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=SHARDS)
    yield dist.new_group(list(range(SHARDS)))
    dist.destroy_process_group()


@pytest.fixture
def sent(monkeypatch):
    """(collective, of the residual stream [batch, sequence, width] or of something smaller) -> how often."""
    counts: Counter = Counter()

    def counting(name: str, collective):
        def count(out, *arguments, **keywords):
            largest = max(t.numel() for t in (out, *arguments) if isinstance(t, torch.Tensor))
            counts[name, WHOLE if largest == BATCH * SEQUENCE * WIDTH else SMALL] += 1
            return collective(out, *arguments, **keywords)

        return count

    monkeypatch.setattr(collectives, "_all_gather", counting("all-gather", collectives._all_gather))
    monkeypatch.setattr(collectives, "_reduce_scatter", counting("reduce-scatter", collectives._reduce_scatter))
    monkeypatch.setattr(collectives.dist, "all_reduce", counting("all-reduce", dist.all_reduce))
    return counts


def passes(group, sent, sequence_parallel: bool, recompute: str, start: int, stop: int, dropout: bool = False):
    """Counts of the forward and of the backward pass of entries [start, stop) of a model's list, on the meta device."""
    config = model_config(context=SEQUENCE)
    config = dropped(config) if dropout else config
    builder = TensorBuilder(0, Topology(SHARDS, 1, 1, 0, group), sequence_parallel)
    plans = layer_plans(config, recompute)
    pieces = SHARDS if sequence_parallel else 1
    with torch.device("meta"):
        stage = Stage(plans, start, stop, builder)
        tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        hidden = torch.zeros(BATCH, SEQUENCE // pieces, WIDTH, requires_grad=True)
        samples = torch.zeros(BATCH, dtype=torch.int64)
    out = stage((tokens if stage.first else hidden, samples), tokens if stage.last else None)
    forward = dict(sent)
    sent.clear()
    (out if stage.last else out[0]).sum().backward()
    return forward, dict(sent)


def test_a_block_under_tensor_parallelism(group, sent):
    """Shoeybi et al. 2019, section 3: two all-reduces forward, two backward."""
    assert passes(group, sent, False, "none", 2, 3) == (
        {("all-reduce", WHOLE): 2}, {("all-reduce", WHOLE): 2},
    )


def test_a_block_under_sequence_parallelism(group, sent):
    """Korthikanti et al. 2022, section 4.2.2: each all-reduce becomes a gather and a scatter, and the backward pass
    gathers the two inputs that were not kept whole once more. Gradients of two norms and two row biases besides."""
    assert passes(group, sent, True, "none", 2, 3) == (
        {("all-gather", WHOLE): 2, ("reduce-scatter", WHOLE): 2},
        {("all-gather", WHOLE): 4, ("reduce-scatter", WHOLE): 2, ("all-reduce", SMALL): 6},
    )


@pytest.mark.parametrize(("dropout", "again"), [(False, 1), (True, 2)])
def test_full_recomputation_repeats_the_forward_pass(group, sent, dropout, again):
    """As far as something is needed of it: without dropout nothing behind the last matrix is."""
    _, backward = passes(group, sent, False, "full", 2, 3, dropout)
    assert backward == {("all-reduce", WHOLE): 2 + again}


def test_selective_recomputation_sends_nothing_more(group, sent):
    _, backward = passes(group, sent, False, "selective", 2, 3, dropout=True)
    assert backward == {("all-reduce", WHOLE): 2}


def test_the_embedding_and_the_head(group, sent):
    """Forward the words' vectors are summed; backward the head's hidden gradient is. The loss reduces
    its chunk's maxima, and then three sums at once."""
    assert passes(group, sent, False, "none", 0, 1) == ({("all-reduce", WHOLE): 1}, {})
    sent.clear()
    assert passes(group, sent, False, "none", 5, 6) == ({("all-reduce", SMALL): 2}, {("all-reduce", WHOLE): 1})
    sent.clear()
    assert passes(group, sent, True, "none", 0, 1) == ({("reduce-scatter", WHOLE): 1}, {("all-gather", WHOLE): 1})
    sent.clear()
    assert passes(group, sent, True, "none", 5, 6) == (
        {("all-gather", WHOLE): 1, ("all-reduce", SMALL): 2}, {("reduce-scatter", WHOLE): 1},
    )

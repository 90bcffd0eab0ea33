"""FLOPs are what torch counts, and pipeline stages are cut as evenly as they can be."""

from itertools import combinations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megagpt2.config.schema import ModelConfig
from megagpt2.model.gpt2 import layer_plans
from megagpt2.parallel.stages import balanced_bounds
from megagpt2.planning.stages import stage_bounds, stage_shares
from megagpt2.planning.time import (
    block_flops,
    head_flops,
    layer_costs,
    model_tflops,
    peak_tflops,
    recomputed_flops,
    token_flops,
)
from tests.support.models import dense_model, dropped, model_config, random_tokens


def addmm_flops(_, a, b, out_shape) -> int:
    """torch counts addmm, and not its in-place form, which adds up the head's weight gradient in fp32."""
    return 2 * a[0] * a[1] * b[1]


def counted_flops(config: ModelConfig, sequence: int, recompute: str = "none") -> float:
    """What torch counts of a token's forward and backward pass."""
    model, (tokens, targets, samples) = dense_model(config, recompute), random_tokens(config)
    assert tokens.shape[1] == sequence
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        model(tokens, samples, targets).backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize(("norm", "feed_forward"), [("pre", None), ("pre", 40), ("post", None)])
def test_token_flops_are_what_torch_counts(norm, feed_forward):
    """Exactly, once the two things that are computed but not counted are added.

    Dropout makes the model write attention out as products over the whole square: its upper half, of which nothing
    comes, is another 2 w s per layer forward. The head's padding rows are multiplied too. Both three times, for
    forward and backward.
    """
    config = dropped(model_config(norm=norm, feed_forward=feed_forward))
    sequence = 16
    upper_half = 3 * 2 * config.layers * config.width * sequence
    padding = 3 * 2 * config.width * (config.padded_vocabulary - config.vocabulary)
    assert counted_flops(config, sequence) == token_flops(config, sequence) + upper_half + padding


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "full_offload"])
@pytest.mark.parametrize("residual_dropout", [0.0, 0.1])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_recomputed_flops_are_what_torch_counts(norm, residual_dropout, recompute):
    """Exactly: what recomputation adds to a step, for each block. The upper half of attention's square is computed
    again as well: of both products under "full", of the scores' under "selective"."""
    config = model_config(norm=norm, attention_dropout=0.1, residual_dropout=residual_dropout)
    sequence = 16
    added = counted_flops(config, sequence, recompute) - counted_flops(config, sequence)
    upper_half = {"none": 0, "selective": 1}.get(recompute, 2) * config.width * sequence
    assert added == config.layers * (recomputed_flops(config, sequence, recompute) + upper_half)


def test_attention_without_dropout_is_computed_again_as_a_whole():
    """The fused operator saves its output: both products are made again, half of whose square is needed."""
    config = ModelConfig(layers=2, width=64, heads=2)
    again = recomputed_flops(config, 128, "selective")
    assert again == 2 * 64 * 128 == block_flops(config, 128) - block_flops(config, 0)


def test_gpt2_flops_are_the_papers_formula():
    """Narayanan et al. 2021, equation 3, without its recomputation (a quarter) and with half of attention's square:
    72 l w^2 (1 + s / 12 w + V / 12 l w) a token. Equal but for rounding."""
    config = ModelConfig(layers=12, width=768, heads=12)
    layers, width, sequence, words = 12, 768, 1024, 50257
    formula = 72 * layers * width**2 * (1 + sequence / (12 * width) + words / (12 * layers * width))
    assert token_flops(config, sequence) == pytest.approx(formula, rel=1e-12)
    assert model_tflops(config, sequence, 1e5, 4) == pytest.approx(formula * 1e5 / 4 / 1e12, rel=1e-12)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_layer_costs_are_the_layer_lists(norm):
    config = model_config(norm=norm)
    names = [plan.name for plan in layer_plans(config)]
    costs = dict(zip(names, layer_costs(config, 16, "none"), strict=True))
    assert costs["wte"] == costs["wpe"] == costs.get("ln_f", 0.0) == 0.0
    assert costs["head"] == 3 * head_flops(config)
    assert sum(costs.values()) == token_flops(config, 16)
    again = dict(zip(names, layer_costs(config, 16, "full"), strict=True))
    assert again["head"] == costs["head"]  # never computed again
    assert again["h.0"] - costs["h.0"] == recomputed_flops(config, 16, "full") > 0


def test_peaks_are_found_by_the_longest_name():
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA L40S") == 362.0
    assert peak_tflops("a toaster") is None


def stage_times(costs: list[float], bounds: list[int]) -> list[float]:
    return [sum(costs[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def legal_bounds(layers: int, first: int, last: int, stages: int):
    """Every way to cut with a block in every stage, and what is not a block at the ends."""
    for cuts in combinations(range(first + 1, last + 1), stages - 1):
        yield [0, *cuts, layers]


COSTS = st.integers(0, 9).map(float)  # whole numbers: their sums are exact, and ties are frequent


@given(
    st.lists(COSTS, max_size=2), st.lists(COSTS, min_size=1, max_size=9), st.lists(COSTS, max_size=2), st.integers(1, 5)
)
# The evenest first stages are not part of the evenest whole.
@example([], [7.0, 4.0, 4.0, 8.0, 0.0, 1.0, 9.0], [], 5)
def test_cuts_are_optimal(before, blocks, after, stages):
    """Against all legal cuts: the slowest stage is as fast as can be, of those the squares sum up to least, and of
    those the cuts come latest, from the first on: more blocks in earlier stages."""
    costs = [*before, *blocks, *after]
    first, last = len(before), len(before) + len(blocks) - 1
    if stages > len(blocks):
        with pytest.raises(ValueError, match=f"{len(blocks)} blocks can't fill {stages} pipeline stages"):
            balanced_bounds(costs, stages, first, last)
        return

    def judge(bounds: list[int]) -> tuple[float, float, list[int]]:
        times = stage_times(costs, bounds)
        return max(times), sum(time * time for time in times), [-cut for cut in bounds]

    bounds = balanced_bounds(costs, stages, first, last)
    assert bounds in list(legal_bounds(len(costs), first, last, stages))
    assert judge(bounds) == min(judge(other) for other in legal_bounds(len(costs), first, last, stages))


@given(st.lists(COSTS, min_size=2, max_size=8), st.integers(1, 4))
def test_the_unit_of_cost_changes_no_cut(blocks, stages):
    """Sums of 0.1 are inexact, and equal cuts would differ by rounding: they are compared exactly."""
    stages = min(stages, len(blocks))
    cut = balanced_bounds([2.0**-60 * cost for cost in blocks], stages, 0, len(blocks) - 1)
    assert cut == balanced_bounds(blocks, stages, 0, len(blocks) - 1)
    assert balanced_bounds([0.1] * 7, 4, 0, 6) == [0, 2, 4, 6, 7]


@pytest.mark.parametrize(
    ("layers", "width", "heads", "stages", "recompute", "blocks"),
    [
        (48, 1600, 25, 4, "none", [13, 13, 12, 10]),  # the head takes 2.5 blocks' time: as many fewer there
        (48, 1600, 25, 4, "full", [13, 13, 12, 10]),
        (48, 1600, 25, 1, "none", [48]),
        (36, 1280, 20, 2, "none", [20, 16]),
        (36, 1280, 20, 2, "full", [19, 17]),  # blocks are computed twice, the head is not
        (12, 768, 12, 4, "none", [4, 4, 3, 1]),  # and 5 blocks' time in a small model
        (12, 768, 12, 3, "none", [6, 5, 1]),
        (12, 768, 12, 3, "full_offload", [5, 5, 2]),
        (12, 768, 12, 12, "none", [1] * 12),
    ],
)
def test_gpt2_stages(layers, width, heads, stages, recompute, blocks):
    config = ModelConfig(layers=layers, width=width, heads=heads)
    shares = stage_shares(config, 1024, stage_bounds(config, 1024, stages, recompute), recompute)
    assert [share.blocks for share in shares] == blocks
    assert sum((share.names for share in shares), ()) == tuple(plan.name for plan in layer_plans(config))
    assert sum(share.share for share in shares) == pytest.approx(1.0, abs=1e-12)


def test_a_stage_is_shown_with_its_share():
    """13 of 48 + 2.485 blocks' time are 25.75 %, 10 + 2.485 are 24.73 %."""
    config = ModelConfig(layers=48, width=1600, heads=25)
    first, *_, last = map(str, stage_shares(config, 1024, stage_bounds(config, 1024, 4, "none"), "none"))
    assert first == "wte .. h.12 (13 blocks, 25.8 %)"
    assert last == "h.38 .. head (10 blocks, 24.7 %)"
    small = stage_shares(model_config(layers=2), 16, [0, 3, 6], "none")
    assert str(small[0]).startswith("wte .. h.0 (1 block, ")


@pytest.mark.parametrize(
    "device, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0), ("NVIDIA L4", 121.0), ("NVIDIA L40S", 362.0), ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None), ("Tesla V100-SXM2-16GB", 125.0), ("something else", None),
    ],
)
def test_the_peak_of_a_known_gpu(device, peak):
    """By whole words: an RTX A1000 is no A100, an L40 no L4. An unknown one has no MFU rather than a wrong one."""
    assert peak_tflops(device) == peak

"""The model: a list of layers (DESIGN D2), which one rank runs whole and a pipeline cuts into stages.

    wte (tied) -> wpe -> h.0 ... h.{L-1} -> ln_f -> head (wte again)

Layers pass `(hidden, sample numbers)`: the numbers key the dropout masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from megagpt2.config.schema import ModelConfig
from megagpt2.model.block import Block, State
from megagpt2.model.layers import Builder


@dataclass(frozen=True)
class LayerPlan:
    """One entry of the list: how to build it, once it is known on which rank."""

    name: str
    build: Callable[[Builder], nn.Module] | None  # None: the head, which is the tied embedding's other use


class Positions(nn.Module):
    """Adds position vectors and applies the embedding dropout."""

    def __init__(self, build: Builder, config: ModelConfig) -> None:
        super().__init__()
        self.wpe = build.position_embedding("wpe", config.context, config.width, config.position_initial_std)
        self.dropout = build.dropout(config.embedding_dropout, 0, "embedding")

    def forward(self, state: State) -> State:
        x, samples = state
        return self.dropout(self.wpe(x), samples), samples


class FinalNorm(nn.Module):
    def __init__(self, build: Builder, config: ModelConfig) -> None:
        super().__init__()
        self.ln_f = build.layer_norm("ln_f", config.width, config.layer_norm_epsilon)

    def forward(self, state: State) -> State:
        x, samples = state
        return self.ln_f(x), samples


def _tied_embedding(build: Builder, config: ModelConfig) -> nn.Module:
    return build.tied_embedding("wte", config.vocabulary, config.padded_vocabulary, config.width, config.initial_std)


def _block(build: Builder, config: ModelConfig, layer: int, recompute: str) -> Block:
    # A post-LN block's output is normalized: scaling its projections is GPT-2's, not GPT-1's.
    scale = 1.0 / math.sqrt(2.0 * config.layers) if config.norm == "pre" else 1.0
    return Block(
        build, f"h.{layer}", layer, width=config.width, heads=config.heads, inner=config.inner, norm=config.norm,
        epsilon=config.layer_norm_epsilon, attention_dropout=config.attention_dropout,
        residual_dropout=config.residual_dropout, std=config.initial_std,
        residual_std=config.initial_std * scale, recompute=recompute,
    )


def layer_plans(config: ModelConfig, recompute: str = "none") -> list[LayerPlan]:
    """The whole model in order. The first and the last entry are the same tied module."""
    plans = [
        LayerPlan("wte", lambda build: _tied_embedding(build, config)),
        LayerPlan("wpe", lambda build: Positions(build, config)),
    ]
    plans += [
        LayerPlan(f"h.{layer}", lambda build, layer=layer: _block(build, config, layer, recompute))
        for layer in range(config.layers)
    ]
    if config.norm == "pre":
        plans.append(LayerPlan("ln_f", lambda build: FinalNorm(build, config)))
    plans.append(LayerPlan("head", None))
    return plans


class GPT2(nn.Module):
    """The whole list on one rank (or on one tensor-parallel group, if the builder shards)."""

    def __init__(self, config: ModelConfig, build: Builder, recompute: str = "none") -> None:
        super().__init__()
        first, *rest = layer_plans(config, recompute)
        self.embedding = first.build(build)
        self.layers = nn.ModuleList(plan.build(build) for plan in rest if plan.build is not None)

    def forward(self, tokens: Tensor, samples: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens, targets int64 [batch, sequence], samples int64 [batch].

        Returns the mean loss; without targets, logits [batch, sequence, vocabulary].
        """
        state = (self.embedding(tokens), samples)
        for layer in self.layers:
            state = layer(state)
        return self.embedding(state[0], targets)

"""The next token's logits from an engine on any layout: for samples while training."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagpt2.parallel.pipeline import forward_through_stages
from megagpt2.training.engine import Engine


@torch.no_grad()
def next_logits(engine: Engine, tokens: Tensor) -> Tensor:
    """tokens int64 [batch, length] -> logits [batch, vocabulary] of the token that follows, fp32, on every rank.

    All ranks must call it together with the same tokens.
    """
    length = tokens.shape[1]
    pieces = engine.topology.tensor if engine.config.parallel.sequence_parallel else 1
    tokens = F.pad(tokens, (0, -length % pieces))  # what follows a position can't change it
    module = engine.module
    module.eval()
    try:
        if engine.topology.pipeline > 1:
            logits = forward_through_stages(module, engine.topology, tokens, length - 1, engine.config.model, pieces)
        else:
            samples = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
            logits = module(tokens, samples)[:, length - 1].float().contiguous()
    finally:
        module.train()
    if engine.topology.world_size > 1:  # replicas on unlike processors may differ in a bit, and then draw other tokens
        dist.broadcast(logits, 0)
    return logits

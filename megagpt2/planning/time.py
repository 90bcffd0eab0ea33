"""How much arithmetic a model takes, and what part of a device's peak a speed amounts to.

Model FLOPs of one token, forward and backward, counting multiply and add as two and every matrix product of the
network once forward and twice backward (Narayanan et al. 2021, equation 3; Chowdhery et al. 2022, appendix B, without
the embedding look-up, with the head):

    6 N_matmul + 6 L w s        N_matmul = L (4 w^2 + 2 w f) + w V

w: width, f: feed-forward width, s: sequence length, V: vocabulary without padding. Attention's two products take
12 L w s over a whole square; causal attention needs half of it, and half is what is counted here. Recomputation
is not counted: it is hardware FLOPs, not model FLOPs.
"""

from __future__ import annotations

import re

from megagpt2.config.schema import ModelConfig

PEAK_TFLOPS = {  # dense bf16, TFLOP/s of one device, from NVIDIA's data sheets
    "A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "V100": 125.0, "A10": 125.0,
    "L4": 121.0, "L40S": 362.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}


def block_flops(model: ModelConfig, sequence: int) -> float:
    """Forward FLOPs of one token in one block: projections, feed-forward, causal attention."""
    matmul = 4 * model.width**2 + 2 * model.width * model.inner
    return 2.0 * matmul + 2.0 * model.width * sequence


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one token in the output head."""
    return 2.0 * model.width * model.vocabulary


def token_flops(model: ModelConfig, sequence: int) -> float:
    """Model FLOPs of training on one token: forward plus twice that backward."""
    return 3.0 * (model.layers * block_flops(model, sequence) + head_flops(model))


def recomputed_flops(model: ModelConfig, sequence: int, recompute: str) -> float:
    """FLOPs of one token that the backward pass of a block computes again (parallel.activation_checkpointing).

    torch stops a recomputation at the last tensor that the backward pass needs. Scores that are written out, with
    attention dropout, are made again without their product with v; a whole pre-LN block without residual dropout ends
    at the input of its last matrix.
    """
    if recompute == "none":
        return 0.0
    if recompute == "selective":
        return (1.0 if model.attention_dropout else 2.0) * model.width * sequence
    needs_end = model.norm == "post" or model.residual_dropout
    return block_flops(model, sequence) - (0.0 if needs_end else 2.0 * model.width * model.inner)


def layer_costs(model: ModelConfig, sequence: int, recompute: str) -> list[float]:
    """Relative time of each entry of the layer list (model/gpt2.py), for cutting pipeline stages: FLOPs of a token,
    forward, recomputed and backward. The head's are never recomputed: its gradients are made in the forward pass."""
    block = 3.0 * block_flops(model, sequence) + recomputed_flops(model, sequence, recompute)
    tail = [0.0] if model.norm == "pre" else []
    return [0.0, 0.0, *[block] * model.layers, *tail, 3.0 * head_flops(model)]


def model_tflops(model: ModelConfig, sequence: int, tokens_per_second: float, devices: int) -> float:
    """Model TFLOP/s of one device at a speed of the whole job."""
    return token_flops(model, sequence) * tokens_per_second / devices / 1e12


def peak_tflops(device_name: str) -> float | None:
    """Peak TFLOP/s of a GPU by its name, None if unknown. The longest known name inside the device's wins."""
    # Whole words: an "RTX A1000" is no A100, and an L40 no L4.
    known = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)]
    return PEAK_TFLOPS[max(known, key=len)] if known else None

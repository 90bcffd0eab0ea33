"""Bytes on a rank: what the model's states take, exactly, and what a step's activations take, estimated.

States (Rajbhandari et al. 2020, "ZeRO: Memory optimizations toward training trillion parameter models", section 3.1 and
figure 1), with what DeepSpeed 0.19.8 really allocates for the configuration in training/engine.py. P: elements on this
rank (a shard of a stage, padding included), d: data-parallel size, e: bytes of a computed number (2 in bf16 and fp16, 4
in fp32):

                    ZeRO 0, 1     ZeRO 2        ZeRO 3
    parameters      e P           e P           e (P / d + those kept whole)
    gradients       4 P           4 P / d       4 P / d         accumulated in fp32 in every precision
    masters         4 P / d       4 P / d       4 P / d         in fp32 too: what is updated is a copy
    moments         8 P / d       8 P / d       8 P / d         AdamW's two; none for SGD

Unlike the paper's 2 P of fp16, gradients take 4 P: they are accumulated in fp32, and BF16_Optimizer keeps and reduces
all of them under ZeRO 1. ZeRO 3 keeps parameters of at most stage3_param_persistence_threshold elements
(100,000) whole: biases and norms.

Offload moves some of that into the host's main memory or into files on NVMe, and needs buffers beside it (n: elements
of the largest parameter here, g: of a sub-group, at most max(20,000,000, n / d)). On a CPU the host's memory is the
device's: there only files take less.

    optimizer: cpu     host: masters, moments, a second fp32 gradient partition, which the update reads
      ZeRO 0 to 2      host: e P / d updated weights on their way back, e n; device: e n; gradients stay on the device,
                       but in fp32 under ZeRO 2
      ZeRO 3           host: gradients
    optimizer: nvme    files: masters, moments; host: gradients, 3 x 4 g for the sub-group that is updated
    parameters: cpu    host: parameters
    parameters: nvme   files: parameters; host: e (5 n / d + g)

Not in it: the Python process with its libraries (0.4 GiB of a CPU rank's memory), what the C library keeps of freed
memory, and sub-groups below 1 MiB, which DeepSpeed leaves in memory.

Activations (Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4,
equations 1 to 4), counted for what our own blocks save for the backward pass. Bytes per token of a micro-batch, of a
block of width w, with a heads and f feed-forward channels on this rank, sequence s; n = tensor_parallel under sequence
parallelism, else 1:

    residual stream   (4 e w + 16) / n                              inputs of norms and linear layers, means
    shard             e (4 a w/heads + 2 f)                         q, k, v, attention's output, GELU's in and output
    core              2 a s e       with attention dropout          weights before and after it
                      4 a           without                         fused attention saves a logsumexp per head
                      a s e         on a CPU in 16 bits below 512   where attention is by fused_softmax: the weights
    none              residual stream + shard + core
    selective         residual stream + shard
    full              e w / n; full_offload: the same in the host memory

With e = 2, f = 4 w that is the paper's 10 + 24 / t (or 34 / t) times s b w, less its masks of dropout, which are drawn
again; of the core the paper has 5 a s s b, ours is 4 a s s b, or gone. Under 1F1B stage p holds min(accumulation,
stages - p) micro-batches of them (Narayanan et al. 2021, section 2.2). This is an estimate: the gradients of
activations, a chunk of logits, what collectives copy and what the allocator leaves unused are not in it, nor the CUDA
context and NCCL's buffers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megagpt2.config.passthrough import passed_on
from megagpt2.config.rules import Plan
from megagpt2.config.schema import Config, ModelConfig
from megagpt2.model.attention import automatic
from megagpt2.model.parameters import partition

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
KINDS = ("parameters", "gradients", "masters", "moments", "buffers", "activations", "workspace")
SUB_GROUP = 20_000_000  # on NVMe: parameters updated at once; a larger tensor (the embedding) is one by itself
STATE_BUFFERS = 3  # on NVMe: of a sub-group's size, for master and two moments
PARAMETER_BUFFERS = 5  # on NVMe: of the largest parameter's size
_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default of reduce_bucket_size, and of BF16_Optimizer's all-reduce
_WHOLE_UP_TO = 100_000  # its default of stage3_param_persistence_threshold
_LIVE_ELEMENTS = 1_000_000_000  # its default of stage3_max_live_parameters
_NORM_ELEMENTS = 250_000_000  # of an offloaded gradient that are squared at once under ZeRO 3


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank's device memory by kind; `host` and `files` are what offloading keeps elsewhere."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    activations: int  # estimate
    workspace: int  # estimate: what comes and goes beside them, at the fullest moment of a step
    buffers: int = 0  # what offloading needs beside the states
    host: int = 0  # main memory, where it is not the device's
    files: int = 0  # on NVMe

    @property
    def states(self) -> int:
        """What stays between steps."""
        return self.parameters + self.gradients + self.masters + self.moments + self.buffers

    @property
    def total(self) -> int:
        """The device's peak."""
        return self.states + self.activations + self.workspace


@dataclass(frozen=True)
class Place:
    """What memory depends on: which part of the model is here."""

    stage: int
    shard: int
    elements: int  # of all parameters on this rank, padding included
    blocks: int
    head_rows: int = 0  # rows of the embedding where the loss is computed, 0 elsewhere
    small: int = 0  # elements of the parameters that ZeRO 3 keeps whole
    largest: int = 0  # elements of the largest parameter


def rank_bytes(config: Config, plan: Plan, place: Place) -> RankBytes:
    """The formulas above for one place. Exact for states up to the alignment of flat buffers (a few elements per
    parameter group)."""
    states = {**_states(config, plan, place), "buffers": 0}
    host, files = _offloaded(config, plan, place, states)
    activations = _activations(config, plan, place)
    forward, update = _workspace(config, plan, place)
    workspace = max(forward, update - activations)  # at the update the activations are gone
    if plan.device == "cpu":  # there is one memory
        states = {kind: states[kind] + host[kind] for kind in states}
        host = {}
    waiting = _saved_by_blocks(config, plan, place) * _in_flight(plan, place) if _inputs_wait_on_cpu(plan) else 0
    return RankBytes(
        **states, activations=activations, workspace=workspace, host=sum(host.values()) + waiting, files=files
    )


def _offloaded(config: Config, plan: Plan, place: Place, states: dict[str, int]) -> tuple[dict[str, int], int]:
    """(bytes in main memory by kind, bytes in files); takes them off `states`, what the device holds."""
    offload, zero = config.offload, _zero_options(config)
    size, share = ELEMENT_BYTES[plan.precision], -(-place.elements // plan.data)
    partition = -(-place.largest // plan.data)
    group = min(share, max(partition, int(zero.get("sub_group_size", SUB_GROUP))))
    host, files = dict.fromkeys(states, 0), 0
    if offload.optimizer == "nvme":
        files += states["masters"] + states["moments"]
        host |= {"gradients": states["gradients"], "buffers": 4 * STATE_BUFFERS * group}
        states |= {"masters": 0, "moments": 0, "gradients": 0}
    elif offload.optimizer == "cpu":
        host |= {"masters": states["masters"], "moments": states["moments"], "gradients": 4 * share}
        states |= {"masters": 0, "moments": 0}
        if plan.zero_stage == 3 or plan.zero_stage == 2 and plan.precision == "fp32":
            host["gradients"] += states["gradients"]
            states["gradients"] = 0
        if plan.zero_stage < 3:
            host["buffers"] += size * (share + place.largest)
            states["buffers"] += size * place.largest
    if offload.parameters != "none":
        if offload.parameters == "nvme":
            files += size * share
            host["buffers"] += size * (PARAMETER_BUFFERS * partition + group)
        else:
            host["parameters"] = size * share
        states["parameters"] -= size * share  # those kept whole stay
    return host, files


def _states(config: Config, plan: Plan, place: Place) -> dict[str, int]:
    size, share = ELEMENT_BYTES[plan.precision], -(-place.elements // plan.data)
    return {
        "parameters": size * (share + place.small if plan.zero_stage == 3 else place.elements),
        "gradients": 4 * (share if plan.zero_stage >= 2 else place.elements),
        "masters": 4 * share,
        "moments": 8 * share if config.optimizer.name == "adamw" else 0,
    }


def block_activations(model: ModelConfig, plan: Plan, shard: int, recompute: str) -> int:
    """Bytes that one block saves for the backward pass of one micro-batch on this shard, under that recomputation."""
    size, width = ELEMENT_BYTES[plan.precision], model.width
    tokens, split = plan.micro_batch * plan.sequence_length, plan.tensor if plan.sequence_parallel else 1
    if recompute in ("full", "full_offload"):
        return size * width * tokens // split
    heads, channels = (_share(units, plan.tensor, shard) for units in (model.heads, model.inner))
    residual = (4 * size * width + 16) * tokens // split  # no masks: they are drawn again
    inner = size * (4 * heads * model.head_width + 2 * channels) * tokens
    return residual + inner + (_core(model, plan, heads) if recompute == "none" else 0)


def _core(model: ModelConfig, plan: Plan, heads: int) -> int:
    tokens, size = plan.micro_batch * plan.sequence_length, ELEMENT_BYTES[plan.precision]
    dropped = model.attention_dropout > 0
    if automatic(plan.device, size, plan.sequence_length, True, dropped) == "sdpa":
        return 4 * heads * tokens
    # For the softmax's gradient and for the product with v, which are two where weights are dropped between them.
    return (2 if dropped else 1) * size * heads * plan.sequence_length * tokens


def _activations(config: Config, plan: Plan, place: Place) -> int:
    """Of all micro-batches that are between their forward and their backward pass on this stage."""
    model, hidden = config.model, _hidden(config, plan)
    saved = 0 if _inputs_wait_on_cpu(plan) else _saved_by_blocks(config, plan, place)
    if place.head_rows and model.norm == "pre":
        saved += hidden  # the final norm's input
    if plan.pipeline > 1:
        saved += hidden  # a stage's output waits for its gradient
    return saved * _in_flight(plan, place)


def _in_flight(plan: Plan, place: Place) -> int:
    """Micro-batches that 1F1B has between their forward and their backward pass on this stage."""
    return min(plan.accumulation, plan.pipeline - place.stage)


def _saved_by_blocks(config: Config, plan: Plan, place: Place) -> int:
    return place.blocks * block_activations(config.model, plan, place.shard, plan.activation_checkpointing)


def _inputs_wait_on_cpu(plan: Plan) -> bool:
    return plan.activation_checkpointing == "full_offload" and plan.device != "cpu"


def _workspace(config: Config, plan: Plan, place: Place) -> tuple[int, int]:
    """(during forward and backward, during the update): bytes of what is made and freed there."""
    size, zero, model = ELEMENT_BYTES[plan.precision], _zero_options(config), config.model
    forward = update = 0
    if place.head_rows:  # kernels/cross_entropy.py makes d hidden and d weight (its sum in fp32) in the forward pass
        tokens = plan.micro_batch * plan.sequence_length
        forward += size * model.width * tokens + 4 * place.head_rows * model.width
    if plan.activation_checkpointing in ("full", "full_offload"):  # the block that is being computed again
        forward += block_activations(model, plan, place.shard, "none")
    elif plan.activation_checkpointing == "selective":
        forward += _core(model, plan, _share(model.heads, plan.tensor, place.shard))
    bucket = zero.get("reduce_bucket_size", _BUCKET_ELEMENTS)
    share = -(-place.elements // plan.data)
    offloaded = config.offload.optimizer != "none"
    if plan.zero_stage < 2 and plan.precision == "bf16" and not offloaded:  # BF16_Optimizer
        update += 4 * min(place.elements, _BUCKET_ELEMENTS) if plan.data > 1 else 0
    elif plan.zero_stage < 2:
        staged = 4 * bucket * (2 if zero.get("overlap_comm") else 1)
        forward, update = forward + (0 if plan.pipeline > 1 else staged), update + staged
        update += 0 if offloaded else 4 * share
    elif plan.zero_stage == 2:
        forward += size * bucket * (2 if zero.get("overlap_comm") else 1)
        update += 0 if offloaded else 4 * share
    else:  # stage 3: the bucket, and the parameters that are gathered
        live = zero.get("stage3_max_live_parameters", _LIVE_ELEMENTS)
        forward += size * bucket + (size * min(place.elements, live) if plan.data > 1 else 0)
        # Backward's last gradient is the embedding's: itself, this rank's part of the reduced one, and that in fp32.
        update += size * place.largest + (size + 4) * -(-place.largest // plan.data)
    if offloaded:  # a gradient's norm is taken in fp64 while it is there
        pieces = min(-(-place.largest // plan.data), _NORM_ELEMENTS)
        update += 8 * (pieces if plan.zero_stage == 3 else place.largest)
    return forward, update


def _hidden(config: Config, plan: Plan) -> int:
    """Bytes of the residual stream of one micro-batch."""
    elements = plan.micro_batch * plan.sequence_length * config.model.width
    return ELEMENT_BYTES[plan.precision] * elements // (plan.tensor if plan.sequence_parallel else 1)


def _share(units: int, parts: int, rank: int) -> int:
    start, stop = partition(units, parts, rank)
    return stop - start


def kept_whole(config: Config) -> int:
    """Parameters of at most so many elements are kept whole under ZeRO 3."""
    return _zero_options(config).get("stage3_param_persistence_threshold", _WHOLE_UP_TO)


def _zero_options(config: Config) -> Mapping[str, Any]:
    return passed_on(config).get("zero_optimization", {})


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    unit + "iB": 1024**power for power, unit in enumerate("KMGT", 1)
}


def parse_bytes(text: str) -> int:
    """80GiB, 80GB (decimal) or a plain number of bytes. Raises ValueError for anything else."""
    number = text.strip().rstrip("KMGTBi")
    unit = text.strip()[len(number) :]
    try:
        value = float(number)
        size = value * {**_UNITS, "B": 1}[unit]
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is no amount of memory: write 80GiB, 80GB or a number of bytes") from None
    if not math.isfinite(size) or size < 1:
        raise ValueError(f"{text!r} is no amount of memory: it must be a positive number")
    return int(size)


def show_bytes(count: int) -> str:
    """In GiB, or MiB below a tenth of one."""
    if count >= 2**30 // 10:
        return f"{count / 2**30:,.2f} GiB"
    return f"{count / 2**20:,.1f} MiB"

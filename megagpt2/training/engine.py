"""DeepSpeed, configured in one place: (precision, ZeRO stage, pipeline) -> engine.

Every option here that is not self-evident avoids a wrong number that comes without an error:

- Never ZeRO 0: its bf16 form takes a phantom Adam step at construction, its fp32 form clips by a wrong norm
  under the pipeline. Ours runs as stage 1.
- Gradients accumulate in fp32.
- pipe_partitioned and grad_partitioned default to true and corrupt sequence-parallel activations.
- Recomputation is the block's own; DeepSpeed's reentrant default fails at the embedding.
- BF16_Optimizer takes each gradient when it is made (immediate_grad_update). By default it clears all bf16 gradients
  when backward reaches the output of the last pipeline stage; the head's, made before in loss_fn, would be lost.
- torch's AdamW is handed in: DeepSpeed's own compiles at start, and its CPU form is not bitwise on resume.
- Offload has traps of its own (offload.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megagpt2.config.passthrough import passed_on
from megagpt2.config.rules import Plan
from megagpt2.config.schema import Config
from megagpt2.kernels.choice import Kernels
from megagpt2.model.gpt2 import GPT2, layer_plans
from megagpt2.parallel.memory import return_freed_memory
from megagpt2.parallel.pipeline import Pipeline, adapt_engine
from megagpt2.parallel.quiet_deepspeed import deepspeed
from megagpt2.parallel.tensor import builder_for
from megagpt2.parallel.topology import ModelParallelUnit, Topology
from megagpt2.planning.stages import stage_bounds
from megagpt2.training import offload
from megagpt2.training.optimizer import build_optimizer

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_NEVER = 1 << 40  # steps between DeepSpeed's own progress lines


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """ours with the user's further options added; contradictions were refused by the rules before."""
    result = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def deepspeed_options(config: Config, plan: Plan) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    options = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "steps_per_print": _NEVER,
        "zero_optimization": {"stage": max(1, config.parallel.zero_stage), **offload.options(config, plan)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "pipeline": {
            "pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0,
            "use_reentrant": False,
        },
    }
    if config.parallel.zero_stage == 3:
        options["zero_optimization"]["memory_efficient_linear"] = False
    if plan.precision == "bf16":
        options["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if plan.precision == "fp16":
        options["fp16"] = {
            "enabled": True,
            "initial_scale_power": config.training.initial_loss_scale.bit_length() - 1,
            "loss_scale_window": config.training.loss_scale_window,
            "min_loss_scale": 1,
            "hysteresis": 1,  # every overflow halves the scale: by default the first one changes nothing
        }
    return merged(options, passed_on(config))


@dataclass
class Engine:
    """A DeepSpeed engine with what we need to know beside it."""

    deepspeed: Any
    topology: Topology
    config: Config
    plan: Plan
    device: torch.device
    bounds: list[int] | None = None  # the pipeline's cuts of the layer list

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def set_learning_rate(self, rate: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate

    @property
    def gradient_norm(self) -> float:
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @property
    def loss_scale(self) -> float | None:
        return float(self.deepspeed.optimizer.loss_scaler.cur_scale) if self.plan.precision == "fp16" else None

    def scaler_state(self) -> dict[str, float]:
        """fp16: what the dynamic loss scaler remembers."""
        if self.plan.precision != "fp16":
            return {}
        scaler = self.deepspeed.optimizer.loss_scaler
        return {name: float(getattr(scaler, name)) for name in _SCALER_FIELDS}

    def load_scaler(self, state: dict[str, float]) -> None:
        if self.plan.precision == "fp16" and state:
            scaler = self.deepspeed.optimizer.loss_scaler
            for name in _SCALER_FIELDS:
                setattr(scaler, name, type(getattr(scaler, name))(state[name]))

    def close(self) -> None:
        """Free hooks and groups (tests build many engines in one process)."""
        self.deepspeed.destroy()
        self.topology.close()
        offload.remove_files(self.config, self.topology.rank)


def _construct(config: Config, topology: Topology) -> tuple[nn.Module, list[int] | None]:
    """The module this rank runs, its parameters uninitialized."""
    kernels = Kernels(config.kernels.attention, config.kernels.layer_norm)
    builder = builder_for(config.training.seed, topology, config.parallel.sequence_parallel, kernels)
    recompute = config.parallel.activation_checkpointing
    if topology.pipeline == 1:
        return GPT2(config.model, builder, recompute), None
    bounds = stage_bounds(config.model, config.sequence_length, topology.pipeline, recompute)
    return Pipeline(layer_plans(config.model, recompute), bounds, builder, topology), bounds


def build_engine(config: Config, plan: Plan, topology: Topology, device: torch.device) -> Engine:
    """Construct the model and hand it to DeepSpeed. Weights come afterwards, through the load path.

    Raises ConfigError on every rank where one can't use `offload.nvme_path`.
    """
    offload.prepare(config, plan, lambda flag: agree_any(flag, device))
    options = deepspeed_options(config, plan)
    partitioned = contextlib.nullcontext()
    if config.parallel.zero_stage == 3:
        # No dtype argument: an operator precedence in DeepSpeed 0.19 makes any given one bf16 on a CPU without fp16.
        partitioned = deepspeed.zero.Init(data_parallel_group=topology.data_group, config_dict_or_path=options)
    with partitioned:
        module, bounds = _construct(config, topology)
    pipeline = topology.pipeline > 1
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=build_optimizer(module, config.optimizer, config.kernels.adam, topology),
        config=options,
        mpu=None if pipeline else ModelParallelUnit(topology),
        dist_init_required=False,
    )
    if pipeline:
        adapt_engine(engine)
    if plan.precision == "fp16":  # at the smallest scale too an overflow is a skipped step: the loop counts those
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    if config.offload.optimizer == "nvme":
        offload.keep_gradients_in_memory(engine.optimizer)
    if config.offload.optimizer == "cpu" and config.parallel.zero_stage < 3:
        offload.forget_overflowed_gradients(engine.optimizer)
    return_freed_memory()
    return Engine(engine, topology, config, plan, device, bounds)


def agree_any(flag: bool, device: torch.device) -> bool:
    """Whether any rank says so: decisions that all ranks must take alike."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    tensor = torch.tensor([float(flag)], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())

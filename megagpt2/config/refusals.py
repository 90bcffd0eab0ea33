"""One function per rule about legal combinations; `rules.py` holds the table of them.

A function returns None where the request is legal, else a `Refusal`: what was asked, why it can't be, and
candidate changes, nearest first, which `rules.py` offers after it has checked that they are legal.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megagpt2.config.facts import Facts
from megagpt2.config.schema import Config

Change = Mapping[str, Any]
"""New values by dotted field, as `Config.replace` takes them."""

TENSOR, PIPELINE = "parallel.tensor_parallel", "parallel.pipeline_parallel"

DEEPSPEED_OWNED: dict[str, str] = {
    "train_batch_size": "batch.global_batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.global_batch and batch.micro_batch",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "offload.optimizer",
    "zero_optimization.offload_param": "offload.parameters",
    "tensor_parallel": "parallel.tensor_parallel",
    "sequence_parallel_size": "parallel.sequence_parallel",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "pipeline.activation_checkpoint_interval": "parallel.activation_checkpointing",
    "pipeline.use_reentrant": "parallel.activation_checkpointing",
    "pipeline.pipe_partitioned": "parallel.sequence_parallel",
    "pipeline.grad_partitioned": "parallel.sequence_parallel",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "fp16.auto_cast": "training.precision",
    "fp16.loss_scale": "training.initial_loss_scale",
    "fp16.initial_scale_power": "training.initial_loss_scale",
    "fp16.loss_scale_window": "training.loss_scale_window",
    "fp16.min_loss_scale": "training.initial_loss_scale",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "scheduler": "schedule",
    "tensorboard": "monitor.tensorboard",
    "steps_per_print": "monitor.console_every",
}
"""DeepSpeed's options that our fields decide, and the field that does."""

DEEPSPEED_ALLOWED: tuple[str, ...] = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_scatter",
    "zero_optimization.allgather_partitions",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "aio.block_size",
    "aio.queue_depth",
    "aio.intra_op_parallelism",
    "aio.single_submit",
    "aio.overlap_events",
    "comms_logger.enabled",
    "comms_logger.prof_all",
    "comms_logger.prof_ops",
    "comms_logger.verbose",
    "comms_logger.debug",
    "flops_profiler.enabled",
    "flops_profiler.recompute_fwd_factor",
    "flops_profiler.profile_step",
    "flops_profiler.module_depth",
    "flops_profiler.top_modules",
    "flops_profiler.detailed",
    "flops_profiler.output_file",
    "wall_clock_breakdown",
    "dump_state",
)
"""DeepSpeed's options that pass through: they decide where things lie and what is shown, not what is computed.

Names as in DeepSpeed 0.19.8. Left out is aio.use_gds, whose operator would be compiled at the first use.
"""


@dataclass(frozen=True)
class Refusal:
    """Why a request is illegal, in parts."""

    field: str
    """Dotted field that is named first."""
    asked: str
    """What was asked of it."""
    why: str
    """Completes "..., but "."""
    candidates: Iterable[Change] = ()
    """Changes that may make it legal, nearest first; they may be many, and are looked at only when shown."""
    remedy: str = ""
    """Said instead of the candidates where a value can't say it."""


def data_parallel(config: Config, facts: Facts) -> int | None:
    """Data-parallel size, or None where ranks don't divide."""
    data, rest = divmod(facts.world_size, config.parallel.tensor_parallel * config.parallel.pipeline_parallel)
    return None if rest or data < 1 else data


def resolved_precision(config: Config, facts: Facts) -> str:
    """bf16, fp16 or fp32: what `auto` means on this machine."""
    if config.training.precision != "auto":
        return config.training.precision
    return "bf16" if facts.bf16 else "fp32"


def _near(value: int, low: int, high: int) -> Iterator[int]:
    """Integers of [low, high], nearest to the value first, at most 400."""
    start = min(max(value, low), high)
    ordered = (start + sign * step for step in range(high - low + 1) for sign in ((-1, 1) if step else (1,)))
    return islice((number for number in ordered if low <= number <= high), 400)


def _near_multiples(value: int, unit: int) -> list[int]:
    """The multiples of unit at or around the value, at least one unit, nearest first."""
    below, above = value // unit * unit, -(-value // unit) * unit
    around = {number for number in (below, above) if number}
    return sorted(around, key=lambda number: (abs(number - value), number))


def _changed(*fields: tuple[str, int, int]) -> Change:
    """Of (field, present value, candidate) those that differ."""
    return {field: candidate for field, value, candidate in fields if candidate != value}


def _each(field: str, values: Iterable[Any]) -> Iterator[Change]:
    return ({field: value} for value in values)


def deepspeed_present(config: Config, facts: Facts) -> Refusal | None:
    """Training runs on DeepSpeed's engines."""
    if facts.deepspeed:
        return None
    why = "it runs on DeepSpeed's engines, and the package deepspeed can't be imported here"
    return Refusal("training", "a training run", why, remedy="install it: make setup")


def device_present(config: Config, facts: Facts) -> Refusal | None:
    """A device that was asked for by name must be there."""
    if config.training.device in ("auto", facts.device):
        return None
    why = f"this machine runs on {facts.device}"
    candidates = _each("training.device", (facts.device, "auto"))
    return Refusal("training.device", config.training.device, why, candidates)


def world_divides(config: Config, facts: Facts) -> Refusal | None:
    """Ranks must be a whole number of model copies."""
    if data_parallel(config, facts):
        return None
    tensor, pipeline = config.parallel.tensor_parallel, config.parallel.pipeline_parallel
    world, copy = facts.world_size, tensor * pipeline
    divisors = [number for number in range(1, world + 1) if world % number == 0]
    layouts = [(t, p) for t in divisors for p in divisors if world % (t * p) == 0]
    distances = [((t != tensor) + (p != pipeline), abs(t - tensor) + abs(p - pipeline)) for t, p in layouts]
    nearest = [layout for _, layout in sorted(zip(distances, layouts, strict=True))]
    candidates = (_changed((TENSOR, tensor, t), (PIPELINE, pipeline, p)) for t, p in nearest)
    worlds = " or ".join(str(number) for number in sorted(_near_multiples(world, copy)))
    why = (
        f"{world} rank{'s'[: world - 1]} / ({tensor} x {pipeline}) = {world / copy:.4g} is not a whole number of "
        f"data-parallel copies (it is for {worlds} ranks)"
    )
    return Refusal(TENSOR, f"{tensor} x pipeline_parallel {pipeline} = {copy}", why, candidates)


def heads_over_tensor(config: Config, facts: Facts) -> Refusal | None:
    """Every tensor-parallel rank needs a head."""
    tensor, heads = config.parallel.tensor_parallel, config.model.heads
    if heads >= tensor:
        return None
    why = f"the model has {heads} heads and each rank needs at least one"
    return Refusal(TENSOR, str(tensor), why, _each(TENSOR, range(heads, 0, -1)))


def matrices_over_tensor(config: Config, facts: Facts) -> Refusal | None:
    """Every tensor-parallel rank needs a column of the MLP and a row of the embedding."""
    tensor, inner, rows = config.parallel.tensor_parallel, config.model.inner, config.model.padded_vocabulary
    if min(inner, rows) >= tensor:
        return None
    why = f"the MLP has {inner} columns, the padded vocabulary {rows} rows, and each rank needs at least one"
    return Refusal(TENSOR, str(tensor), why, _each(TENSOR, range(min(inner, rows), 0, -1)))


def layers_over_pipeline(config: Config, facts: Facts) -> Refusal | None:
    """Every pipeline stage needs a block."""
    pipeline, layers = config.parallel.pipeline_parallel, config.model.layers
    if layers >= pipeline:
        return None
    why = f"the model has {layers} layers and each stage needs at least one"
    return Refusal(PIPELINE, str(pipeline), why, _each(PIPELINE, range(layers, 0, -1)))


def zero_with_pipeline(config: Config, facts: Facts) -> Refusal | None:
    """DeepSpeed's pipeline engine takes ZeRO 0 and 1 only."""
    stage, pipeline = config.parallel.zero_stage, config.parallel.pipeline_parallel
    if stage < 2 or pipeline == 1:
        return None
    why = f"pipeline_parallel is {pipeline}, and DeepSpeed's pipeline engine takes stages 0 and 1 only"
    candidates = ({"parallel.zero_stage": 1}, {PIPELINE: 1})
    return Refusal("parallel.zero_stage", str(stage), why, candidates)


def sequence_needs_tensor(config: Config, facts: Facts) -> Refusal | None:
    """Sequence parallelism splits over tensor-parallel ranks."""
    if not config.parallel.sequence_parallel or config.parallel.tensor_parallel > 1:
        return None
    why = "it splits activations over tensor-parallel ranks, and tensor_parallel is 1"
    larger = (size for size in range(2, facts.world_size + 1) if facts.world_size % size == 0)
    candidates = [{"parallel.sequence_parallel": False}, *_each(TENSOR, larger)]
    return Refusal("parallel.sequence_parallel", "true", why, candidates)


def sequence_splits(config: Config, facts: Facts) -> Refusal | None:
    """Under sequence parallelism every rank holds the same number of positions."""
    length, tensor = config.sequence_length, config.parallel.tensor_parallel
    if not config.parallel.sequence_parallel or length % tensor == 0:
        return None
    why = f"sequence_parallel splits it over {tensor} ranks, and {length} / {tensor} = {length / tensor:.4g}"
    candidates = (
        *_each("batch.sequence_length", _near_multiples(length, tensor)),
        {"parallel.sequence_parallel": False},
    )
    return Refusal("batch.sequence_length", str(length), why, candidates)


def sequence_fits(config: Config, facts: Facts) -> Refusal | None:
    """There is a learned position for every token."""
    length, context = config.sequence_length, config.model.context
    if length <= context:
        return None
    why = f"the model has {context} positions (model.context)"
    unit = config.parallel.tensor_parallel if config.parallel.sequence_parallel else 1
    candidates = ({"batch.sequence_length": context // unit * unit}, {"model.context": length})
    return Refusal("batch.sequence_length", str(length), why, candidates)


def batch_divides(config: Config, facts: Facts) -> Refusal | None:
    """A step is a whole number of micro-batches on every rank."""
    data = data_parallel(config, facts)
    batch, micro = config.batch.global_batch, config.batch.micro_batch
    if data is None or batch % (micro * data) == 0:
        return None
    why = f"micro_batch {micro} x data-parallel size {data} = {micro * data}, and {batch} / {micro * data} = "
    why += f"{batch / (micro * data):.4g} is not a whole number of micro-batches"
    candidates = (
        *_each("batch.global_batch", _near_multiples(batch, micro * data)),
        *_each("batch.micro_batch", (size for size in _near(micro, 1, batch) if batch % (size * data) == 0)),
    )
    return Refusal("batch.global_batch", str(batch), why, candidates)


def ramp_fits(config: Config, facts: Facts) -> Refusal | None:
    """A ramp rises, and every batch on the way is a whole number of micro-batches."""
    ramp, batch, data = config.batch.ramp_up, config.batch.global_batch, data_parallel(config, facts)
    if ramp is None or data is None:
        return None
    unit = config.batch.micro_batch * data
    if ramp.start % unit == 0 and ramp.increment % unit == 0 and ramp.start <= batch:
        return None
    candidates = [
        _changed(("batch.ramp_up.start", ramp.start, start), ("batch.ramp_up.increment", ramp.increment, increment))
        for start in _near_multiples(min(ramp.start, batch), unit)
        for increment in _near_multiples(ramp.increment, unit)
    ]
    why = (
        f"every batch of the ramp must be a multiple of micro_batch {config.batch.micro_batch} x "
        f"data-parallel size {data} = {unit}, and at most global_batch {batch}"
    )
    asked = f"start {ramp.start}, increment {ramp.increment}"
    return Refusal("batch.ramp_up", asked, why, [*candidates, {"batch.ramp_up": None}])


def fp16_usable(config: Config, facts: Facts) -> Refusal | None:
    """fp16 needs a device that computes it."""
    if config.training.precision != "fp16" or facts.fp16:
        return None
    why = f"this {facts.device} does not compute fp16"
    values = ("bf16", "fp32") if facts.bf16 else ("fp32", "bf16")
    return Refusal("training.precision", "fp16", why, _each("training.precision", values))


def bf16_usable(config: Config, facts: Facts) -> Refusal | None:
    """bf16 on a GPU needs one that computes it; CPUs emulate it, correctly and slowly."""
    if config.training.precision != "bf16" or facts.bf16 or facts.device == "cpu":
        return None
    why = "this GPU does not compute bf16 (that takes compute capability 8.0)"
    return Refusal("training.precision", "bf16", why, _each("training.precision", ("fp16", "fp32")))


def warmup_fits(config: Config, facts: Facts) -> Refusal | None:
    """The warm-up ends before the decay does, and under wsd before it begins."""
    schedule, steps = config.schedule, config.decay_steps
    if schedule.name == "constant":
        return None
    share = schedule.wsd_decay_fraction if schedule.name == "wsd" else 0.0
    limit = int(steps * (1 - share) + 1e-6)
    if schedule.warmup_steps <= limit:
        return None
    why = f"the rate reaches its minimum at step {steps} (schedule.decay_steps, or else training.steps)"
    why += f" and falls from step {limit} on" if share else ""
    candidates = [{"schedule.warmup_steps": limit}]
    if share < 1:
        candidates.append({"schedule.decay_steps": math.ceil(schedule.warmup_steps / (1 - share))})
    return Refusal("schedule.warmup_steps", str(schedule.warmup_steps), why, candidates)


def validation_has_data(config: Config, facts: Facts) -> Refusal | None:
    """Validation needs a corpus."""
    if not config.validation.every or config.data.valid is not None:
        return None
    why = "data.valid names no corpus: set data.valid=PREFIX"
    return Refusal("validation.every", str(config.validation.every), why, ({"validation.every": 0},))


def samples_have_tokenizer(config: Config, facts: Facts) -> Refusal | None:
    """Samples need a tokenizer."""
    if not config.monitor.sample_every or config.data.tokenizer is not None:
        return None
    why = "data.tokenizer names none: set data.tokenizer=DIRECTORY"
    candidates = ({"monitor.sample_every": 0},)
    return Refusal("monitor.sample_every", str(config.monitor.sample_every), why, candidates)


def deepspeed_contradicts(config: Config, facts: Facts) -> Refusal | None:
    """One place decides a thing."""
    found = {theirs: ours for theirs, ours in DEEPSPEED_OWNED.items() if _has(config.deepspeed, theirs)}
    if not found:
        return None
    why = ", ".join(f"{theirs} is decided by our {ours}" for theirs, ours in found.items())
    rest: Any = config.deepspeed
    for theirs in found:
        rest = _without(rest, theirs.split("."))
    asked = ", ".join(f"deepspeed.{theirs}" for theirs in found)
    remedy = f"remove {'it' if len(found) == 1 else 'them'} there"
    return Refusal("deepspeed", asked, why, ({"deepspeed": rest},), remedy)


def deepspeed_inexact(config: Config, facts: Facts) -> Refusal | None:
    """Only what is known to be harmless passes: DeepSpeed computes otherwise under many options, and ignores unknown
    ones."""
    found = list(_strangers(config.deepspeed))
    if not found:
        return None
    why = ", ".join(map(_why_not, found))
    rest: Any = config.deepspeed
    for path in found:
        rest = _without(rest, list(path))
    asked = ", ".join(".".join(("deepspeed", *path)) for path in found)
    remedy = f"remove {'it' if len(found) == 1 else 'them'} there"
    return Refusal("deepspeed", asked, why, ({"deepspeed": rest},), remedy)


def _children(parent: tuple[str, ...], options: Iterable[str]) -> list[str]:
    """The keys directly below the section, in order, out of dotted options."""
    paths = [tuple(option.split(".")) for option in options]
    depth = len(parent)
    return list(dict.fromkeys(path[depth] for path in paths if len(path) > depth and path[:depth] == parent))


def _strangers(options: Mapping[str, Any], parent: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of keys that are neither allowed nor ours; a section of them is named once, without its keys."""
    known = (*DEEPSPEED_ALLOWED, *DEEPSPEED_OWNED)
    for key, value in options.items():
        path = (*parent, key)
        if "." not in key and ".".join(path) in known:
            continue
        if isinstance(value, Mapping) and key in _children(parent, known):
            yield from _strangers(value, path)
        else:
            yield path


def _why_not(path: tuple[str, ...]) -> str:
    """Of a key that is neither allowed nor ours."""
    parent, key, name = path[:-1], path[-1], ".".join(path)
    known = (*DEEPSPEED_ALLOWED, *DEEPSPEED_OWNED)
    if key in _children(parent, known):  # DeepSpeed reads `zero_optimization: true` as another stage
        return f"{name} must be a section"
    here = [".".join((*parent, child)) for child in _children(parent, known)]
    near = _nearest(key, here) or _nearest(key.rpartition(".")[2], known)
    allowed = _children(parent, DEEPSPEED_ALLOWED)
    if near in DEEPSPEED_OWNED:
        hint = f"nearest: {near}, which is decided by our {DEEPSPEED_OWNED[near]}"
    elif near:
        hint = f"nearest: {near}"
    elif allowed:
        hint = f"{'these are' if not parent else 'of ' + '.'.join(parent) + ' these are'} {', '.join(allowed)}"
    else:
        hint = f"none of {'.'.join(parent)} is; these are {', '.join(_children((), DEEPSPEED_ALLOWED))}"
    return f"{name} is not among the options that are known to leave results exact ({hint})"


def _nearest(key: str, options: Iterable[str]) -> str | None:
    """The dotted option whose last part is most like the key, if one is."""
    by_key: dict[str, str] = {}
    for option in options:
        by_key.setdefault(option.rpartition(".")[2], option)
    found = difflib.get_close_matches(key, by_key, 1, 0.8)
    return by_key[found[0]] if found else None


def _has(options: Any, dotted: str) -> bool:
    """Does the nested mapping have that key?"""
    for part in dotted.split("."):
        if not isinstance(options, Mapping) or part not in options:
            return False
        options = options[part]
    return True


def _without(options: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """A copy without the key at the end of the path, and without sections that this empties."""
    inner = _without(options[path[0]], path[1:]) if len(path) > 1 else {}
    rest = {key: value for key, value in options.items() if key != path[0]}
    return {**rest, path[0]: inner} if inner else rest

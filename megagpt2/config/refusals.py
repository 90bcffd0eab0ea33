"""One function per rule about legal combinations; `rules.py` holds the table of them.

A function returns None where the request is legal, else a `Refusal`: what was asked, why it can't be, and
candidate changes, nearest first, which `rules.py` offers after it has checked that they are legal.
"""

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

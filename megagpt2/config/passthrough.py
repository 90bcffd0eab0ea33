"""What a request may hand on to DeepSpeed (`deepspeed` in the configuration): which keys, and which values of each.

DeepSpeed checks a part of its options, after the process group exists, and ignores or passes on the rest; here all are
checked before, by the rules below (in the form of `refusals.py`), and `passed_on` gives them as DeepSpeed takes them.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from megagpt2.config import yaml_format
from megagpt2.config.facts import Facts
from megagpt2.config.refusals import Refusal
from megagpt2.config.schema import Config

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

_MOST = 1 << 53  # a larger number with an exponent is not the integer that it looks like
_MOST_IN_C = (1 << 31) - 1


def _number(value: Any) -> Any:
    """Text that reads as a number is one, as for DeepSpeed: "500000000", "5e8"."""
    if isinstance(value, str):
        try:
            value = yaml_format.parse(value)
        except (yaml.YAMLError, ValueError):
            return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


@dataclass(frozen=True)
class Whole:
    """An integer of [low, high] that is a multiple of `multiple`; 5e8 is one."""

    default: int
    """DeepSpeed's own value."""
    low: int
    high: int = _MOST
    multiple: int = 1

    def __str__(self) -> str:
        bounds = f"an integer >= {self.low}" + (f" and <= {self.high}" if self.high < _MOST else "")
        return bounds + (f", a multiple of {self.multiple}" if self.multiple > 1 else "")

    def read(self, value: Any) -> int | None:
        """The value as DeepSpeed takes it, None where it is illegal."""
        number = _number(value)
        if number is None or number != int(number):
            return None
        return int(number) if self.low <= number <= self.high and int(number) % self.multiple == 0 else None

    def nearest(self, value: Any) -> int:
        """The legal value that is nearest; DeepSpeed's own where it is no number."""
        number = _number(value)
        if number is None:
            return self.default
        bounded = min(max(number, self.low), self.high - self.high % self.multiple)
        return max(self.low, round(bounded / self.multiple) * self.multiple)


@dataclass(frozen=True)
class Number:
    """A number from `low` on."""

    default: float
    low: float

    def __str__(self) -> str:
        return f"a number >= {self.low:g}"

    def read(self, value: Any) -> float | None:
        """As Whole's."""
        number = _number(value)
        return None if number is None or number < self.low else float(number)

    def nearest(self, value: Any) -> float:
        """As Whole's."""
        return self.default if _number(value) is None else self.low


@dataclass(frozen=True)
class Flag:
    """true or false; not 1, "yes" or "true", which DeepSpeed reads as true in one section and hands on in others."""

    default: bool

    def __str__(self) -> str:
        return "true or false"

    def read(self, value: Any) -> bool | None:
        """As Whole's."""
        return value if isinstance(value, bool) else None

    def nearest(self, value: Any) -> bool:
        """As Whole's."""
        words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False}
        return words.get(str(value).lower(), self.default if value != 0 else False)


@dataclass(frozen=True)
class File:
    """The name of a file."""

    default: None = None

    def __str__(self) -> str:
        return "the name of a file"

    def read(self, value: Any) -> str | None:
        """As Whole's."""
        return value if isinstance(value, str) and value.strip() else None

    def nearest(self, value: Any) -> str:
        """As Whole's."""
        return "flops.txt"


@dataclass(frozen=True)
class Words:
    """A list of names."""

    default: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "a list of text"

    def read(self, value: Any) -> list[str] | None:
        """As Whole's."""
        return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None

    def nearest(self, value: Any) -> list[str]:
        """As Whole's."""
        return [value] if isinstance(value, str) else []


Kind = Whole | Number | Flag | File | Words

DEEPSPEED_ALLOWED: Mapping[str, Kind] = {
    "zero_optimization.reduce_bucket_size": Whole(500_000_000, 1),
    "zero_optimization.allgather_bucket_size": Whole(500_000_000, 2, multiple=2),
    "zero_optimization.overlap_comm": Flag(False),  # DeepSpeed's own: true in stage 3
    "zero_optimization.reduce_scatter": Flag(True),
    "zero_optimization.allgather_partitions": Flag(True),
    "zero_optimization.contiguous_gradients": Flag(True),
    "zero_optimization.sub_group_size": Whole(1_000_000_000, 1),
    "zero_optimization.stage3_max_live_parameters": Whole(1_000_000_000, 0),
    "zero_optimization.stage3_max_reuse_distance": Whole(1_000_000_000, 0),
    "zero_optimization.stage3_prefetch_bucket_size": Whole(50_000_000, 0),
    "zero_optimization.stage3_param_persistence_threshold": Whole(100_000, 0),
    # Direct reads and writes are of multiples of 512 bytes; with other blocks DeepSpeed's operators end the process.
    "aio.block_size": Whole(1_048_576, 512, _MOST_IN_C, 512),
    # Linux allows a machine 65,536 requests at once (fs.aio-max-nr), which all ranks, their handles and the threads of
    # each share; beyond them the operators end the process.
    "aio.queue_depth": Whole(8, 1, 1024),
    "aio.intra_op_parallelism": Whole(1, 1, 64),  # threads
    "aio.single_submit": Flag(False),
    "aio.overlap_events": Flag(True),
    "comms_logger.enabled": Flag(False),
    "comms_logger.prof_all": Flag(True),
    "comms_logger.prof_ops": Words(),
    "comms_logger.verbose": Flag(False),
    "comms_logger.debug": Flag(False),
    "flops_profiler.enabled": Flag(False),
    "flops_profiler.recompute_fwd_factor": Number(0.0, 0.0),
    "flops_profiler.profile_step": Whole(1, 0),
    "flops_profiler.module_depth": Whole(-1, -1),
    "flops_profiler.top_modules": Whole(1, 1),
    "flops_profiler.detailed": Flag(True),
    "flops_profiler.output_file": File(),
    "wall_clock_breakdown": Flag(False),
    "dump_state": Flag(False),
}
"""DeepSpeed's options that pass through, with what a value may be: they decide where things lie and what is shown, not
what is computed.

Names, bounds and defaults as in DeepSpeed 0.19.8. Left out is aio.use_gds, whose operator would be compiled at the
first use.
"""


def given(config: Config, option: str) -> Any:
    """The value of one that is asked for, as DeepSpeed takes it; None where there is none, or an illegal one."""
    return DEEPSPEED_ALLOWED[option].read(_at(config.deepspeed, option)) if _has(config.deepspeed, option) else None


def passed_on(config: Config) -> dict[str, Any]:
    """The section `deepspeed` of a legal request as DeepSpeed takes it: 5e8 is an integer."""
    options: Any = config.deepspeed
    for name, kind in DEEPSPEED_ALLOWED.items():
        if _has(options, name):
            value = kind.read(_at(options, name))
            assert value is not None, name  # deepspeed-values
            options = _with(options, name.split("."), value)
    return options


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


def deepspeed_values(config: Config, facts: Facts) -> Refusal | None:
    """DeepSpeed must not be the one to find a value that can't be: it does so late, or not at all."""
    given = {name: _at(config.deepspeed, name) for name in DEEPSPEED_ALLOWED if _has(config.deepspeed, name)}
    wrong = {name: value for name, value in given.items() if DEEPSPEED_ALLOWED[name].read(value) is None}
    if not wrong:
        return None
    asked = ", ".join(f"deepspeed.{name}={yaml_format.as_scalar(value)}" for name, value in wrong.items())
    why = ", ".join(f"{name} must be {DEEPSPEED_ALLOWED[name]}" for name in wrong)
    nearest = {f"deepspeed.{name}": DEEPSPEED_ALLOWED[name].nearest(value) for name, value in wrong.items()}
    return Refusal("deepspeed", asked, why, (nearest,))


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


def _at(options: Any, dotted: str) -> Any:
    """The value of a key that is there."""
    for part in dotted.split("."):
        options = options[part]
    return options


def _with(options: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy with another value at the end of the path, which is there."""
    return {**options, path[0]: _with(options[path[0]], path[1:], value) if len(path) > 1 else value}

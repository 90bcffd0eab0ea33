"""The one table of legal combinations: the check before the first process group, the docs and the tests use
it.

    plan = check(config, Facts.detect(world_size, config.training.device))

`check` returns what follows from a legal request (`Plan`), or raises `IllegalRequest` with one sentence per
violated rule. What it suggests instead has itself been checked against every rule.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import get_args

from pydantic import ValidationError

from megagpt2.config import choosing, offloading, passthrough, refusals, yaml_format
from megagpt2.config.batching import accumulation_steps, ramped_batch
from megagpt2.config.errors import ConfigError
from megagpt2.config.facts import Facts
from megagpt2.config.refusals import Change, Refusal
from megagpt2.config.schema import Config, Recomputation

__all__ = [
    "RULES",
    "Facts",
    "IllegalRequest",
    "Plan",
    "Rule",
    "Violation",
    "accumulation_steps",
    "check",
    "legal_layouts",
    "ramped_batch",
    "rules_table_markdown",
    "violations",
]

SHOWN = 2
"""Suggestions shown for one combination of fields."""


@dataclass(frozen=True)
class Rule:
    """One thing that can't be."""

    name: str
    forbids: str
    """One sentence for the docs."""
    check: Callable[[Config, Facts], Refusal | None]


RULES: tuple[Rule, ...] = (
    Rule("deepspeed-present", "Training without DeepSpeed.", refusals.deepspeed_present),
    Rule("device-present", "A `training.device` that the machine has not.", refusals.device_present),
    Rule(
        "world-divides",
        "A number of ranks that is no multiple of `tensor_parallel` x `pipeline_parallel`.",
        refusals.world_divides,
    ),
    Rule(
        "heads-over-tensor",
        "More tensor-parallel ranks than heads (an uneven split is legal: 25 heads over 8 ranks).",
        refusals.heads_over_tensor,
    ),
    Rule(
        "matrices-over-tensor",
        "More tensor-parallel ranks than MLP columns or rows of the padded vocabulary.",
        refusals.matrices_over_tensor,
    ),
    Rule("layers-over-pipeline", "More pipeline stages than layers.", refusals.layers_over_pipeline),
    Rule("zero-with-pipeline", "ZeRO stage 2 or 3 with a pipeline.", refusals.zero_with_pipeline),
    Rule(
        "sequence-needs-tensor",
        "`sequence_parallel` without `tensor_parallel` > 1.",
        refusals.sequence_needs_tensor,
    ),
    Rule(
        "sequence-splits",
        "Under `sequence_parallel`, a `sequence_length` that is no multiple of `tensor_parallel`.",
        refusals.sequence_splits,
    ),
    Rule("sequence-fits", "A `sequence_length` above `model.context`.", refusals.sequence_fits),
    Rule(
        "batch-divides",
        "A `global_batch` that is no multiple of `micro_batch` x data-parallel size.",
        refusals.batch_divides,
    ),
    Rule(
        "ramp-fits",
        "A batch ramp whose `start` or `increment` is no multiple of `micro_batch` x data-parallel size, or "
        "that starts above `global_batch`.",
        refusals.ramp_fits,
    ),
    Rule("fp16-usable", "fp16 on a device that does not compute it.", refusals.fp16_usable),
    Rule(
        "bf16-usable",
        "bf16 on a GPU that does not compute it (on a CPU without it, it is emulated, with a warning).",
        refusals.bf16_usable,
    ),
    Rule(
        "attention-draws-dropout",
        "`kernels.attention: sdpa` with `model.attention_dropout`.",
        choosing.attention_draws_dropout,
    ),
    Rule("apex-present", "`apex` in `kernels` where NVIDIA apex can't be imported.", choosing.apex_present),
    Rule(
        "apex-adam-on-gpu",
        "`kernels.adam: apex` with `offload.optimizer`: the processor updates what is offloaded.",
        choosing.apex_adam_on_gpu,
    ),
    Rule(
        "operators-present",
        "A GPU for which the compiled operators are not built, unless `kernels.allow_reference`.",
        choosing.operators_present,
    ),
    Rule(
        "warmup-fits",
        "A warm-up longer than `decay_steps`, or under `wsd` than the part before the decay.",
        refusals.warmup_fits,
    ),
    Rule("validation-has-data", "`validation.every` without `data.valid`.", refusals.validation_has_data),
    Rule(
        "samples-have-tokenizer",
        "`monitor.sample_every` without `data.tokenizer`.",
        refusals.samples_have_tokenizer,
    ),
    Rule(
        "deepspeed-contradicts",
        "A key in `deepspeed` that one of our fields decides.",
        passthrough.deepspeed_contradicts,
    ),
    Rule(
        "deepspeed-inexact",
        "Any other key in `deepspeed` than those listed above: many change what is computed, and DeepSpeed ignores a "
        "misspelt one.",
        passthrough.deepspeed_inexact,
    ),
    Rule(
        "deepspeed-values",
        "A value in `deepspeed` that is not of its kind or out of bounds, by the table above.",
        passthrough.deepspeed_values,
    ),
    Rule("optimizer-offload", "`offload.optimizer: nvme` below `zero_stage` 3.", offloading.optimizer_offload),
    Rule("parameters-offload", "`offload.parameters` below `zero_stage` 3.", offloading.parameters_offload),
    Rule(
        "nvme-gathers",
        "With `offload.parameters: nvme`, `stage3_max_live_parameters`, `stage3_max_reuse_distance` or "
        "`stage3_prefetch_bucket_size` in `deepspeed.zero_optimization` above 0, or "
        "`stage3_param_persistence_threshold` above 100000.",
        offloading.nvme_gathers,
    ),
    Rule("nvme-has-path", "`nvme` in `offload` without `offload.nvme_path`.", offloading.nvme_has_path),
    Rule(
        "nvme-operators",
        "`nvme` in `offload` where DeepSpeed's operators for it are not built (`make setup-nvme`, which needs libaio).",
        offloading.nvme_operators,
    ),
)


@dataclass(frozen=True)
class Plan:
    """What follows from a legal request on a machine: everything resolved, nothing `auto`."""

    world_size: int
    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    zero_stage: int
    activation_checkpointing: str
    device: str
    precision: str
    global_batch: int
    micro_batch: int
    accumulation: int
    """Micro-batches per rank and step, once a ramp-up has ended."""
    sequence_length: int
    warnings: tuple[str, ...] = ()
    """Legal, but wasteful or slow; one sentence each."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step trains on, over all ranks."""
        return self.global_batch * self.sequence_length

    @property
    def name(self) -> str:
        """A short name of the layout: tp2-pp1-dp4-sp-zero1-full."""
        parts = [f"tp{self.tensor}", f"pp{self.pipeline}", f"dp{self.data}"]
        parts += ["sp"] * self.sequence_parallel + [f"zero{self.zero_stage}", self.activation_checkpointing]
        return "-".join(parts)

    def changes(self) -> dict[str, object]:
        """The layout as dotted fields, for `Config.replace`."""
        return {
            "parallel.tensor_parallel": self.tensor,
            "parallel.pipeline_parallel": self.pipeline,
            "parallel.sequence_parallel": self.sequence_parallel,
            "parallel.zero_stage": self.zero_stage,
            "parallel.activation_checkpointing": self.activation_checkpointing,
        }


@dataclass(frozen=True)
class Violation:
    """A violated rule, with the legal requests that are nearest."""

    rule: str
    refusal: Refusal
    suggestions: tuple[Change, ...]
    legal: bool = True
    """Whether nothing is left to refuse after a suggestion; else it ends this violation, and others stay."""

    def __str__(self) -> str:
        sentence = f"{self.refusal.field}: {self.refusal.asked} was asked, but {self.refusal.why}"
        remedy = self.refusal.remedy or _rendered(self.refusal.field, self.suggestions, self.legal)
        return f"{sentence}; {remedy}" if remedy else sentence


class IllegalRequest(ConfigError):  # noqa: N818 (it says more than RequestError)
    """A request that breaks rules; `violations` holds them, the message has one sentence for each."""

    def __init__(self, found: Iterable[Violation]) -> None:
        self.violations = tuple(found)
        super().__init__("\n".join(str(violation) for violation in self.violations))


def check(config: Config, facts: Facts) -> Plan:
    """What follows from the request on this machine. Raises IllegalRequest where a rule forbids it."""
    found = violations(config, facts)
    if found:
        raise IllegalRequest(found)
    parallel, batch = config.parallel, config.batch
    data = refusals.data_parallel(config, facts)
    assert data is not None  # world-divides
    plan = Plan(
        world_size=facts.world_size,
        tensor=parallel.tensor_parallel,
        pipeline=parallel.pipeline_parallel,
        data=data,
        sequence_parallel=parallel.sequence_parallel,
        zero_stage=parallel.zero_stage,
        activation_checkpointing=parallel.activation_checkpointing,
        device=facts.device,
        precision=refusals.resolved_precision(config, facts),
        global_batch=batch.global_batch,
        micro_batch=batch.micro_batch,
        accumulation=accumulation_steps(batch.global_batch, batch.micro_batch, data),
        sequence_length=config.sequence_length,
    )
    return replace(plan, warnings=tuple(_warnings(config, facts, plan)))


def violations(config: Config, facts: Facts) -> list[Violation]:
    """All violated rules, in the table's order, with suggestions."""
    refused = _refused(config, facts)
    return [
        Violation(name, refusal, *_suggestions(config, facts, refusal, set(refused) - {name}))
        for name, refusal in refused.items()
    ]


def legal_layouts(config: Config, world_sizes: Iterable[int], facts: Facts) -> Iterator[Plan]:
    """Every legal way to spread this configuration over each number of ranks.

    Batch, model and the rest stay as they are, so that a layout whose data-parallel size does not divide the
    batch is left out. `config.replace(plan.changes())` is the request behind a plan.
    """
    for world_size in world_sizes:
        here = replace(facts, world_size=world_size)
        divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
        for tensor, pipeline, sequence, zero, recompute in product(
            divisors, divisors, (False, True), range(4), get_args(Recomputation)
        ):
            asked = config.replace(
                {
                    "parallel.tensor_parallel": tensor,
                    "parallel.pipeline_parallel": pipeline,
                    "parallel.sequence_parallel": sequence,
                    "parallel.zero_stage": zero,
                    "parallel.activation_checkpointing": recompute,
                }
            )
            if not _refused(asked, here):
                yield check(asked, here)


def rules_table_markdown() -> str:
    """The table for docs/reference/config.md."""
    lines = ["| Rule | Refused |", "|---|---|"]
    lines += [f"| {rule.name} | {rule.forbids} |" for rule in RULES]
    return "\n".join(lines) + "\n"


def _refused(config: Config, facts: Facts) -> dict[str, Refusal]:
    return {rule.name: refusal for rule in RULES if (refusal := rule.check(config, facts)) is not None}


def _suggestions(config: Config, facts: Facts, refusal: Refusal, others: set[str]) -> tuple[tuple[Change, ...], bool]:
    """The nearest candidates that end this violation and cause no other, of these the ones that end most of the others
    too; where there are none, the nearest ones together with what the other rules then ask for. And whether nothing is
    violated after each."""
    candidates = list(islice(refusal.candidates, 400))
    left = [_left(config, facts, change) for change in candidates]
    fewest = min((len(names) for names in left if names <= others), default=None)
    good = [change for change, names in zip(candidates, left, strict=True) if names <= others and len(names) == fewest]
    for depth in range(2, 5):
        if not good:
            extended = (_extended(config, facts, change, others, depth) for change in candidates[:16])
            good = [change for change in extended if change is not None][:SHOWN]
    shown: dict[frozenset[str], list[Change]] = {}
    for change in good:
        keys = frozenset(change)
        if any(earlier < keys for earlier in shown):
            continue  # a smaller change did it already
        group = shown.setdefault(keys, [])
        if len(group) < SHOWN and change not in group:
            group.append(change)
    suggestions = tuple(change for group in shown.values() for change in group)
    return suggestions, not any(_left(config, facts, change) for change in suggestions)


def _left(config: Config, facts: Facts, change: Change) -> set[str]:
    """The rules that are violated after a change."""
    try:
        return set(_refused(config.replace(change), facts))
    except ValidationError:
        return {"the schema"}


def _extended(config: Config, facts: Facts, change: Change, others: set[str], depth: int) -> Change | None:
    """The change with further ones that end the violations which it causes, or None."""
    try:
        changed = config.replace(change)
    except ValidationError:
        return None
    new = {name: refusal for name, refusal in _refused(changed, facts).items() if name not in others}
    if not new:
        return change
    if not depth:
        return None
    for further in islice(next(iter(new.values())).candidates, 8):
        if set(further).isdisjoint(change) and (
            found := _extended(config, facts, {**change, **further}, others, depth - 1)
        ):
            return found
    return None


def _rendered(field: str, suggestions: tuple[Change, ...], legal: bool) -> str:
    """'nearest legal values: 4, 5' for the named field, 'or other.field=2' for others; 'nearest values that end this
    refusal: 4, 5' where other refusals stay."""
    own = [yaml_format.as_scalar(change[field]) for change in suggestions if set(change) == {field}]
    others = [
        " with ".join(f"{key}={yaml_format.as_scalar(value)}" for key, value in change.items())
        for change in suggestions
        if set(change) != {field}
    ]
    kind, then = ("legal ", "") if legal else ("", f" that end{'' if len(own) > 1 else 's'} this refusal")
    parts = [f"nearest {kind}value{'s' if len(own) > 1 else ''}{then}: {', '.join(own)}"] if own else []
    alone = "nearest legal:" if legal else "nearest that ends this refusal:"
    parts += [f"{'or' if own else alone} {' or '.join(others)}"] if others else []
    return ", ".join(parts)


def _warnings(config: Config, facts: Facts, plan: Plan) -> Iterator[str]:
    """What is legal, but wasteful or slow."""
    if plan.pipeline > 1 and plan.accumulation < plan.pipeline:
        idle = (plan.pipeline - 1) / (plan.accumulation + plan.pipeline - 1)
        yield (
            f"batch: {plan.accumulation} micro-batches per step over {plan.pipeline} pipeline stages leave "
            f"each stage idle {idle:.0%} of the time; a larger global_batch or a smaller micro_batch helps"
        )
    heads, tensor = config.model.heads, plan.tensor
    if heads % tensor:
        most = -(-heads // tensor)
        yield (
            f"parallel.tensor_parallel: {heads} heads over {tensor} ranks are {most} on some and "
            f"{heads // tensor} on others, which leaves {1 - heads / (most * tensor):.0%} of attention idle"
        )
    if plan.precision == "bf16" and not facts.bf16:
        yield "training.precision: this CPU emulates bf16, which is slower than fp32"

"""The table of legal combinations: each rule refuses exactly its thing, in words that help.

Every case below is a request that is legal, and the one change that makes it illegal. The legal one is the control:
it shows that nothing but that change is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megagpt2.config import Config, ConfigError, Facts, IllegalRequest, check, legal_layouts
from megagpt2.config.batching import accumulation_steps, ramped_batch
from megagpt2.config.passthrough import DEEPSPEED_ALLOWED, DEEPSPEED_OWNED, Whole, passed_on
from megagpt2.config.rules import RULES, rules_table_markdown, violations
from megagpt2.config.schema import RampUp, Recomputation

BASE = Config.model_validate(
    {
        "model": {"layers": 4, "width": 40, "heads": 5, "context": 64},
        "batch": {"global_batch": 16, "micro_batch": 2},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 100},
    }
)
CPU = Facts(world_size=1)
GPU = Facts(world_size=1, device="cuda", bf16=True, fp16=True)


@dataclass(frozen=True)
class Case:
    """A legal request, the change that one rule refuses, and what the message must hold."""

    rule: str
    illegal: Mapping[str, Any]
    says: tuple[str, ...]
    legal: Mapping[str, Any] = field(default_factory=dict)
    facts: Facts = CPU
    illegal_facts: Facts | None = None

    @property
    def control(self) -> Config:
        return BASE.replace(self.legal)

    @property
    def refused(self) -> tuple[Config, Facts]:
        return self.control.replace(self.illegal), self.illegal_facts or self.facts


def ranks(count: int, facts: Facts = CPU) -> Facts:
    return replace(facts, world_size=count)


TP, PP, SP = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel"
ZERO, BATCH, MICRO, LENGTH = "parallel.zero_stage", "batch.global_batch", "batch.micro_batch", "batch.sequence_length"
RECOMPUTE = "parallel.activation_checkpointing"
RAMP = {"start": 4, "increment": 4, "samples": 100}
STATES, WEIGHTS, FOLDER = "offload.optimizer", "offload.parameters", "offload.nvme_path"
GATHER = "zero_optimization.stage3_"

CASES = (
    Case(
        "deepspeed-present",
        {},
        ("training: ", "deepspeed can't be imported", "make setup"),
        illegal_facts=replace(CPU, deepspeed=False),
    ),
    Case(
        "device-present",
        {"training.device": "cuda"},
        ("training.device: cuda was asked", "runs on cpu", "nearest legal values: cpu, auto"),
    ),
    Case(
        "device-present",
        {"training.device": "cpu"},
        ("training.device: cpu was asked", "runs on cuda", "nearest legal values: cuda, auto"),
        facts=GPU,
    ),
    Case(
        "world-divides",
        {TP: 3},
        (f"{TP}: 3 x pipeline_parallel 1 = 3 was asked", "8 ranks / (3 x 1) = 2.667", "6 or 9 ranks", ": 2, 4"),
        legal={TP: 2},
        facts=ranks(8),
    ),
    Case(
        "world-divides",
        {TP: 3, PP: 3},
        ("4 ranks / (3 x 3) = 0.4444", "it is for 9 ranks", f"{TP}=2 with {PP}=2"),
        legal={TP: 2},
        facts=ranks(4),
    ),
    Case(
        "heads-over-tensor",
        {TP: 8},
        (f"{TP}: 8 was asked, but the model has 5 heads and each rank needs at least one", ": 4, 2"),
        legal={TP: 4},
        facts=ranks(8),
    ),
    Case(
        "heads-over-tensor",
        {TP: 6},
        (f"{TP}: 6 was asked", "5 heads", "nearest legal values: 3, 2"),
        legal={TP: 3, BATCH: 12},
        facts=ranks(6),
    ),
    Case(
        "matrices-over-tensor",
        {TP: 4},
        (f"{TP}: 4 was asked", "the MLP has 3 columns", "nearest legal values: 2, 1"),
        legal={TP: 2, "model.feed_forward": 3},
        facts=ranks(4),
    ),
    Case(
        "layers-over-pipeline",
        {PP: 8},
        (f"{PP}: 8 was asked", "4 layers and each stage needs at least one", "nearest legal values: 4, 2"),
        legal={PP: 4},
        facts=ranks(8),
    ),
    Case(
        "zero-with-pipeline",
        {ZERO: 2},
        (f"{ZERO}: 2 was asked", "pipeline_parallel is 2", f"nearest legal value: 1, or {PP}=1"),
        legal={PP: 2},
        facts=ranks(2),
    ),
    Case(
        "zero-with-pipeline",
        {PP: 2},
        (f"{ZERO}: 3 was asked", "pipeline_parallel is 2"),
        legal={ZERO: 3},
        facts=ranks(2),
    ),
    Case(
        "sequence-needs-tensor",
        {SP: True},
        (f"{SP}: true was asked", "tensor_parallel is 1", f"nearest legal value: false, or {TP}=2"),
        facts=ranks(4),
    ),
    Case(
        "sequence-splits",
        {LENGTH: 61},
        (f"{LENGTH}: 61 was asked", "61 / 4 = 15.25", f"nearest legal values: 60, 64, or {SP}=false"),
        legal={TP: 4, SP: True, LENGTH: 60},
        facts=ranks(4),
    ),
    Case(
        "sequence-fits",
        {LENGTH: 65},
        (f"{LENGTH}: 65 was asked", "64 positions", "nearest legal value: 64, or model.context=65"),
        legal={LENGTH: 64},
    ),
    Case(
        "batch-divides",
        {BATCH: 15},
        (f"{BATCH}: 15 was asked", "micro_batch 2 x data-parallel size 4 = 8", "15 / 8 = 1.875", ": 16, 8"),
        facts=ranks(4),
    ),
    Case(
        "batch-divides",
        {MICRO: 3},
        (f"{BATCH}: 16 was asked", "micro_batch 3", ": 12, 24", f"or {MICRO}=2 or {MICRO}=4"),
        facts=ranks(4),
    ),
    Case(
        "ramp-fits",
        {"batch.ramp_up.start": 5},
        ("batch.ramp_up: start 5", "micro_batch 2 x data-parallel size 2 = 4", "batch.ramp_up.start=4"),
        legal={"batch.ramp_up": RAMP},
        facts=ranks(2),
    ),
    Case(
        "ramp-fits",
        {"batch.ramp_up.increment": 6},
        ("increment 6", "= 4, and at most global_batch 16", "increment=4", "increment=8", "nearest legal value: null"),
        legal={"batch.ramp_up": RAMP},
        facts=ranks(2),
    ),
    Case(
        "ramp-fits",
        {"batch.ramp_up.start": 20},
        ("start 20", "at most global_batch 16", "batch.ramp_up.start=16"),
        legal={"batch.ramp_up": RAMP},
        facts=ranks(2),
    ),
    Case(
        "fp16-usable",
        {"training.precision": "fp16"},
        ("training.precision: fp16 was asked", "this cpu does not compute fp16", "nearest legal values: fp32, bf16"),
    ),
    Case(
        "fp16-usable",
        {},
        ("training.precision: fp16 was asked", "this cuda does not", "nearest legal values: bf16, fp32"),
        legal={"training.precision": "fp16"},
        facts=GPU,
        illegal_facts=replace(GPU, fp16=False),
    ),
    Case(
        "bf16-usable",
        {},
        ("training.precision: bf16 was asked", "this GPU does not", "nearest legal values: fp16, fp32"),
        legal={"training.precision": "bf16"},
        facts=GPU,
        illegal_facts=replace(GPU, bf16=False),
    ),
    Case(
        "warmup-fits",
        {"schedule.warmup_steps": 101},
        ("schedule.warmup_steps: 101 was asked", "step 100", "value: 100, or schedule.decay_steps=101"),
        legal={"schedule.warmup_steps": 100},
    ),
    Case(
        "warmup-fits",
        {"schedule.name": "wsd"},
        ("warmup_steps: 91 was asked", "falls from step 90 on", "value: 90, or schedule.decay_steps=102"),
        legal={"schedule.warmup_steps": 91},
    ),
    Case(
        "validation-has-data",
        {"data.valid": None},
        ("validation.every: 10 was asked", "data.valid=PREFIX", "nearest legal value: 0"),
        legal={"validation.every": 10, "data.valid": Path("corpus")},
    ),
    Case(
        "samples-have-tokenizer",
        {"data.tokenizer": None},
        ("monitor.sample_every: 10 was asked", "data.tokenizer=DIRECTORY", "nearest legal value: 0"),
        legal={"monitor.sample_every": 10, "data.tokenizer": Path("tokenizer")},
    ),
    Case(
        "deepspeed-contradicts",
        {"deepspeed": {"zero_optimization": {"overlap_comm": True, "stage": 2}, "optimizer": {}}},
        (
            "deepspeed.zero_optimization.stage, deepspeed.optimizer was asked",
            "zero_optimization.stage is decided by our parallel.zero_stage",
            "optimizer is decided by our optimizer",
            "remove them",
        ),
        legal={"deepspeed": {"zero_optimization": {"overlap_comm": True}}},
    ),
    Case(
        "deepspeed-inexact",
        {"deepspeed": {"bf16": {"immediate_grad_update": False}, "elasticity": {"enabled": True}}},
        (
            "deepspeed.bf16.immediate_grad_update, deepspeed.elasticity was asked",
            "bf16.immediate_grad_update is not among the options that are known to leave results exact (none of",
            "elasticity is not among the options that are known to leave results exact (these are zero_optimization, ",
            "remove them",
        ),
    ),
    Case(
        "deepspeed-inexact",
        {"deepspeed.gradient_cliping": 1.0},
        ("gradient_cliping is not among", "nearest: gradient_clipping, which is decided by our optimizer.clip"),
        legal={"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}},
    ),
    Case(
        "deepspeed-values",
        {"deepspeed": {"zero_optimization": {"reduce_bucket_size": "abc"}, "aio": {"queue_depth": 0}}},
        (
            "deepspeed: deepspeed.zero_optimization.reduce_bucket_size=abc, deepspeed.aio.queue_depth=0 was asked",
            "zero_optimization.reduce_bucket_size must be an integer >= 1, aio.queue_depth must be an integer >= 1 and",
            "nearest legal: deepspeed.zero_optimization.reduce_bucket_size=500000000 with deepspeed.aio.queue_depth=1",
        ),
        legal={"deepspeed": {"zero_optimization": {"reduce_bucket_size": 5e8}}},
    ),
    Case(
        "optimizer-offload",
        {STATES: "nvme"},
        (f"{STATES}: nvme was asked", "zero_stage is 2", "only in stage 3", f"nearest legal value: cpu, or {ZERO}=3"),
        legal={ZERO: 2, STATES: "cpu", FOLDER: Path("/scratch")},
    ),
    Case(
        "parameters-offload",
        {ZERO: 2},
        (f"{WEIGHTS}: cpu was asked", "zero_stage is 2", "only in stage 3", f"nearest legal value: none, or {ZERO}=3"),
        legal={ZERO: 3, WEIGHTS: "cpu"},
    ),
    Case(
        "nvme-gathers",
        {WEIGHTS: "nvme"},
        (
            f"{WEIGHTS}: nvme was asked, but deepspeed.zero_optimization.stage3_max_live_parameters is 100000000, de",
            f"nearest legal value: cpu, or deepspeed.{GATHER}max_live_parameters=0 with deepspeed.{GATHER}max_reuse",
        ),
        legal={
            ZERO: 3, FOLDER: Path("/scratch"), STATES: "nvme",
            "deepspeed": {  # configs/gpt2_1542m_offload.yaml's
                "zero_optimization": {
                    "stage3_max_live_parameters": 1e8, "stage3_max_reuse_distance": 100_000_000,
                    "stage3_prefetch_bucket_size": 10_000_000, "reduce_bucket_size": 20_000_000,
                },
            },
        },
    ),
    Case(
        "nvme-gathers",
        {f"deepspeed.{GATHER}param_persistence_threshold": 100_001},
        (f"{GATHER}param_persistence_threshold is 100001", f"or deepspeed.{GATHER}param_persistence_threshold=100000"),
        legal={
            ZERO: 3, FOLDER: Path("/scratch"), WEIGHTS: "nvme",
            "deepspeed": {"zero_optimization": {"stage3_max_live_parameters": 0}},
        },
    ),
    Case(
        "nvme-has-path",
        {FOLDER: None},
        (f"{STATES}: nvme was asked", "names no folder: set offload.nvme_path=FOLDER", "nearest legal value: cpu"),
        legal={ZERO: 3, STATES: "nvme", FOLDER: Path("/scratch")},
    ),
    Case(
        "nvme-has-path",
        {WEIGHTS: "nvme", STATES: "nvme"},
        (f"{STATES}: nvme was asked", f"{STATES}=cpu with {WEIGHTS}=cpu"),
        legal={ZERO: 3, WEIGHTS: "cpu"},
    ),
    Case(
        "nvme-operators",
        {WEIGHTS: "nvme"},
        (f"{WEIGHTS}: nvme was asked", "async_io", "libaio-dev", "run make setup-nvme", "nearest legal value: cpu"),
        legal={ZERO: 3, FOLDER: Path("/scratch")},
        facts=replace(CPU, nvme=False),
    ),
    Case(
        "attention-draws-dropout",
        {"kernels.attention": "sdpa"},
        ("kernels.attention: sdpa was asked", "attention_dropout (0.1)", "nearest legal value: fused_softmax"),
        legal={"model.attention_dropout": 0.1},
    ),
    Case(
        "apex-present",
        {"kernels.layer_norm": "apex"},
        ("kernels.layer_norm: apex was asked", "can't be imported", "nearest legal values: fused, torch"),
        facts=replace(GPU, apex="it can't be imported"),
    ),
    Case(
        "apex-adam-on-gpu",
        {STATES: "cpu"},
        (
            "kernels.adam: apex was asked, but offload.optimizer is cpu", "apex's Adam runs on GPUs only",
            f"nearest legal values: fused, torch, or {STATES}=none",
        ),
        legal={"kernels.adam": "apex"},
        facts=GPU,
    ),
    Case(
        "apex-adam-on-gpu",
        {"kernels.adam": "apex"},
        ("offload.optimizer is nvme",),
        legal={ZERO: 3, STATES: "nvme", FOLDER: Path("/scratch"), "kernels.layer_norm": "apex"},
        facts=GPU,
    ),
    Case(
        "apex-adam-on-gpu",
        {"optimizer.name": "adamw"},
        ("kernels.adam: apex was asked",),
        legal={"optimizer.name": "sgd", "kernels.adam": "apex", STATES: "cpu"},
        facts=GPU,
    ),
    Case(
        "operators-present",
        {"kernels.allow_reference": False},
        ("kernels.allow_reference: false was asked", "make setup", "nearest legal value: true"),
        legal={"kernels.allow_reference": True},
        facts=replace(GPU, operators="megagpt2._C is not built: make setup"),
    ),
)


def named(case: Case) -> str:
    return case.rule + "-" + "-".join(key.rpartition(".")[2] for key in case.illegal)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_control_is_legal(case: Case) -> None:
    check(case.control, case.facts)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_only_that_rule_refuses(case: Case) -> None:
    assert [violation.rule for violation in violations(*case.refused)] == [case.rule]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_message_names_field_value_reason_and_nearest(case: Case) -> None:
    with pytest.raises(IllegalRequest) as caught:
        check(*case.refused)
    assert isinstance(caught.value, ConfigError)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for part in case.says:
        assert part in text


@pytest.mark.parametrize("case", CASES, ids=named)
def test_what_is_suggested_is_legal(case: Case) -> None:
    config, facts = case.refused
    (violation,) = violations(config, facts)
    assert violation.suggestions or case.rule == "deepspeed-present"  # no value of ours installs a package
    for change in violation.suggestions:
        check(config.replace(change), facts)


def test_every_rule_has_a_case() -> None:
    assert {rule.name for rule in RULES} == {case.rule for case in CASES}
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_docs_table_has_every_rule() -> None:
    table = rules_table_markdown()
    assert all(f"| {rule.name} | {rule.forbids} |" in table for rule in RULES)


def test_all_violations_in_one_error_one_sentence_each() -> None:
    asked = BASE.replace({LENGTH: 65, "schedule.warmup_steps": 101, "training.precision": "fp16"})
    with pytest.raises(IllegalRequest) as caught:
        check(asked, CPU)
    assert [violation.rule for violation in caught.value.violations] == ["sequence-fits", "fp16-usable", "warmup-fits"]
    assert len(str(caught.value).splitlines()) == 3
    for violation in caught.value.violations:  # each suggestion cures its own sentence and leaves the others
        for change in violation.suggestions:
            assert len(violations(asked.replace(change), CPU)) == 2


@pytest.mark.parametrize(
    ("changes", "world", "rule", "suggested"),
    [
        ({TP: 8}, 4, "heads-over-tensor", [{TP: 4}, {TP: 2}]),  # 5 would be heads enough, but not on 4 ranks
        ({PP: 16}, 2, "layers-over-pipeline", [{PP: 2}, {PP: 1}]),
        ({TP: 8, "schedule.warmup_steps": 101}, 4, "heads-over-tensor", [{TP: 4}, {TP: 2}]),
    ],
)
def test_a_suggestion_is_legal_in_all_where_one_is(changes: dict, world: int, rule: str, suggested: list) -> None:
    found = {violation.rule: violation for violation in violations(BASE.replace(changes), ranks(world))}
    assert len(found) > 1 and list(found[rule].suggestions) == suggested
    assert found[rule].legal == (len(found) == 2)
    for change in suggested:
        after = violations(BASE.replace({**changes, **change}), ranks(world))
        assert {violation.rule for violation in after} == set(found) - {rule, "world-divides"}


def test_a_sentence_says_where_others_stay() -> None:
    both = [str(one) for one in violations(BASE.replace({LENGTH: 65, "training.precision": "fp16", PP: 8}), ranks(8))]
    assert any(text.endswith("nearest value that ends this refusal: 64, or model.context=65") for text in both)
    assert any(text.endswith("nearest values that end this refusal: 4, 2") for text in both)
    assert not any("legal" in text for text in both)


def test_a_request_far_from_legal_still_has_a_suggestion() -> None:
    """7 ranks have layouts of 1 and 7 only, and those break three other rules."""
    ramp = {"start": 6, "increment": 6, "samples": 100}
    asked = BASE.replace({TP: 2, SP: True, BATCH: 12, "batch.ramp_up": ramp})
    for violation in violations(asked, ranks(7)):
        assert violation.suggestions
        assert all(not violations(asked.replace(change), ranks(7)) for change in violation.suggestions)


def test_suggestion_takes_other_fields_along_where_one_is_not_enough() -> None:
    """Stage 1 for the pipeline, and then no offload; or no pipeline, and then a batch for two replicas."""
    asked = BASE.replace({WEIGHTS: "cpu", ZERO: 3, PP: 2, BATCH: 15, MICRO: 15})
    (violation,) = violations(asked, ranks(2))
    assert violation.suggestions == ({ZERO: 1, WEIGHTS: "none"}, {PP: 1, BATCH: 30})
    assert f"nearest legal: {ZERO}=1 with {WEIGHTS}=none or {PP}=1 with {BATCH}=30" in str(violation)


@pytest.mark.parametrize("theirs", DEEPSPEED_OWNED)
def test_every_key_of_deepspeed_that_we_own_names_our_field(theirs: str) -> None:
    options = nested(theirs, 1)
    with pytest.raises(IllegalRequest, match=f"{theirs} is decided by our {DEEPSPEED_OWNED[theirs]}; remove it"):
        check(BASE.replace({"deepspeed": options}), CPU)


def nested(dotted: str, value: Any) -> Any:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def legal_and_illegal(theirs: str) -> tuple[list[Any], list[Any]]:
    """Values of a key, around the border."""
    kind = DEEPSPEED_ALLOWED[theirs]
    never = [None, [1], {}, {"a": 1}, "auto", "abc", "", float("nan"), float("inf")]
    if isinstance(kind, Whole):
        step = kind.multiple
        legal = [kind.default, kind.low, kind.low + step, float(kind.low), str(kind.default), f"{kind.default:.12e}"]
        beyond = [kind.low - step, kind.low - 1, kind.high + step, -5, kind.low + 0.5, True]
        return legal, never + beyond + [kind.low + 1] * (step > 1)
    others = {
        "flops_profiler.recompute_fwd_factor": ([0, 0.5, 2, "1e-1"], [*never, -0.1, True]),
        "flops_profiler.output_file": (["flops.txt"], [None, [1], {}, "", 1, True]),
        "comms_logger.prof_ops": ([[], ["all_reduce"]], [None, [1], {}, "all_reduce", 1, True]),
    }
    return others.get(theirs, ([True, False], [*never, 1, 0, "true", "maybe", 0.5]))


@pytest.mark.parametrize("theirs", DEEPSPEED_ALLOWED)
def test_every_allowed_key_of_deepspeed_takes_its_values_and_no_others(theirs: str) -> None:
    legal, illegal = legal_and_illegal(theirs)
    for value in legal:
        check(BASE.replace({"deepspeed": nested(theirs, value), ZERO: 3}), CPU)
    for value in illegal:
        # Not through pydantic: an infinity in a file ends as "must be finite" before any rule.
        asked = BASE.replace({ZERO: 3}).model_copy(update={"deepspeed": nested(theirs, value)})
        (violation,) = violations(asked, CPU)
        assert violation.rule == "deepspeed-values", value
        (change,) = violation.suggestions  # one that the rules take
        assert f"{theirs} must be {DEEPSPEED_ALLOWED[theirs]}; nearest legal: {next(iter(change))}=" in str(violation)


def test_deepspeed_takes_the_same_values_of_its_options() -> None:
    """Bounds and defaults of ours are its own, or narrower: with its models, which read a part of them."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig}
    for theirs, kind in DEEPSPEED_ALLOWED.items():
        section, _, key = theirs.rpartition(".")
        if section not in models:
            continue
        for value in legal_and_illegal(theirs)[0]:
            options = passed_on(BASE.replace({"deepspeed": nested(theirs, value)}))[section]
            read = models[section](**options)
            name = key if hasattr(read, key) else key.removeprefix("stage3_")
            assert getattr(read, name) == options[key] == kind.read(value)
        default = getattr(models[section](), name)
        assert default == (list(kind.default) if isinstance(kind.default, tuple) else kind.default), theirs


@pytest.mark.parametrize(
    ("theirs", "value", "nearest"),
    [
        ("zero_optimization.reduce_bucket_size", -5, 1), ("zero_optimization.reduce_bucket_size", "abc", 500_000_000),
        ("zero_optimization.reduce_bucket_size", 2.4, 2), ("zero_optimization.allgather_bucket_size", 2001, 2000),
        ("aio.block_size", 1000, 1024), ("aio.block_size", 1, 512), ("aio.block_size", 1 << 40, (1 << 31) - 512),
        ("zero_optimization.overlap_comm", "yes", True), ("zero_optimization.overlap_comm", "maybe", False),
        ("zero_optimization.reduce_scatter", 0, False), ("comms_logger.prof_ops", "all_reduce", ["all_reduce"]),
    ],
)
def test_the_nearest_value_of_a_deepspeed_option(theirs: str, value: Any, nearest: Any) -> None:
    (violation,) = violations(BASE.replace({"deepspeed": nested(theirs, value), ZERO: 3}), CPU)
    assert violation.suggestions == ({f"deepspeed.{theirs}": nearest},)


def test_deepspeed_gets_integers() -> None:
    """Its C++ takes no 1e6 for one; other sections are handed on as they are."""
    given = {"zero_optimization": {"reduce_bucket_size": 5e8, "overlap_comm": True}, "aio": {"block_size": "1_048_576"}}
    found = passed_on(BASE.replace({"deepspeed": {**given, "dump_state": False}}))
    assert found == {
        "zero_optimization": {"reduce_bucket_size": 500_000_000, "overlap_comm": True},
        "aio": {"block_size": 1_048_576}, "dump_state": False,
    }
    assert type(found["zero_optimization"]["reduce_bucket_size"]) is type(found["aio"]["block_size"]) is int


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ("zero_optimization.round_robin_gradients", "of zero_optimization these are reduce_bucket_size, "),
        ("zero_optimization.memory_efficient_linear", "of zero_optimization these are"),
        ("zero_optimization.prefetch_bucket_size", "nearest: zero_optimization.stage3_prefetch_bucket_size)"),
        ("zero_optimization.overlap_com", "nearest: zero_optimization.overlap_comm)"),
        ("zero_optimization.offload_parm", "nearest: zero_optimization.offload_param, which is decided by our offload"),
        ("overlap_comm", "nearest: zero_optimization.overlap_comm)"),
        ("aio.blok_size", "nearest: aio.block_size)"),
        ("aio.threads", "of aio these are block_size,"),
        ("bf16.bf16_master_weights_and_grads", "none of bf16 is; these are zero_optimization, aio,"),
        ("fp16.hysteresis", "none of fp16 is"),
        ("bf16.enabld", "nearest: bf16.enabled, which is decided by our training.precision)"),
        ("communication_data_type", "these are zero_optimization, aio,"),
        ("curriculum_learning", "these are zero_optimization, aio,"),
        ("compression_training", "these are zero_optimization, aio,"),
        ("data_efficiency", "these are zero_optimization, aio,"),
        ("prescale_gradients", "these are zero_optimization, aio,"),
        ("", "these are zero_optimization, aio,"),
    ],
)
def test_every_other_key_of_deepspeed_is_refused(theirs: str, says: str) -> None:
    """With what may be set there, or the nearest key that is known."""
    (violation,) = violations(BASE.replace({"deepspeed": nested(theirs, 1), ZERO: 3}), CPU)
    assert violation.rule == "deepspeed-inexact" and violation.suggestions == ({"deepspeed": {}},)
    text = str(violation)
    assert f"deepspeed.{theirs} was asked, but {theirs} is not among the options that are known to" in text
    assert says in text and text.endswith("; remove it there")


def test_a_dotted_key_is_no_path() -> None:
    """DeepSpeed ignores it."""
    with pytest.raises(IllegalRequest, match="nearest: zero_optimization.overlap_comm"):
        check(BASE.replace({"deepspeed": {"zero_optimization.overlap_comm": True}}), CPU)


@pytest.mark.parametrize("section", ["zero_optimization", "aio", "bf16", "pipeline"])
def test_a_section_of_deepspeed_must_be_one(section: str) -> None:
    """DeepSpeed takes `zero_optimization: true` for stage 1, whatever zero_stage is."""
    with pytest.raises(IllegalRequest, match=f"{section} must be a section; remove it there"):
        check(BASE.replace({"deepspeed": nested(section, True), ZERO: 3}), CPU)


def test_fields_named_as_owners_exist() -> None:
    for ours in DEEPSPEED_OWNED.values():
        for key in ours.split(" and "):
            value: Any = BASE
            for part in key.split("."):
                value = getattr(value, part)


# What is legal, though it looks as if it were not


@pytest.mark.parametrize("tensor", range(1, 6))
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_uneven_heads_and_post_norm_are_legal_everywhere(tensor: int, norm: str) -> None:
    plan = check(BASE.replace({TP: tensor, PP: 2, "model.norm": norm}), ranks(2 * tensor))
    assert any("5 heads" in warning for warning in plan.warnings) == (5 % tensor != 0)


def test_constant_schedule_has_no_end_that_a_warm_up_could_miss() -> None:
    check(BASE.replace({"schedule.name": "constant", "schedule.warmup_steps": 1000}), CPU)


# The plan


@pytest.mark.parametrize(
    ("precision", "facts", "resolved", "warned"),
    [
        ("auto", CPU, "fp32", False),
        ("auto", replace(CPU, bf16=True), "bf16", False),
        ("bf16", CPU, "bf16", True),
        ("auto", GPU, "bf16", False),
        ("auto", replace(GPU, bf16=False), "fp32", False),
        ("fp16", GPU, "fp16", False),
        ("fp32", GPU, "fp32", False),
    ],
)
def test_precision_is_resolved(precision: str, facts: Facts, resolved: str, warned: bool) -> None:
    plan = check(BASE.replace({"training.precision": precision}), facts)
    assert (plan.precision, bool(plan.warnings)) == (resolved, warned)


def test_fewer_micro_batches_than_stages_is_legal_and_warned_of() -> None:
    """2 micro-batches over 4 stages: each stage works 2 of 2 + 4 - 1 slots, and is idle in 3 of 5."""
    plan = check(BASE.replace({PP: 4, MICRO: 8}), ranks(4))
    (warning,) = plan.warnings
    assert "2 micro-batches per step over 4 pipeline stages leave each stage idle 60% of the time" in warning
    assert check(BASE.replace({PP: 4, MICRO: 4}), ranks(4)).warnings == ()


def requests() -> st.SearchStrategy[tuple[Config, Facts]]:
    """Requests around the border between legal and illegal."""
    changes = st.fixed_dictionaries(
        {
            TP: st.integers(1, 6),
            PP: st.integers(1, 5),
            SP: st.booleans(),
            ZERO: st.integers(0, 3),
            BATCH: st.integers(1, 64),
            MICRO: st.integers(1, 8),
            LENGTH: st.none() | st.integers(1, 70),
            "batch.ramp_up": st.none()
            | st.builds(
                lambda a, b: {"start": a, "increment": b, "samples": 99}, st.integers(1, 70), st.integers(1, 20)
            ),
            "training.precision": st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
            "schedule.name": st.sampled_from(["cosine", "wsd"]),
            "schedule.warmup_steps": st.integers(0, 110),
            "schedule.wsd_decay_fraction": st.floats(0.01, 1),
        }
    )
    facts = st.builds(
        Facts, st.integers(1, 16), st.sampled_from(["cpu", "cuda"]), st.booleans(), st.booleans(), st.just(True)
    )
    return st.tuples(changes.map(BASE.replace), facts)


@settings(deadline=None)
@given(requests())
def test_a_plan_multiplies_back_or_every_suggestion_helps(request: tuple[Config, Facts]) -> None:
    config, facts = request
    try:
        plan = check(config, facts)
    except IllegalRequest as error:
        names = {violation.rule for violation in error.violations}
        for violation in error.violations:
            for change in violation.suggestions:
                after = {one.rule for one in violations(config.replace(change), facts)}
                assert after <= names - {violation.rule}
                assert not (violation.legal and after)
            assert violation.suggestions
            assert ("nearest legal" in str(violation)) == violation.legal != ("this refusal:" in str(violation))
        return
    assert plan.tensor * plan.pipeline * plan.data == plan.world_size == facts.world_size
    assert plan.micro_batch * plan.data * plan.accumulation == plan.global_batch == config.batch.global_batch
    assert plan.tokens_per_step == plan.global_batch * plan.sequence_length
    assert plan.precision in ("bf16", "fp16", "fp32")


# All layouts


def test_legal_layouts_are_all_of_them_and_each_once() -> None:
    """Against a plain enumeration that asks every rule about every combination, divisors or not."""
    worlds = (1, 2, 4, 6, 8)
    found = [(plan.world_size, *plan.changes().values()) for plan in legal_layouts(BASE, worlds, CPU)]
    expected = set()
    for values in product(range(1, 9), range(1, 9), (False, True), range(4), get_args(Recomputation)):
        asked = BASE.replace(dict(zip((TP, PP, SP, ZERO, RECOMPUTE), values, strict=True)))
        for world in worlds:
            if all(rule.check(asked, ranks(world)) is None for rule in RULES):
                expected.add((world, *values))
    assert len(found) == len(set(found)) and set(found) == expected


def test_a_layout_is_the_request_behind_it() -> None:
    for plan in legal_layouts(BASE, (1, 4, 6), GPU):
        assert check(BASE.replace(plan.changes()), ranks(plan.world_size, GPU)) == plan


def test_layout_names() -> None:
    asked = BASE.replace({TP: 2, SP: True, ZERO: 2, RECOMPUTE: "full"})
    assert check(asked, ranks(4)).name == "tp2-pp1-dp2-sp-zero2-full"


# Batch arithmetic

small = st.integers(1, 1000)


@settings(deadline=None)
@given(micro=small, data=small, steps=small)
def test_accumulation_is_the_inverse_of_the_product(micro: int, data: int, steps: int) -> None:
    assert accumulation_steps(micro * data * steps, micro, data) == steps


@settings(deadline=None)
@given(batch=small, micro=small, data=small)
def test_accumulation_refuses_what_does_not_divide(batch: int, micro: int, data: int) -> None:
    assume(batch % (micro * data))
    with pytest.raises(ValueError, match=f"{batch} is not a multiple of .* = {micro * data}"):
        accumulation_steps(batch, micro, data)


@st.composite
def ramps(draw: st.DrawFn) -> tuple[RampUp, int]:
    start, increment = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    return RampUp(start=start, increment=increment, samples=draw(small)), start + draw(st.integers(0, 500))


@settings(deadline=None)
@given(ramps(), st.lists(st.integers(0, 2000), min_size=2, max_size=20))
def test_ramp_rises_from_start_to_global_batch_in_increments(case: tuple[RampUp, int], seen: list[int]) -> None:
    ramp, batch = case
    sizes = [ramped_batch(ramp, batch, samples) for samples in sorted(seen)]
    assert all(before <= after for before, after in pairwise(sizes))
    assert all(size == batch or (size < batch and (size - ramp.start) % ramp.increment == 0) for size in sizes)
    assert all(ramped_batch(ramp, batch, samples) == batch for samples in (ramp.samples, ramp.samples + 1))
    assert ramped_batch(None, batch, seen[0]) == batch


def test_ramp_starts_at_start_and_rises_evenly() -> None:
    """8 to 32 by 8 over 300 samples: three rises, at 100, 200 and 300 samples."""
    ramp = RampUp(start=8, increment=8, samples=300)
    sizes = {seen: ramped_batch(ramp, 32, seen) for seen in (0, 99, 100, 199, 200, 299, 300)}
    assert sizes == {0: 8, 99: 8, 100: 16, 199: 16, 200: 24, 299: 24, 300: 32}


@settings(deadline=None)
@given(ramps(), st.integers(1, 8), st.integers(1, 4))
def test_a_legal_ramp_is_whole_micro_batches_all_the_way(case: tuple[RampUp, int], micro: int, data: int) -> None:
    ramp, rise = case
    unit = micro * data
    whole = {"start": ramp.start * unit, "increment": ramp.increment * unit, "samples": ramp.samples}
    config = BASE.replace({BATCH: rise * unit, MICRO: micro, "batch.ramp_up": whole})
    check(config, ranks(data))
    for seen in range(0, ramp.samples + 1, 7):
        accumulation_steps(ramped_batch(config.batch.ramp_up, rise * unit, seen), micro, data)


# The machine


def test_detected_facts_make_a_legal_default_request() -> None:
    """Whatever machine this is, `auto` works on it."""
    facts = Facts.detect(1, "auto")
    plan = check(BASE, replace(facts, deepspeed=True))
    assert plan.precision == ("bf16" if facts.bf16 else "fp32") and plan.device == facts.device
    assert Facts.detect(2, "cpu").device == "cpu"

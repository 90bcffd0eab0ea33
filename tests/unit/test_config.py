"""Schema and loading: what is written is what is read, and every mistake is named with its remedy."""

import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megagpt2.config import Config, ConfigError, dump_config, load_config, save_config
from megagpt2.config.document import document
from megagpt2.config.load import valid_keys
from megagpt2.config.schema import ModelConfig

ROOT = Path(__file__).resolve().parents[2]

SMALL = """
model: {layers: 2, width: 64, heads: 4}
batch: {global_batch: 8, micro_batch: 2}
optimizer: {learning_rate: 6e-4}
training: {steps: 100}
"""


@pytest.fixture
def write(tmp_path: Path):
    def to_file(text: str = SMALL) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def message(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or [])
    return str(caught.value)


# Reading


def test_file_and_defaults(write) -> None:
    config = load_config(write())
    assert config.optimizer.learning_rate == 6e-4  # YAML 1.1 would have read text
    assert config.model.vocabulary == 50257 and config.sequence_length == 1024 and config.decay_steps == 100


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("batch.micro_batch=4", "batch", "micro_batch", 4),
        ("optimizer.learning_rate=3E-4", "optimizer", "learning_rate", 3e-4),
        ("optimizer.learning_rate=1", "optimizer", "learning_rate", 1.0),
        ("optimizer.epsilon=.5e-8", "optimizer", "epsilon", 0.5e-8),
        ("training.steps=1e5", "training", "steps", 100_000),
        ("training.steps=50_000", "training", "steps", 50_000),
        ("model.context=0512", "model", "context", None),  # no octal numbers: text, and so an error
        ("parallel.sequence_parallel=true", "parallel", "sequence_parallel", True),
        ("data.train=a/b=c", "data", "train", Path("a/b=c")),
        ("data.train=", "data", "train", None),
        ("model.name=no", "model", "name", "no"),
        ("monitor.sample_prompts=[a, 'b, c']", "monitor", "sample_prompts", ("a", "b, c")),
        ("batch.ramp_up={start: 2, increment: 2, samples: 9}", "batch", "ramp_up", (2, 2, 9)),
    ],
)
def test_override_values_are_yaml(write, override: str, section: str, field: str, value: Any) -> None:
    if value is None and field != "train":
        assert "must be an integer" in message(write(), [override])
        return
    found = getattr(getattr(load_config(write(), [override]), section), field)
    assert (tuple(found.model_dump().values()) if field == "ramp_up" else found) == value


def test_later_override_wins_and_may_open_a_section(write) -> None:
    overrides = ["batch.micro_batch=1", "batch.micro_batch=8", "deepspeed.zero_optimization.overlap_comm=true"]
    config = load_config(write(), overrides)
    assert config.batch.micro_batch == 8
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}


def test_section_with_all_lines_commented_out_is_its_defaults(write) -> None:
    assert load_config(write(SMALL + "parallel:\n  # tensor_parallel: 2\n")).parallel.tensor_parallel == 1


def test_config_is_frozen(write) -> None:
    config = load_config(write())
    with pytest.raises(ValidationError):
        config.batch.micro_batch = 3  # type: ignore[misc]


def test_replace_validates_and_leaves_the_original(write) -> None:
    config = load_config(write())
    changed = config.replace({"batch.micro_batch": 4, "deepspeed.a.b": 1, "batch.ramp_up": None})
    assert (changed.batch.micro_batch, config.batch.micro_batch) == (4, 2)
    assert (changed.deepspeed, config.deepspeed) == ({"a": {"b": 1}}, {})
    with pytest.raises(ValidationError):
        config.replace({"batch.micro_batch": 0})


# Mistakes


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("batch.micro_bath=3", "batch.micro_batch"),
        ("micro_batch=3", "batch.micro_batch"),
        ("model.dropout=0.1", "model.residual_dropout"),
        ("parallel.tensor_model_parallel=2", "parallel.tensor_parallel"),
        ("optimiser.learning_rate=1", "optimizer"),
        ("batch.ramp_up={begin: 1, start: 1, increment: 1, samples: 1}", "batch.ramp_up"),
    ],
)
def test_unknown_key_names_the_nearest(write, override: str, nearest: str) -> None:
    text = message(write(), [override])
    assert "unknown key; did you mean " + nearest in text


def test_every_key_with_a_slip_of_the_pen_is_found_again(write) -> None:
    """A letter left out of the middle of the last part of any key: the suggestion is that key."""
    path = write()
    for key in valid_keys():
        if len(key.rpartition(".")[2]) < 6 or "ramp_up." in key:
            continue
        slip = key[:-4] + key[-3:]
        assert f"{slip}: unknown key; did you mean {key}?" in message(path, [f"{slip}=1"])


@pytest.mark.parametrize(
    ("override", "value", "allowed"),
    [
        ("batch.micro_batch=two", "'two'", "must be an integer"),
        ("batch.micro_batch=1.5", "1.5", "must be an integer"),
        ("batch.micro_batch=true", "True", "must be an integer"),
        ("batch.micro_batch=0", "0", "must be greater than 0"),
        ("parallel.zero_stage=4", "4", "must be less than or equal to 3"),
        ("parallel.sequence_parallel=1", "1", "must be true or false"),
        ("parallel.sequence_parallel=yes", "'yes'", "must be true or false"),
        ("optimizer.name=adam", "'adam'", "allowed: adamw or sgd"),
        ("optimizer.learning_rate=.inf", "inf", "must be a finite number"),
        ("model.residual_dropout=1", "1", "must be less than 1"),
        ("model.name=3", "3", "must be text"),
        ("monitor.sample_prompts=hello", "'hello'", "must be a list"),
        ("data.train=3", "3", "must be a path"),
        ("training.initial_loss_scale=1000", "1000", "nearest legal values: 512, 1024"),
        ("checkpoint.resume=step_5", "'step_5'", "must, never, or a path"),
        ("model=3", "3", "must be a section"),
        ("deepspeed=[1]", "[1]", "must be a section"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(write, override: str, value: str, allowed: str) -> None:
    text = message(write(), [override])
    assert f"{override.partition('=')[0]}: {value} is not legal: " in text and allowed in text


def test_heads_must_divide_width_and_the_nearest_widths_are_legal(write) -> None:
    text = message(write(), ["model.heads=5"])
    assert "model: width 64 is not a multiple of heads 5; nearest legal width: 60 or 65" in text
    for width in (60, 65):
        load_config(write(), ["model.heads=5", f"model.width={width}"])


def test_post_norm_has_the_inner_size_that_can_be_exported(write) -> None:
    text = message(write(), ["model.norm=post", "model.feed_forward=100"])
    assert "model: feed_forward 100 is not 4 x width 64" in text and "nearest legal feed_forward: 256" in text
    for legal in ("256", "null"):
        load_config(write(), ["model.norm=post", f"model.feed_forward={legal}"])
    load_config(write(), ["model.feed_forward=100"])


def test_missing_fields_say_what_they_are_for(write) -> None:
    text = message(write("model: {layers: 2, width: 64, heads: 4}\nbatch: {micro_batch: 2}\n"))
    assert "batch.global_batch: required, but not given (Sequences per optimizer step" in text
    assert "optimizer: required, but not given (a section with learning_rate)" in text


def test_all_problems_are_reported_together(write) -> None:
    text = message(write(), ["model.heds=2", "batch.micro_batch=x", "nonsense", "run.directory=[", "model.layers.x=1"])
    assert "5 problems" in text and len(text.splitlines()) == 6
    for part in ("model.heds", "batch.micro_batch", "'nonsense' is not of the form", "not valid YAML", "is a value"):
        assert part in text


def test_duplicate_keys_name_both_lines(write) -> None:
    text = message(write(SMALL + "batch: {global_batch: 3}\ndata:\n  train: a\n  train: b\n"))
    assert "line 6: 'batch' is given twice, first in line 3" in text
    assert "line 9: 'train' is given twice, first in line 8" in text


def test_broken_yaml_names_file_and_line(write) -> None:
    path = write(SMALL + "data: {train: [\n")
    assert message(path).startswith(f"{path}, line 7: not valid YAML")


def test_missing_file_names_a_near_one(write) -> None:
    path = write()
    assert message(path.with_name("runs.yaml")) == f"{path.with_name('runs.yaml')}: no such file; did you mean {path}?"
    assert "is not a directory" in message(path.parent / "nowhere" / "run.yaml")


@pytest.mark.parametrize("text", ["", "- a\n", "3\n"])
def test_file_without_sections(write, text: str) -> None:
    assert "required" in message(write(text)) or "must hold sections" in message(write(text))


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "can't be read" in message(path)


# Writing

text = st.text(st.characters(codec="utf-8"), max_size=20)
path_text = st.text(string.ascii_letters + string.digits + " ._-/:#éß", min_size=1, max_size=20)
fraction = st.floats(0, 1, exclude_max=True, allow_subnormal=False)
options = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    heads = draw(st.integers(1, 30))
    values = {
        "model": {
            "name": draw(text.filter(bool)),
            "layers": draw(st.integers(1, 100)),
            "width": heads * draw(st.integers(1, 128)),
            "heads": heads,
            "attention_dropout": draw(fraction),
            "norm": draw(st.sampled_from(["pre", "post"])),
        },
        "data": {"train": draw(st.none() | path_text), "valid": draw(st.none() | path_text)},
        "batch": {
            "global_batch": draw(st.integers(1, 10**7)),
            "micro_batch": draw(st.integers(1, 100)),
            "ramp_up": draw(st.none() | st.just({"start": 1, "increment": 2, "samples": 3})),
        },
        "optimizer": {
            "learning_rate": draw(st.floats(1e-300, 1e300)),
            "epsilon": draw(st.floats(0, 1, exclude_min=True)),
        },
        "training": {"steps": draw(st.integers(1, 10**12)), "seed": draw(st.integers(0, 2**63))},
        "monitor": {"sample_prompts": draw(st.lists(text, min_size=1, max_size=3))},
        "checkpoint": {"resume": draw(st.sampled_from(["auto", "must", "never", "./1e3", "a/no"]))},
        "deepspeed": draw(st.dictionaries(text, options, max_size=3)),
    }
    return Config.model_validate(values)


@settings(deadline=None)
@given(config=configs())
def test_dump_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_config(config, path)
    assert path.read_bytes().decode("utf-8") == dump_config(config)
    assert load_config(path) == config


@settings(deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_python_float_is_a_float_in_a_file(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.getbasetemp() / "number.yaml"
    path.write_text(SMALL + f"deepspeed: {{value: {value!r}}}\n", encoding="utf-8")
    read = load_config(path).deepspeed["value"]
    assert isinstance(read, float) and read == value


def test_save_is_atomic_and_leaves_no_other_file(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write())
    path = tmp_path / "new" / "config.yaml"
    save_config(config, path)
    before = path.read_text(encoding="utf-8")

    def fails(*_: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk is gone"):
        save_config(config.replace({"training.steps": 7}), path)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


# The model's numbers


@settings(deadline=None)
@given(
    layers=st.integers(1, 20),
    heads=st.integers(1, 9),
    head_width=st.integers(1, 40),
    inner=st.none() | st.integers(1, 500),
    norm=st.sampled_from(["pre", "post"]),
)
def test_parameters_are_the_sum_over_the_tensors(
    layers: int, heads: int, head_width: int, inner: int | None, norm: str
) -> None:
    """Against a count written out tensor by tensor, in Hugging Face's names."""
    width = heads * head_width
    inner = None if norm == "post" else inner
    model = ModelConfig(
        layers=layers, width=width, heads=heads, vocabulary=99, context=33, feed_forward=inner, norm=norm
    )
    block = {
        "ln_1": (2, width),
        "c_attn.weight": (width, 3 * width),
        "c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2": (2, width),
        "c_fc.weight": (width, model.inner),
        "c_fc.bias": (model.inner,),
        "mlp.c_proj.weight": (model.inner, width),
        "mlp.c_proj.bias": (width,),
    }
    shapes = [(99, width), (33, width), *list(block.values()) * layers]
    if norm == "pre":
        shapes.append((2, width))
    assert model.parameters() == sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    assert model.head_width == head_width and model.inner == (inner or 4 * width)


@settings(deadline=None)
@given(st.integers(1, 10**6))
def test_padded_vocabulary_is_the_next_multiple_of_128(vocabulary: int) -> None:
    padded = ModelConfig(layers=1, width=1, heads=1, vocabulary=vocabulary).padded_vocabulary
    assert padded % 128 == 0 and 0 <= padded - vocabulary < 128


def test_gpt2_pads_to_50304() -> None:
    assert ModelConfig(layers=1, width=1, heads=1).padded_vocabulary == 50304


# Documentation and imports


def test_every_field_is_documented() -> None:
    page = document()
    assert "|  |" not in page, "a field has no description"
    for key in valid_keys():
        assert f"`{key.rpartition('.')[2]}`" in page or f"## {key}\n" in page


def test_the_committed_reference_is_current() -> None:
    committed = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    assert committed == document(), "run: python -m megagpt2.config.document > docs/reference/config.md"


def test_reading_a_configuration_imports_no_torch_and_nothing_else_of_ours() -> None:
    """Planning on a login node must not wait for torch; and config is at the bottom of the import order."""
    code = (
        "import sys, megagpt2.config, megagpt2.config.document\n"
        "print([name for name in sys.modules if name == 'torch' or name == 'deepspeed'"
        " or name.startswith('megagpt2.') and not name.startswith('megagpt2.config')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"

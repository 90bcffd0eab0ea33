"""The shipped configurations: they are the papers' models, to the parameter, and legal where they are meant to run."""

from pathlib import Path

import pytest

from megagpt2.config import Config, Facts, check, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# file: parameters, layers, width, heads, learning rate, tokens per step. The counts are the papers' released models'.
PAPERS = {
    "gpt2_117m.yaml": (124_439_808, 12, 768, 12, 6e-4, 512 * 1024),
    "gpt2_345m.yaml": (354_823_168, 24, 1024, 16, 3e-4, 512 * 1024),
    "gpt2_762m.yaml": (774_030_080, 36, 1280, 20, 2.5e-4, 512 * 1024),
    "gpt2_1542m.yaml": (1_557_611_200, 48, 1600, 25, 2e-4, 512 * 1024),
    "gpt1_117m.yaml": (116_534_784, 12, 768, 12, 2.5e-4, 64 * 512),
    "models/gpt3_175b.yaml": (174_604_259_328, 96, 12288, 96, 0.6e-4, 1600 * 2048),
}


def gpus(count: int) -> Facts:
    return Facts(world_size=count, device="cuda", bf16=True, fp16=True)


@pytest.fixture(params=PAPERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_is_the_papers_model(name: str) -> None:
    config = load_config(CONFIGS / name)
    parameters, layers, width, heads, rate, tokens = PAPERS[name]
    model = config.model
    assert model.parameters() == parameters
    assert (model.layers, model.width, model.heads) == (layers, width, heads)
    assert config.optimizer.learning_rate == rate
    assert config.batch.global_batch * config.sequence_length == tokens
    assert model.name == Path(name).stem and config.run.directory == Path("runs") / Path(name).stem


def test_is_legal_where_it_runs(name: str) -> None:
    """GPT-3 takes its 128 ranks; the others one GPU, a CPU, and every data-parallel size that divides the batch."""
    config = load_config(CONFIGS / name)
    copy = config.parallel.tensor_parallel * config.parallel.pipeline_parallel
    for data in (1, 2):
        plan = check(config, gpus(copy * data))
        assert plan.data == data and plan.precision == "bf16" and plan.warnings == ()
    assert check(config, Facts(world_size=copy)).precision == "fp32"


@pytest.mark.parametrize("name", [name for name in PAPERS if name.startswith("gpt2")])
def test_gpt2_presets_share_everything_that_is_not_size(name: str) -> None:
    """The four sizes are one experiment: only the size and what follows from it may differ."""

    def shared(config: Config) -> dict[str, object]:
        values = config.model_dump()
        for section, field in (
            ("model", "name"),
            ("model", "layers"),
            ("model", "width"),
            ("model", "heads"),
            ("batch", "micro_batch"),
            ("parallel", "activation_checkpointing"),
            ("optimizer", "learning_rate"),
            ("run", "directory"),
        ):
            del values[section][field]
        return values

    assert shared(load_config(CONFIGS / name)) == shared(load_config(CONFIGS / "gpt2_117m.yaml"))


def test_the_offloaded_1542m_is_the_same_model_trained_the_same() -> None:
    one, other = load_config(CONFIGS / "gpt2_1542m.yaml"), load_config(CONFIGS / "gpt2_1542m_offload.yaml")
    for section in ("data", "optimizer", "schedule", "validation"):
        assert getattr(other, section) == getattr(one, section)
    assert other.model.model_copy(update={"name": one.model.name}) == one.model
    assert (other.batch.global_batch, other.training.steps) == (one.batch.global_batch, one.training.steps)
    plan = check(other, Facts(world_size=1))
    assert plan.precision == "bf16" and other.offload.optimizer == "nvme"


def test_gpt1_is_post_norm_as_published() -> None:
    config = load_config(CONFIGS / "gpt1_117m.yaml")
    assert config.model.norm == "post" and config.model.vocabulary == 40478 and config.model.inner == 3072
    assert {config.model.embedding_dropout, config.model.attention_dropout, config.model.residual_dropout} == {0.1}
    assert (config.schedule.warmup_steps, config.schedule.minimum) == (2000, 0.0)


def test_gpt3_trains_its_300_billion_tokens() -> None:
    config = load_config(CONFIGS / "models/gpt3_175b.yaml")
    tokens_per_step = config.batch.global_batch * config.sequence_length
    assert config.training.steps * tokens_per_step == pytest.approx(300e9, rel=1e-4)
    assert config.schedule.warmup_steps * tokens_per_step == pytest.approx(375e6, rel=1e-2)
    assert config.decay_steps * tokens_per_step == pytest.approx(260e9, rel=1e-4)


def test_every_yaml_below_configs_loads() -> None:
    files = sorted(CONFIGS.rglob("*.yaml"))
    assert {str(file.relative_to(CONFIGS)) for file in files} >= set(PAPERS)
    for file in files:
        load_config(file)

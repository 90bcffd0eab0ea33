"""The rules about `offload`, in the form of `refusals.py`."""

from megagpt2.config.facts import Facts
from megagpt2.config.passthrough import given
from megagpt2.config.refusals import Change, Refusal
from megagpt2.config.schema import Config


def optimizer_offload(config: Config, facts: Facts) -> Refusal | None:
    """DeepSpeed keeps optimizer states in files (ZeRO-Infinity) only in stage 3."""
    stage = config.parallel.zero_stage
    if config.offload.optimizer != "nvme" or stage == 3:
        return None
    why = f"parallel.zero_stage is {stage}, and DeepSpeed keeps optimizer states on NVMe only in stage 3"
    return Refusal("offload.optimizer", "nvme", why, ({"parallel.zero_stage": 3}, {"offload.optimizer": "cpu"}))


def parameters_offload(config: Config, facts: Facts) -> Refusal | None:
    """DeepSpeed offloads parameters only where they are sharded."""
    stage, asked = config.parallel.zero_stage, config.offload.parameters
    if asked == "none" or stage == 3:
        return None
    why = f"parallel.zero_stage is {stage}, and DeepSpeed offloads parameters only in stage 3"
    return Refusal("offload.parameters", asked, why, ({"parallel.zero_stage": 3}, {"offload.parameters": "none"}))


MOST_WITH_NVME: dict[str, int] = {
    "zero_optimization.stage3_max_live_parameters": 0,
    "zero_optimization.stage3_max_reuse_distance": 0,
    "zero_optimization.stage3_prefetch_bucket_size": 0,
    "zero_optimization.stage3_param_persistence_threshold": 100_000,  # these are below 1 MiB, and not in files
}
"""The largest values of options under `deepspeed` with which DeepSpeed's buffers suffice for parameters on NVMe."""


def nvme_gathers(config: Config, facts: Facts) -> Refusal | None:
    """A parameter from a file keeps its buffer while it is gathered, and the buffers are few."""
    if config.offload.parameters != "nvme":
        return None
    asked = {theirs: given(config, theirs) for theirs in MOST_WITH_NVME}
    large = {theirs: value for theirs, value in asked.items() if value is not None and value > MOST_WITH_NVME[theirs]}
    if not large:
        return None
    named = ", ".join(f"deepspeed.{theirs} is {value}" for theirs, value in large.items())
    why = (
        f"{named}: weights that DeepSpeed gathers early or keeps hold on to the few buffers that there are for files,"
        " and the first step would end for want of one"
    )
    fewer = {f"deepspeed.{theirs}": MOST_WITH_NVME[theirs] for theirs in large}
    return Refusal("offload.parameters", "nvme", why, (fewer, {"offload.parameters": "cpu"}))


def _off_nvme(config: Config) -> Change:
    """The request with memory in place of files."""
    fields = {"offload.optimizer": config.offload.optimizer, "offload.parameters": config.offload.parameters}
    return {field: "cpu" for field, value in fields.items() if value == "nvme"}


def nvme_has_path(config: Config, facts: Facts) -> Refusal | None:
    """Files lie in a folder."""
    if not config.offload.uses_nvme or config.offload.nvme_path is not None:
        return None
    change = _off_nvme(config)
    why = "offload.nvme_path names no folder: set offload.nvme_path=FOLDER on a local disk"
    return Refusal(next(iter(change)), "nvme", why, (change,))


def nvme_operators(config: Config, facts: Facts) -> Refusal | None:
    """DeepSpeed reads and writes files through libaio, with operators that are compiled beforehand."""
    if not config.offload.uses_nvme or facts.nvme:
        return None
    change = _off_nvme(config)
    why = (
        "DeepSpeed's operators for it (async_io, which uses libaio) are not built here: install libaio's headers"
        " (apt-get install libaio-dev, dnf install libaio-devel) and run make setup-nvme"
    )
    return Refusal(next(iter(change)), "nvme", why, (change,))

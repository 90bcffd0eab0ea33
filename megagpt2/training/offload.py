"""Where DeepSpeed keeps training state that the device has no room for (Ren et al. 2021, ZeRO-Offload; Rajbhandari
et al. 2021, ZeRO-Infinity), and what makes that exact.

On NVMe, stage 3 cuts each optimizer group into sub-groups and updates one after the other:

    read master, exp_avg, exp_avg_sq  ->  step  ->  write them       3 buffers, each as large as the largest sub-group

DeepSpeed would write every gradient to a file too, and read it into its place in the sub-group. Where that place is no
multiple of 512 bytes the read fails without an error and the step uses what was in memory before: seen with a width of
330. All gradients are in memory anyhow (grad_partitions_flat_buffer), in the very order of the sub-groups:
`keep_gradients_in_memory` takes them from there, which is exact and spares a third of the traffic.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megagpt2.config.errors import ConfigError
from megagpt2.config.passthrough import passed_on
from megagpt2.config.rules import Plan
from megagpt2.config.schema import Config
from megagpt2.planning.memory import PARAMETER_BUFFERS, STATE_BUFFERS, SUB_GROUP


def run_folder(config: Config) -> Path:
    """This run's folder in `offload.nvme_path`: no two processes train in one run.directory, so none shares it."""
    name = hashlib.sha256(str(config.run.directory.absolute()).encode()).hexdigest()[:16]
    return config.offload.nvme_path / f"megagpt2-{name}"


def largest_tensor(config: Config, plan: Plan) -> int:
    """Elements of the largest parameter on a tensor-parallel rank (or a few more)."""
    model, parts = config.model, plan.tensor
    heads = -(-model.heads // parts)
    rows = (
        -(-model.padded_vocabulary // parts), model.context, -(-model.inner // parts), 3 * heads * model.head_width,
    )
    return max(rows) * model.width


def largest_sub_group(config: Config, plan: Plan) -> int:
    """Elements of the largest sub-group on a rank: DeepSpeed adds tensor after tensor until it has `sub_group_size` of
    them or more, within a group of the optimizer (optimizer.py). The tied embedding is a group by itself, so are the
    positions where the other matrices are sharded."""
    model, limit = config.model, passed_on(config).get("zero_optimization", {}).get("sub_group_size", SUB_GROUP)
    heads, inner, rows = (-(-count // plan.tensor) for count in (model.heads, model.inner, model.padded_vocabulary))
    attention = heads * model.head_width
    block = [part * model.width for part in (3 * attention, attention, inner, inner)]
    positions = model.context * model.width
    largest, held = -(-max(rows * model.width, positions) // plan.data), 0
    for size in ([positions] if plan.tensor == 1 else []) + block * model.layers:
        held += -(-size // plan.data)
        largest = max(largest, held)
        if held >= limit:
            held = 0
    return largest


def options(config: Config, plan: Plan) -> dict[str, Any]:
    """What `offload` means in DeepSpeed's section zero_optimization."""
    offload, section = config.offload, {}
    if offload.optimizer != "none":
        section["offload_optimizer"] = {"device": offload.optimizer}
    if offload.parameters != "none":
        section["offload_param"] = {"device": offload.parameters}
    if offload.uses_nvme:  # masters, or weights that are written: a buffer holds a sub-group
        section["sub_group_size"] = SUB_GROUP
    if offload.optimizer == "nvme":
        section["offload_optimizer"] |= {"nvme_path": str(run_folder(config)), "buffer_count": STATE_BUFFERS}
    if offload.parameters == "nvme":
        section["offload_param"] |= {
            "nvme_path": str(run_folder(config)), "buffer_count": PARAMETER_BUFFERS, "max_in_cpu": 0,
            "buffer_size": -(-largest_tensor(config, plan) // plan.data) + 1024,
        }
        # A parameter keeps its buffer while it is gathered: with those that DeepSpeed would gather early or keep for
        # a later use, the buffers do not suffice, which is an assertion in the first step (the rule nvme-gathers
        # refuses other values from the user).
        section |= {
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
        }
    return section


def bytes_per_rank(config: Config, plan: Plan) -> tuple[int, int]:
    """(on disk, locked in memory) of one rank, to about a percent."""
    parameters, partition = config.model.parameters() // plan.world_size, -(-largest_tensor(config, plan) // plan.data)
    sub_group = largest_sub_group(config, plan)
    width = 4 if plan.precision == "fp32" else 2
    disk, locked = 0, 0
    if config.offload.optimizer == "nvme":
        states = 3 if config.optimizer.name == "adamw" else 1
        disk += 4 * states * parameters
        locked += 4 * STATE_BUFFERS * sub_group
    if config.offload.parameters == "nvme":
        disk += width * parameters
        locked += width * (PARAMETER_BUFFERS * partition + sub_group)
    return disk, locked


def _found(folder: Path, pattern: str) -> list[Path]:
    """What is there, though another rank may be removing it: then glob raises, and there is less to find."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return list(folder.glob(pattern))


def _remove_own(folder: Path, rank: int) -> None:
    """Remove this rank's files."""
    for path in _found(folder, f"zero_stage_3/*/rank{rank}"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    """Remove the folders, once no rank has files in them. Not while ranks start: one may just have made them."""
    for path in (*_found(folder, "zero_stage_3/*"), folder / "zero_stage_3", folder):
        with contextlib.suppress(OSError):  # another rank's are still in it
            path.rmdir()


def _why_not(config: Config, plan: Plan) -> str | None:
    """Make this run's folder; what stands against it, if something does."""
    from megagpt2.parallel import nvme

    folder, path = run_folder(config), config.offload.nvme_path
    disk, locked = bytes_per_rank(config, plan)
    try:
        nvme.load_operators()
        folder.mkdir(parents=True, exist_ok=True)
        need = disk * min(plan.world_size, int(os.environ.get("LOCAL_SIZE", plan.world_size)))
        free = shutil.disk_usage(folder).free
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"offload.nvme_path: {path} can't be written: {error}"
    if free < need:
        return (
            f"offload.nvme_path: {path} has {free / 1e9:.1f} GB free, this run needs {need / 1e9:.1f} GB there: name"
            " another folder"
        )
    why = nvme.why_unusable(folder, locked)
    return None if why is None else f"offload.nvme_path: {path} can't be used: {why}"


def prepare(config: Config, plan: Plan, agree_any) -> None:
    """Load the operators and try the folder, before DeepSpeed does. Raises ConfigError on all ranks where one can't.

    agree_any: tells every rank whether any rank's flag is set.
    """
    if not config.offload.uses_nvme:
        return
    _remove_own(run_folder(config), dist.get_rank())  # of a run that was killed
    agree_any(False)  # all have: a folder that one makes must not be another's to remove
    problem = _why_not(config, plan)
    if agree_any(problem is not None):
        remove_files(config, dist.get_rank())
        if problem is not None and dist.get_rank():
            print(f"megagpt2: rank {dist.get_rank()}: {problem}", file=sys.stderr, flush=True)
        raise ConfigError(problem or "offload.nvme_path: another rank can't use it, and says why")


def keep_gradients_in_memory(zero) -> None:
    """Make DeepSpeed's stage 3 take a sub-group's gradients from where they were summed, not from files."""
    bounds = list(accumulate(zero.fp16_partitioned_groups_flat_numel, initial=0))
    gradients = [zero.grad_partitions_flat_buffer[start:stop] for start, stop in pairwise(bounds)]
    assert bounds[-1] == zero.grad_partitions_flat_buffer.numel()
    for group, parameters in enumerate(zero.fp16_groups):
        for parameter in parameters:
            place, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            assert place == group and 0 <= offset < len(gradients[group])
    swap_in = zero._optimizer_states_and_gradient_swap_in

    def with_gradients(sub_group_id: int, timer_names=None) -> None:
        swap_in(sub_group_id, timer_names)
        zero.fp32_partitioned_groups_flat[sub_group_id].grad = gradients[sub_group_id]

    zero._optimizer_states_and_gradient_swap_in = with_gradients
    zero.optimizer_swapper.swap_out_gradients = lambda **_: None


def forget_overflowed_gradients(zero) -> None:
    """Make DeepSpeed's stages 1 and 2 with states in memory drop the gradients of a step that overflowed.

    They add to a buffer that only a step which is made takes away: the Inf would stay, and every later step be skipped.
    """
    reset = zero.reset_cpu_buffers

    def reset_and_forget() -> None:
        reset()
        if zero.overflow:
            zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))

    zero.reset_cpu_buffers = reset_and_forget


def remove_files(config: Config, rank: int) -> None:
    """At the end of a run: nothing of its files is needed again, for checkpoints hold everything."""
    if config.offload.uses_nvme:
        _remove_own(run_folder(config), rank)
        _remove_empty(run_folder(config))

"""What a layout does to a model, before any machine is asked for: the pipeline's stages with their share of the time,
bytes on every rank by kind, the batch, and what is wasteful. With --dry-run, every rank's part of the model is built
(on torch's meta device, which has shapes and no memory), added up against the whole model and run forward once, in
this one process:

    python tools/plan.py --config configs/gpt2_1542m.yaml --gpus 32 parallel.tensor_parallel=4
    python tools/plan.py --config configs/gpt2_1542m.yaml --gpus 32 --gpu-memory 80GiB parallel.pipeline_parallel=4
    python tools/plan.py --config configs/models/gpt3_175b.yaml --gpus 1024 --dry-run

No GPU and no DeepSpeed is needed: the devices are taken to be GPUs that compute bf16 (with training.device=cpu, CPUs
that don't). Layouts are not searched for; the configuration's is shown.

Exit codes: 0 done; 2 the request is wrong (the sentence is the one that training would print); 1 the dry run found
something wrong, which is named, or the fullest rank needs more than --gpu-memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from megagpt2.config import Config, ConfigError, Facts, Plan, check, load_config
from megagpt2.planning.dry_run import DryRun, dry_run
from megagpt2.planning.memory import KINDS, parse_bytes, show_bytes
from megagpt2.planning.places import BuiltPlace, built_places
from megagpt2.planning.stages import stage_bounds, stage_shares


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="number of ranks, one device each")
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="memory of one device, such as 80GiB (on CPUs: of one rank): does it fit?"
    )
    parser.add_argument("--dry-run", action="store_true", help="build every rank's part, check the sums, run it once")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="e.g. parallel.tensor_parallel=2")
    return parser.parse_intermixed_args(argv)


def assumed_facts(config: Config, gpus: int) -> Facts:
    """The machines that are planned for."""
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: give the number of ranks, at least 1")
    if config.training.device == "cpu":
        return Facts(world_size=gpus)
    return Facts(world_size=gpus, device="cuda", bf16=True, fp16=True)


def summary(config: Config, plan: Plan) -> dict[str, str]:
    """What is planned, in the words that training starts with."""
    model, accumulation = config.model, plan.accumulation
    idle = (plan.pipeline - 1) / (accumulation + plan.pipeline - 1)
    bubble = f"; the pipeline's stages are idle {idle:.1%} of the time (1F1B)" if plan.pipeline > 1 else ""
    return {
        "model": f"{model.name}: {model.layers} layers, {model.width} wide, {model.heads} heads,"
        f" vocabulary {model.vocabulary:,}",
        "parameters": f"{model.parameters():,}",
        "layout": f"tensor {plan.tensor} x pipeline {plan.pipeline} x data {plan.data} = {plan.world_size:,} ranks,"
        f" ZeRO {plan.zero_stage}" + (", sequence parallel" if plan.sequence_parallel else "")
        + f", activation checkpointing {plan.activation_checkpointing}",
        "batch": f"{plan.global_batch} sequences of {plan.sequence_length} = {accumulation} x {plan.micro_batch} on"
        f" each of {plan.data} replicas, {plan.tokens_per_step:,} tokens{bubble}",
        "precision": f"{plan.precision}, on {plan.device} (assumed)",
    }


def _range(values: Sequence[int], show=lambda value: f"{value:,}") -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} .. {high}"


def stage_table(config: Config, plan: Plan, places: list[BuiltPlace]) -> list[list[str]]:
    """One row per stage: what it holds, and the bytes of its fullest shard by kind."""
    kinds = [kind for kind in KINDS if kind != "buffers" or any(built.bytes.buffers for built in places)]
    elsewhere = [where for where in ("host", "files") if any(getattr(built.bytes, where) for built in places)]
    shown = [*kinds, "total", *elsewhere]
    rows = [["stage", "layers", "blocks", "time", "parameters per rank", *shown]]
    recompute = plan.activation_checkpointing
    bounds = stage_bounds(config.model, plan.sequence_length, plan.pipeline, recompute)
    shares = stage_shares(config.model, plan.sequence_length, bounds, recompute)
    for stage, group in groupby(places, key=lambda built: built.place.stage):
        shards = list(group)
        fullest = max(shards, key=lambda built: built.bytes.total).bytes
        sizes = [getattr(fullest, kind) for kind in shown]
        rows.append([
            str(stage), f"{shards[0].names[0]} .. {shards[0].names[-1]}", str(shards[0].place.blocks),
            f"{shares[stage].share:.1%}", _range([built.place.elements for built in shards]),
            *map(show_bytes, sizes),
        ])
    return rows


def aligned(rows: list[list[str]]) -> str:
    """Columns of one width; the second, of names, begins left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 1 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def fits(plan: Plan, places: list[BuiltPlace], memory: int | None) -> tuple[str, bool]:
    """The fullest rank against a device's memory: a sentence, and whether it is enough."""
    fullest = max(places, key=lambda built: built.bytes.total)
    where = f"the fullest rank (stage {fullest.place.stage}, shard {fullest.place.shard})"
    need = fullest.bytes.total
    if memory is None:
        return f"{where} needs about {show_bytes(need)}", True
    if need > memory:
        zero = ", a higher zero_stage" if plan.pipeline == 1 else ""  # the pipeline engine takes no other
        return (
            f"DOES NOT FIT: {where} needs about {show_bytes(need)}, which is {show_bytes(need - memory)} more than"
            f" {show_bytes(memory)}; more parallel.tensor_parallel or pipeline_parallel{zero}, a smaller"
            " batch.micro_batch or more activation_checkpointing takes less", False,
        )
    return f"fits: {where} needs about {show_bytes(need)} of {show_bytes(memory)} ({need / memory:.0%})", True


def memory_notes(plan: Plan, places: list[BuiltPlace]) -> list[str]:
    """What the table's bytes are, and what is not in them."""
    besides = "the Python process (about 0.4 GiB) and what the C library keeps of freed memory"
    if plan.device != "cpu":
        besides = "CUDA's own and NCCL's buffers"
    notes = [f"states are exact; activations and workspace are estimates, without {besides}"]
    host, files = (max(getattr(built.bytes, where) for built in places) for where in ("host", "files"))
    if host:
        notes.append(f"host: main memory beside the device's, up to {show_bytes(host)} for each rank of a machine")
    if files:
        notes.append(f"files: in offload.nvme_path, up to {show_bytes(files)} for each rank; they take no memory")
    return notes


def dry_run_report(run: DryRun) -> list[str]:
    """What was checked, with its figures; or what is wrong."""
    plan = run.plan
    built = (
        f"dry run: {len(run.places)} places ({plan.pipeline} stages x {plan.tensor} shards) built and run forward for"
        f" {plan.world_size:,} ranks"
    )
    if plan.data > 1:
        built += f"; the {plan.data} replicas of a place hold and compute the same by construction"
    if run.problems:
        return [built, "WRONG:", *(f"  {problem}" for problem in run.problems)]
    return [
        built,
        f"  layers      each of the list on one stage; {run.tensors:,} parameters, names and shapes of the whole model",
        f"  elements    {run.held:,} held by the places = {run.model:,} of the model, each once,",
        f"              + {run.copies:,} copies (the tied embedding on the last stage; norms, positions and row biases",
        f"              on every shard), besides {run.padding:,} of padding",
        f"  forward     {list(run.passed)} in {plan.precision} goes from stage to stage, and a loss comes out",
    ]


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; the exit code. Raises ValueError for a wrong request."""
    begin = time.monotonic()
    memory = parse_bytes(arguments.gpu_memory) if arguments.gpu_memory is not None else None
    config = load_config(arguments.config, arguments.overrides)
    plan = check(config, assumed_facts(config, arguments.gpus))
    for name, text in summary(config, plan).items():
        print(f"{name:<11} {text}")
    checked = dry_run(config, plan) if arguments.dry_run else None
    places = checked.places if checked else [built for built, _ in built_places(config, plan)]
    print(f"\n{aligned(stage_table(config, plan, places))}\n")
    verdict, enough = fits(plan, places, memory)
    print(verdict)
    print("\n".join(memory_notes(plan, places)))
    for warning in plan.warnings:
        print(f"warning: {warning}")
    if checked:
        print("\n".join(dry_run_report(checked)))
        print(f"  took        {time.monotonic() - begin:.1f} s in one process")
    return 0 if enough and not (checked and checked.problems) else 1


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return run(arguments)
    except ValueError as error:  # ConfigError is one
        print(f"plan: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Train a GPT-2 on .bin/.idx corpora, on one process or many.

One process:        python launch/pretrain.py --config configs/gpt2_117m.yaml
Several devices:    deepspeed --num_accelerators 4 launch/pretrain.py --config configs/gpt2_117m.yaml
torchrun, MPI:      torchrun --nproc-per-node 4 launch/pretrain.py ...   mpiexec -n 4 python launch/pretrain.py ...
Slurm:              srun python launch/pretrain.py --config configs/gpt2_1542m.yaml

Any field of the configuration can be set on the command line:

    ... batch.micro_batch=4 parallel.tensor_parallel=2 run.directory=runs/try optimizer.learning_rate=3e-4

Run again with the same run.directory it resumes from the newest checkpoint that verifies. Exit codes: 0 done; 2 the
request is wrong; 75 stopped on a signal after saving (start it again); 1 anything else.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from megagpt2.checkpoint import store
from megagpt2.checkpoint.load import Loaded
from megagpt2.config import Config, ConfigError, load_config
from megagpt2.config.facts import Facts
from megagpt2.config.load import dump_config, save_config
from megagpt2.config.rules import Plan, check
from megagpt2.data.batches import Batches
from megagpt2.data.indexed import IndexedCorpus
from megagpt2.data.order import Order
from megagpt2.data.tokenizer import Tokenizer
from megagpt2.generation.sampling import Sampling, generate
from megagpt2.kernels.extension import EXTENSION
from megagpt2.model.attention import automatic
from megagpt2.parallel.launch import RankEnvironment, detect, export
from megagpt2.parallel.quiet_deepspeed import deepspeed
from megagpt2.parallel.topology import build_topology
from megagpt2.planning.stages import stage_shares
from megagpt2.run.material import Material, check_directory, claim_directory, leave_directory, open_material
from megagpt2.run.resume import agree_on_checkpoint, agree_on_request, agree_on_weights, load_state, on_rank_0
from megagpt2.run.saving import build_saving
from megagpt2.training import offload
from megagpt2.training.console import Console
from megagpt2.training.engine import Engine, build_engine
from megagpt2.training.inference import next_logits
from megagpt2.training.loop import Hooks, Loop, Progress
from megagpt2.training.monitor import JsonLines, Monitor, TensorBoard
from megagpt2.training.replicas import ReplicasDiffer

_PATIENCE = timedelta(minutes=30)  # how long a rank waits for the others in one collective


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="e.g. batch.micro_batch=4")
    parser.add_argument(
        "--check-replicas", type=int, metavar="N", help="every N steps compare what ranks hold alike, bit by bit"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers append it
    return parser.parse_intermixed_args(argv)


def choose_gpu(environment: RankEnvironment) -> None:
    """LOCAL_RANK is the number of this rank's GPU, for us and for DeepSpeed."""
    visible = torch.cuda.device_count()
    if visible == 1:  # srun --gpus-per-task=1 shows every task its own one, as number 0
        os.environ["LOCAL_RANK"] = "0"
    elif environment.local_rank >= visible:
        raise ConfigError(
            f"{environment.local_size} ranks were started on this node, which has {visible} GPUs: start at most"
            f" {visible}, or train with training.device=cpu"
        )


def start_ranks(environment: RankEnvironment, plan_device: str) -> torch.device:
    """Join the process group."""
    if plan_device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group(backend, timeout=_PATIENCE)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, dist_init_required=False, verbose=False)
    return device


def attention_for_people(config: Config, plan: Plan, device: str) -> str:
    """Which attention trains, and why where it was chosen for the user."""
    if config.kernels.attention != "auto":
        return config.kernels.attention
    dropped, size = config.model.attention_dropout > 0, 4 if plan.precision == "fp32" else 2
    chosen = automatic(device, size, config.sequence_length, True, dropped)
    if chosen == "sdpa":
        return chosen
    return f"{chosen}, as sdpa {'cannot draw attention dropout' if dropped else 'is slower here'}"


def header(config: Config, plan: Plan, engine: Engine, environment: RankEnvironment) -> dict[str, str]:
    """What the run is, for people."""
    model, parallel = config.model, config.parallel
    rows = {
        "model": f"{model.name}: {model.layers} layers, {model.width} wide, {model.heads} heads,"
        f" vocabulary {model.vocabulary:,}",
        "parameters": f"{model.parameters():,}",
        "layout": f"{engine.topology}, ZeRO {parallel.zero_stage}"
        + (", sequence parallel" if parallel.sequence_parallel else "")
        + f", activation checkpointing {parallel.activation_checkpointing}",
        "batch": f"{config.batch.global_batch} sequences of {config.sequence_length} = {plan.accumulation} x"
        f" {plan.micro_batch} on each of {plan.data} replicas",
        "precision": plan.precision,
        "operators": EXTENSION.describe(engine.device.type),
        "attention": attention_for_people(config, plan, engine.device.type),
        "devices": f"{environment.world_size} x {engine.device.type}, started by {environment.launcher}",
        "run": str(config.run.directory),
    }
    if (config.offload.optimizer, config.offload.parameters) != ("none", "none"):
        rows["offload"] = f"optimizer {config.offload.optimizer}, parameters {config.offload.parameters}"
    if engine.bounds:
        shares = stage_shares(model, config.sequence_length, engine.bounds, parallel.activation_checkpointing)
        rows["stages"] = "; ".join(map(str, shares))
    return rows


def build_monitor(config: Config, rank: int) -> Monitor:
    if rank != 0:
        return Monitor([])
    console = Console(config.training.steps, config.monitor.console_every)
    sinks = [console, JsonLines(config.run.directory / "log.jsonl")]
    if config.monitor.tensorboard:
        sinks.append(TensorBoard(config.run.directory / "tensorboard"))
    return Monitor(sinks)


def sampler(engine: Engine, tokenizer: Tokenizer):
    """Writes the configured samples with the model as it is: every rank takes part."""
    monitor = engine.config.monitor

    def words_logits(tokens: torch.Tensor) -> torch.Tensor:
        return next_logits(engine, tokens)[:, : tokenizer.vocabulary_size]  # the model may have more

    def samples() -> list[tuple[str, str]]:
        texts = []
        for number, prompt in enumerate(monitor.sample_prompts):
            tokens = torch.tensor([tokenizer.encode(prompt) or [tokenizer.end_of_text]], device=engine.device)
            out = generate(
                words_logits, tokens, monitor.sample_tokens, engine.config.sequence_length,
                Sampling(top_k=40), seed=engine.config.training.seed + number, stop=tokenizer.end_of_text,
            )
            texts.append((prompt, tokenizer.decode(out[0, tokens.shape[1] :].tolist())))
        return texts

    return samples


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for; <|endoftext|> stands between texts, in none."""
    lengths = [len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocabulary_size)]
    lengths[tokenizer.end_of_text] = 0
    return np.array(lengths, dtype=np.int64)


def tell_start(monitor: Monitor, progress: Progress, plan: Plan, loaded: Loaded | None, notes: list[str]) -> None:
    """What people should know before the first step."""
    for note in notes:
        monitor.event(progress.step, note)
    for warning in plan.warnings:
        monitor.event(progress.step, f"warning: {warning}")
    if loaded is not None:
        monitor.event(
            progress.step,
            f"loaded {loaded.folder}: step {progress.step}, {progress.samples_seen:,} samples seen; rank 0 took"
            f" {len(loaded.tensors_read)} of {len(loaded.weights.files)} tensors, {loaded.bytes_read / 1e6:,.1f} of"
            f" {loaded.bytes_there / 1e6:,.1f} MB",
        )


def train(config: Config, plan: Plan, material: Material, environment: RankEnvironment, device_type: str) -> int:
    """One run on this rank; returns the exit code."""
    device = start_ranks(environment, device_type)
    agree_on_request(config, plan, material, device)
    loaded, notes = agree_on_checkpoint(config, material, device)
    weights = agree_on_weights(config, device) if loaded is None else None
    # Not before: a refused request leaves no trace.
    on_rank_0(lambda: str(claim_directory(config.run.directory)), device)
    topology = build_topology(plan.tensor, plan.pipeline)
    try:
        engine = build_engine(config, plan, topology, device)
    except ConfigError:  # offload.nvme_path, which only the run that has the directory may try
        on_rank_0(lambda: leave_directory(config.run.directory), device)
        raise
    if environment.rank == 0:
        save_config(config, config.run.directory / "config.yaml")
    atexit.register(offload.remove_files, config, environment.rank)  # where the run ends by an error
    progress = load_state(engine, loaded, weights)
    if weights is not None:
        notes.append(f"began with the weights of {config.checkpoint.weights}")
    length, seed = config.sequence_length, config.training.seed

    def batches(corpus: IndexedCorpus, shuffle: bool) -> Batches:
        order = Order(len(corpus.tokens), length, seed, shuffle)
        words = config.model.vocabulary
        skip = config.data.skip if shuffle else ()
        return Batches(corpus.tokens, order, plan.micro_batch, topology.replica, topology.data, words, skip)

    saving, how_saved = build_saving(engine, material, config.run.directory / "checkpoints")
    monitor = build_monitor(config, environment.rank)

    with monitor:
        monitor.start(
            header(config, plan, engine, environment) | {"checkpoints": how_saved}, dump_config(config), progress.step,
            progress.trained * length,
        )
        tell_start(monitor, progress, plan, loaded, notes)
        loaded = weights = None  # their files are mapped: a checkpoint that is removed would keep its place on the disk
        loop = Loop(
            engine, batches(material.train, True), batches(material.valid, False) if material.valid else None, monitor,
            Hooks(saving, sampler(engine, material.tokenizer) if material.tokenizer else None), progress,
            bytes_of_tokens(material.tokenizer) if material.tokenizer else None,
            ancestors={"deepspeed": 2, "torchrun": 1}.get(environment.launcher, 0),
        )
        try:
            code = loop.run()
        finally:
            saving.finish()
    dist.barrier()
    engine.close()
    dist.destroy_process_group()
    return code


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    rank = 0
    try:
        environment = detect(os.environ, sys.argv)
        rank = environment.rank
        overrides = list(arguments.overrides)
        if arguments.check_replicas is not None:
            overrides.append(f"training.check_replicas={arguments.check_replicas}")
        config = load_config(arguments.config, overrides)
        facts = Facts.detect(environment.world_size, config.training.device)
        facts = replace(facts, operators=EXTENSION.problem(facts.device))
        plan = check(config, facts)
        material = open_material(config, plan)
        check_directory(config.run.directory)
        export(environment)
        if facts.device == "cuda":
            choose_gpu(environment)
        return train(config, plan, material, environment, facts.device)
    except ReplicasDiffer as error:  # on every rank
        if rank == 0:
            print(f"megagpt2: {error}", file=sys.stderr, flush=True)
        dist.barrier()
        return 1
    except (ConfigError, store.CheckpointError, ValueError) as error:
        if not isinstance(error, (ConfigError, store.CheckpointError)) and dist.is_initialized():
            raise  # not the user's request: show where it came from
        alone = isinstance(error, store.CheckpointError)  # it may have met only this rank
        if rank == 0 or alone:
            print(f"megagpt2: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized() and not alone:
            dist.barrier()  # launchers stop all at the first exit: not before the message is out
            dist.destroy_process_group()
        return 2


def end_process(code: int) -> NoReturn:
    """Exit without the interpreter's last garbage collection. Process groups die in it, and one that waits there for a
    thread which waits for the interpreter never ends: finished ranks hung so, twice in 90 starts on a busy machine."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end_process(main())

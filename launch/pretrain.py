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
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megagpt2.checkpoint import store
from megagpt2.checkpoint.load import Loaded, choose, open_checkpoint
from megagpt2.checkpoint.save import Snapshot, TrainingState, save_checkpoint
from megagpt2.config import Config, ConfigError, load_config
from megagpt2.config.facts import Facts
from megagpt2.config.load import dump_config, save_config
from megagpt2.config.rules import Plan, check
from megagpt2.data.batches import Batches
from megagpt2.data.indexed import IndexedCorpus
from megagpt2.data.order import Order
from megagpt2.data.tokenizer import Tokenizer
from megagpt2.generation.sampling import Sampling, generate
from megagpt2.model.gpt2 import layer_plans
from megagpt2.model.initialize import initial_value
from megagpt2.parallel.launch import RankEnvironment, detect, export
from megagpt2.parallel.quiet_deepspeed import deepspeed
from megagpt2.parallel.topology import build_topology
from megagpt2.training.console import Console
from megagpt2.training.engine import Engine, build_engine
from megagpt2.training.inference import next_logits
from megagpt2.training.loop import Hooks, Loop, Progress
from megagpt2.training.masters import MOMENTS, create_moments, fragments, local_weights, set_values
from megagpt2.training.monitor import JsonLines, Monitor, TensorBoard

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_PATIENCE = timedelta(minutes=30)  # how long a rank waits for the others in one collective


@dataclass(frozen=True)
class Material:
    """What a run reads: corpora, and the tokenizer if there is one."""

    train: IndexedCorpus
    valid: IndexedCorpus | None
    tokenizer: Tokenizer | None


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="e.g. batch.micro_batch=4")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers append it
    return parser.parse_intermixed_args(argv)


def open_corpus(prefix: Path, field: str, config: Config) -> IndexedCorpus:
    """A corpus that fits the model, or a ConfigError."""
    try:
        corpus = IndexedCorpus(prefix)
        Order(len(corpus.tokens), config.sequence_length, config.training.seed)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{field}: {error}") from None
    words = (corpus.manifest or {}).get("vocabulary_size", 0)
    if words > config.model.vocabulary:
        raise ConfigError(
            f"{field}: {prefix} was tokenized with a vocabulary of {words}, model.vocabulary is"
            f" {config.model.vocabulary}: set model.vocabulary to {words}"
        )
    return corpus


def open_tokenizer(config: Config, corpora: list[IndexedCorpus | None]) -> Tokenizer | None:
    """The tokenizer that fits the model and made the corpora, or a ConfigError."""
    if config.data.tokenizer is None:
        return None
    try:
        tokenizer = Tokenizer.load(config.data.tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.tokenizer: {error}") from None
    if tokenizer.vocabulary_size > config.model.vocabulary:
        raise ConfigError(
            f"data.tokenizer: {config.data.tokenizer} has {tokenizer.vocabulary_size} tokens, model.vocabulary is"
            f" {config.model.vocabulary}: set model.vocabulary to {tokenizer.vocabulary_size}"
        )
    for corpus in filter(None, corpora):
        made_with = (corpus.manifest or {}).get("tokenizer_sha256", tokenizer.sha256)
        if made_with != tokenizer.sha256:  # its samples, and those of every checkpoint, would be gibberish
            raise ConfigError(
                f"data.tokenizer: {config.data.tokenizer} (sha256 {tokenizer.sha256[:12]}) is not the tokenizer that"
                f" made {corpus.prefix} (sha256 {made_with[:12]}): name that one, or prepare the corpus again"
            )
    return tokenizer


def open_material(config: Config, plan: Plan) -> Material:
    """Everything that the configuration names, checked before any process group exists."""
    if config.data.train is None:
        raise ConfigError("data.train is not set: give the PREFIX of a corpus that tools/prepare_corpus.py wrote")
    train = open_corpus(config.data.train, "data.train", config)
    valid = None
    if config.data.valid is not None and config.validation.every:
        valid = open_corpus(config.data.valid, "data.valid", config)
        windows = Order(len(valid.tokens), config.sequence_length, 0, shuffle=False).windows
        if windows < plan.micro_batch * plan.data:
            raise ConfigError(
                f"data.valid: {config.data.valid} has {windows} sequences of {config.sequence_length} tokens, fewer"
                f" than one micro-batch on each of {plan.data} data-parallel ranks ({plan.micro_batch * plan.data}):"
                " use a smaller batch.micro_batch, or validation.every=0"
            )
    return Material(train, valid, open_tokenizer(config, [train, valid]))


def check_directory(directory: Path) -> None:
    """Refuse a run.directory that can't be written, without writing: every rank sees the same."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        why = f"{there} is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        why = f"this user may not write in {there}"
    else:
        return
    raise ConfigError(f"run.directory: {directory} can't be written, {why}: name another folder")


def start_ranks(environment: RankEnvironment, plan_device: str) -> torch.device:
    """Join the process group."""
    if plan_device == "cuda":
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group(backend, timeout=_PATIENCE)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, dist_init_required=False, verbose=False)
    return device


def broadcast_text(text: str | None, device: torch.device) -> str | None:
    """Rank 0's text on every rank: as bytes, never pickled."""
    payload = None if text is None else text.encode()
    length = torch.tensor([-1 if payload is None else len(payload)], device=device)
    dist.broadcast(length, 0)
    count = int(length.item())
    if count < 0:
        return None
    data = torch.zeros(count, dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return bytes(data.cpu().numpy()).decode()


def agree_on_checkpoint(config: Config, device: torch.device) -> tuple[Loaded | None, list[str]]:
    """Rank 0 looks and opens, then every rank does; an error is the same ConfigError everywhere."""
    notes: list[str] = []
    answer = None
    if dist.get_rank() == 0:
        try:
            folder, notes = choose(config.checkpoint.resume, config.run.directory / "checkpoints")
            if folder is not None:
                open_checkpoint(folder, config.model)  # refuses another model's
                answer = f"ok:{folder}"
        except store.CheckpointError as error:
            answer = f"error:{error}"
    answer = broadcast_text(answer, device)
    if answer is None:
        return None, notes
    status, _, text = answer.partition(":")
    if status == "error":
        raise ConfigError(text)
    return open_checkpoint(Path(text), config.model), notes


def load_state(engine: Engine, loaded: Loaded | None) -> Progress:
    """Fill weights, masters and moments: from the checkpoint, or from the seed. One path for both (DESIGN D5)."""
    seed, moments = engine.config.training.seed, engine.config.optimizer.name == "adamw"
    if loaded is None:
        set_values(engine.deepspeed, engine.topology, lambda spec: initial_value(spec, seed))
        if moments:  # left to itself, ZeRO 1 and 2 link names to moments when only the first group has them
            create_moments(engine.deepspeed, 0)
        return Progress()
    set_values(engine.deepspeed, engine.topology, loaded.master)
    state = loaded.state
    if moments:
        create_moments(engine.deepspeed, state.updates)
        for fragment in fragments(engine.deepspeed, engine.topology):
            for kind in MOMENTS:
                value = loaded.moment(kind, fragment.spec).flatten()[fragment.start : fragment.stop]
                fragment.tensors[kind].copy_(value)
    engine.load_scaler(state.loss_scaler)
    return Progress(state.step, state.samples_seen, state.updates, tuple(state.losses))


def snapshot(engine: Engine, progress: Progress, material: Material) -> Snapshot:
    """What this rank saves."""
    precision = engine.plan.precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    kinds = () if precision == "fp32" else ("master",)  # fp32 weights are the masters
    if engine.config.optimizer.name == "adamw":
        kinds += MOMENTS
    slices = (
        (f.spec, f.start, {kind: f.tensors[kind] for kind in kinds})
        for f in fragments(engine.deepspeed, engine.topology)
    )
    state = TrainingState(
        progress.step, progress.samples_seen, progress.updates, list(progress.losses), [], engine.scaler_state()
    )
    texts = {}
    folder = engine.config.data.tokenizer
    if material.tokenizer is not None and engine.topology.rank == 0:
        texts = {n: (folder / n).read_text(encoding="utf-8") for n in _TOKENIZER_FILES if (folder / n).is_file()}
    return Snapshot(
        local_weights(engine.deepspeed), slices, state, engine.config.model, dtype, texts,
        material.tokenizer.end_of_text if material.tokenizer else None,
    )


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
        "devices": f"{environment.world_size} x {engine.device.type}, started by {environment.launcher}",
        "run": str(config.run.directory),
    }
    if engine.bounds:
        names = [layer.name for layer in layer_plans(model)]
        stages = [names[a:b] for a, b in zip(engine.bounds[:-1], engine.bounds[1:], strict=True)]
        rows["stages"] = "; ".join(f"{stage[0]} .. {stage[-1]}" for stage in stages)
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
        monitor.event(progress.step, f"passed over {note}")
    for warning in plan.warnings:
        monitor.event(progress.step, f"warning: {warning}")
    if loaded is not None:
        monitor.event(
            progress.step,
            f"loaded {loaded.folder}: step {progress.step}, {progress.samples_seen:,} samples seen,"
            f" {len(loaded.weights.files)} tensors",
        )


def train(config: Config, plan: Plan, material: Material, environment: RankEnvironment, device_type: str) -> int:
    """One run on this rank; returns the exit code."""
    device = start_ranks(environment, device_type)
    loaded, notes = agree_on_checkpoint(config, device)
    if environment.rank == 0:  # not before: a refused request leaves no trace
        save_config(config, config.run.directory / "config.yaml")
    topology = build_topology(plan.tensor, plan.pipeline)
    engine = build_engine(config, plan, topology, device)
    progress = load_state(engine, loaded)
    length, seed = config.sequence_length, config.training.seed

    def batches(corpus: IndexedCorpus, shuffle: bool) -> Batches:
        order = Order(len(corpus.tokens), length, seed, shuffle)
        return Batches(corpus.tokens, order, plan.micro_batch, topology.replica, topology.data)

    checkpoints = config.run.directory / "checkpoints"
    monitor = build_monitor(config, environment.rank)

    def save(at: Progress) -> None:
        folder = save_checkpoint(checkpoints, snapshot(engine, at, material), topology)
        if environment.rank == 0 and config.checkpoint.keep:
            store.prune(checkpoints, config.checkpoint.keep, folder)
        monitor.event(at.step, f"saved {folder}")

    with monitor:
        monitor.start(
            header(config, plan, engine, environment), dump_config(config), progress.step,
            progress.samples_seen * length,
        )
        tell_start(monitor, progress, plan, loaded, notes)
        loop = Loop(
            engine, batches(material.train, True), batches(material.valid, False) if material.valid else None, monitor,
            Hooks(save, sampler(engine, material.tokenizer) if material.tokenizer else None), progress,
            bytes_of_tokens(material.tokenizer) if material.tokenizer else None,
        )
        code = loop.run()
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
        config = load_config(arguments.config, arguments.overrides)
        facts = Facts.detect(environment.world_size, config.training.device)
        plan = check(config, facts)
        material = open_material(config, plan)
        check_directory(config.run.directory)
        export(environment)
        return train(config, plan, material, environment, facts.device)
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


if __name__ == "__main__":
    sys.exit(main())

"""From nothing to an evaluated GPT-2 on this machine: tokenizer, corpus, training on four processes, a sample.

    python tools/quickstart.py            what `make quickstart` runs; a second time it reuses what is there
    python tools/quickstart.py --fresh    throw runs/quickstart away first

The text is the running Python's standard library, which every machine has. Training is
`deepspeed --num_accelerators 4 launch/pretrain.py --config configs/quickstart.yaml`: tensor 2 x pipeline 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megagpt2.config import Config, ConfigError, load_config
from megagpt2.config.batching import validation_samples
from megagpt2.data.indexed import IndexedCorpus
from megagpt2.data.order import Order
from megagpt2.parallel.launch import free_port

ROOT = Path(__file__).resolve().parent.parent
# What is installed beside the library, its tests, and modules that are tables of characters or of help texts.
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings", "pydoc_data"}


def run(*command: str | Path, **environment: str) -> None:
    """Run a step; its failure ends the quickstart with its exit code."""
    sys.stdout.flush()  # or, in a pipe, our lines come after the step's
    result = subprocess.run([str(part) for part in command], env=os.environ | environment, check=False)
    if result.returncode:
        print(f"quickstart: {Path(str(command[1])).name} ended with exit code {result.returncode}", file=sys.stderr)
        sys.exit(result.returncode)


def check_request(config: Config) -> None:
    """What this program needs of a configuration, beyond what training does."""
    data = config.data
    for name in ("train", "valid", "tokenizer"):
        if getattr(data, name) is None:
            raise ConfigError(f"data.{name} is not set: name where the quickstart is to write it")
    prefix = str(data.train).removesuffix("_train")
    if (str(data.train), str(data.valid)) != (f"{prefix}_train", f"{prefix}_valid"):
        raise ConfigError(f"data.train {data.train} and data.valid {data.valid}: must be PREFIX_train and PREFIX_valid")
    if not config.validation.every:
        raise ConfigError("validation.every is 0: the quickstart compares validations, set it to 1 or more")


def program(name: str) -> Path:
    """A program of the environment this runs in, as one would type it here."""
    path = Path(sys.executable).with_name(name)
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def library_sources() -> list[Path]:
    """The standard library's own modules, without its tests and what is installed beside it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in folder.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(folder).parts) and path.stat().st_size
    )


def make_corpus(config: Config, sources: list[Path]) -> None:
    """Tokenizer and corpus, unless they are there."""
    tokenizer = config.data.tokenizer
    prefix = Path(str(config.data.train).removesuffix("_train"))
    if not (tokenizer / "tokenizer.json").exists():
        run(
            sys.executable, ROOT / "tools/train_tokenizer.py", "--input", *sources, "--suffix", ".py",
            "--vocab-size", str(config.model.vocabulary), "--output", tokenizer,
        )
    if not Path(f"{prefix}_valid.idx").exists():
        run(
            sys.executable, ROOT / "tools/prepare_corpus.py", "--input", *sources, "--suffix", ".py",
            "--tokenizer", tokenizer, "--output", prefix, "--overwrite",
        )


def remove_results(config: Config) -> None:
    """What this program made. Only in runs/quickstart: elsewhere there may be what somebody else made.

    Raises ConfigError if the configuration points somewhere else.
    """
    home = ROOT / "runs/quickstart"
    names = {"data.tokenizer": config.data.tokenizer, "run.directory": config.run.directory}
    names |= {"data.train": config.data.train, "data.valid": config.data.valid}
    for name, path in names.items():
        if not path.resolve().is_relative_to(home):
            raise ConfigError(f"--fresh removes only what is in {home}, but {name} is {path}: remove that yourself")
    for folder in (config.data.tokenizer, config.run.directory):
        shutil.rmtree(folder, ignore_errors=True)
    for prefix in (config.data.train, config.data.valid):
        for suffix in (".bin", ".idx", ".json"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)


def unigram_loss(config: Config, windows: int) -> float:
    """Nats per token, on the validation's own targets, of the tokens' frequencies in the training corpus.

    The simplest model that knows the corpus: what a network must beat to have learned anything about order. Every
    count is one too high, so that unseen tokens have a probability.
    """
    words = config.model.vocabulary
    train, valid = IndexedCorpus(config.data.train), IndexedCorpus(config.data.valid)
    counts = np.bincount(train.tokens, minlength=words) + 1.0
    nats = -np.log(counts / counts.sum())
    length = config.sequence_length
    order = Order(len(valid.tokens), length, 0, shuffle=False)
    starts = [order.window(number).start for number in range(windows)]
    return float(np.mean([nats[valid.tokens[start + 1 : start + length + 1]].mean() for start in starts]))


def read_log(config: Config) -> tuple[list[dict], dict]:
    """Validation rows, and the last step's row."""
    rows = [json.loads(line) for line in (config.run.directory / "log.jsonl").read_text().splitlines()]
    return [r for r in rows if r["kind"] == "validation"], [r for r in rows if r["kind"] == "step"][-1]


def report(config: Config, console: Console, replicas: int, seconds: float) -> float:
    """The result as a table; nats per token by which the model beats the unigram model."""
    validations, last = read_log(config)
    before, after = validations[0], validations[-1]
    held_out = Order(len(IndexedCorpus(config.data.valid).tokens), config.sequence_length, 0, shuffle=False)
    batch = config.batch
    windows = validation_samples(
        config.validation.batches, held_out.windows, batch.global_batch, batch.micro_batch, replicas
    )
    unigram = unigram_loss(config, windows)
    bits = after["bits_per_byte"] / after["loss"]
    table = Table(title=f"held-out text, {windows} windows of {config.sequence_length} tokens", title_justify="left")
    for heading in ("", "nats per token", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if not heading else "right")
    losses = {"before training": before["loss"], "unigram model": unigram, "after training": after["loss"]}
    for name, loss in losses.items():
        table.add_row(name, f"{loss:.3f}", f"{math.exp(loss):,.1f}", f"{loss * bits:.3f}")
    console.print(table)
    gain = unigram - after["loss"]
    console.print(
        f"The model beats the unigram model by {gain:.2f} nats per token after {last['step']} steps,"
        f" {last['tokens']:,} tokens; the whole quickstart took {seconds:.0f} s."
    )
    return gain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml", help="another small run")
    parser.add_argument("--ranks", type=int, default=4, help="processes to start (default: 4)")
    parser.add_argument("--files", type=int, metavar="N", help="use only N of the library's files")
    parser.add_argument(
        "--gain", type=float, default=1.0, metavar="NATS",
        help="nats per token by which the model must beat the unigram model (default: 1.0)",
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of reusing what is there")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="as for launch/pretrain.py")
    arguments = parser.parse_intermixed_args()
    begin = time.monotonic()
    file = arguments.config.absolute()  # what the user means is beside them; the paths in it are this checkout's
    os.chdir(ROOT)
    try:
        config = load_config(file, arguments.overrides)
        check_request(config)
        if arguments.fresh:
            remove_results(config)
    except ConfigError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, soft_wrap=True)
    console.rule("1. tokenizer and corpus, from Python's standard library", align="left")
    make_corpus(config, library_sources()[: arguments.files])
    console.rule(f"2. training on {arguments.ranks} processes", align="left")
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.ranks)
    run(
        sys.executable, program("deepspeed"), "--num_accelerators", str(arguments.ranks),
        "--master_port", str(free_port()), "--log_level", "error", ROOT / "launch/pretrain.py",
        "--config", file, *arguments.overrides,
        OMP_NUM_THREADS=str(threads), DS_ACCELERATOR="cpu",
    )
    console.rule("3. what it learned", align="left")
    replicas = arguments.ranks // (config.parallel.tensor_parallel * config.parallel.pipeline_parallel)
    gain = report(config, console, replicas, time.monotonic() - begin)
    checkpoint = sorted((config.run.directory / "checkpoints").glob("step_*"))[-1]
    run(
        sys.executable, ROOT / "launch/generate.py", "--checkpoint", checkpoint, "--prompt", "    def",
        "--tokens", "80", "--top-k", "40",
    )
    console.print(
        f"\nrun          {config.run.directory}\ncheckpoint   {checkpoint} (transformers opens its model/)"
        f"\ntensorboard  {program('tensorboard')} --logdir {config.run.directory / 'tensorboard'}"
        f"\nsample more  {program('python')} launch/generate.py --checkpoint {checkpoint} --prompt 'import'"
    )
    if gain < arguments.gain:
        print(f"quickstart: {gain:.2f} nats per token are fewer than the {arguments.gain} expected", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

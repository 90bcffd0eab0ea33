"""Convert a GPT-2 between checkpoint formats, and show that it still is the same model.

    python tools/convert_checkpoint.py --from megatron --to huggingface runs/megatron models/gpt2
    python tools/convert_checkpoint.py --from huggingface --to megatron --tensor-parallel 2 models/gpt2 runs/megatron
    python tools/convert_checkpoint.py --from deepspeed --to megagpt2 runs/old runs/new/checkpoints
    python tools/convert_checkpoint.py --from openai --to huggingface models/1558M models/gpt2-xl
    python tools/convert_checkpoint.py --from nanogpt --activation tanh --to llmc out/ckpt.pt gpt2.bin

FORMAT       read  written  SOURCE, DESTINATION
huggingface   x       x     folder with config.json and model.safetensors, its shards or pytorch_model.bin
megagpt2      x       x     read: step_NNNNNNNN; written, where Adam's state is there: the folder for step_NNNNNNNN
megatron      x       x     Megatron-LM's classic folder (latest_checkpointed_iteration.txt, or one iteration)
deepspeed     x             ROOT or ROOT/TAG: pipeline folders of Megatron-DeepSpeed and GPT-NeoX, plain engines
                            (ZeRO 1 to 3), universal checkpoints
openai        x             folder of OpenAI's release (hparams.json, model.ckpt.*)
nanogpt       x       x     ckpt.pt
llmc          x       x     model .bin, fp32 or bf16

Our checkpoints are Hugging Face models already (step_NNNNNNNN/model). The geometry is read from SOURCE; one tensor is
in memory at a time (a destination that is one pickle is put together on the disk). Where fp32 is written and SOURCE has
fp32 masters, they are taken. At the end both sides' logits on a fixed input are compared, with transformers' too where
one side is its, it is installed and has memory for the model; if they differ nothing is left at DESTINATION. A pickle
that wants more than tensors and known plain classes is not opened.

Exit codes: 0 done; 1 the two sides' logits differ; 2 the request is wrong, or SOURCE is not what it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt2.checkpoint import convert, store
from megagpt2.checkpoint.formats import huggingface, llmc, megatron, nanogpt
from megagpt2.checkpoint.formats.deepspeed import DeepSpeed
from megagpt2.checkpoint.formats.huggingface import HuggingFace
from megagpt2.checkpoint.formats.openai import OpenAI
from megagpt2.checkpoint.formats.source import Source, whole_specs
from megagpt2.checkpoint.load import Checkpoint
from megagpt2.model.parameters import Spec
from megagpt2.parallel.memory import free_memory
from megagpt2.planning.memory import show_bytes
from megagpt2.run.material import TOKENIZER_FILES

READ = ("huggingface", "megagpt2", "megatron", "deepspeed", "openai", "nanogpt", "llmc")
WRITTEN = ("huggingface", "megagpt2", "megatron", "nanogpt", "llmc")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = 1e-4  # of the largest logit, between transformers and us; our own two readings must agree exactly
OF_SOURCE = {  # options, and the formats that don't say themselves what they say
    "activation": ("megatron", "deepspeed", "nanogpt"), "heads": ("megatron", "deepspeed"),
    "checkpoint_version": ("megatron",), "qkv": ("deepspeed",), "zero_biases": ("nanogpt",),
}
OF_TARGET = {
    "tensor_parallel": ("megatron",), "pipeline_parallel": ("megatron",), "megatron_layers": ("megatron",),
    "no_biases": ("nanogpt",), "tokenizer": ("huggingface", "megagpt2"),
}
GPT2_TOKENIZER = {
    "tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, "add_prefix_space": False,
    **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", required=True, choices=READ, dest="source_format", metavar="FORMAT")
    parser.add_argument("--to", required=True, choices=WRITTEN, dest="target_format", metavar="FORMAT")
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="must not be there yet")
    parser.add_argument("--dtype", choices=TYPES, help="of the written weights (default: as they are; nanogpt: fp32)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="to huggingface, megagpt2: put this in the model's folder"
    )
    known = parser.add_argument_group("what some sources don't say")
    known.add_argument("--vocabulary", type=int, metavar="N", help="rows of the padded embedding that are words")
    known.add_argument("--activation", choices=("tanh", "erf"),
                       help="megatron, deepspeed, nanogpt: which GELU; GPT-2's is tanh")
    known.add_argument("--heads", type=int, metavar="N", help="megatron, deepspeed")
    known.add_argument("--checkpoint-version", type=float, metavar="V", help="megatron: where the file's own is wrong")
    known.add_argument("--qkv", choices=("heads", "thirds"), help="deepspeed: the order of query_key_value's rows")
    known.add_argument("--zero-biases", action="store_true", help="nanogpt: a model without biases gets zeros")
    layout = parser.add_argument_group("what is written")
    layout.add_argument("--tensor-parallel", type=int, metavar="N", help="megatron (default: 1)")
    layout.add_argument("--pipeline-parallel", type=int, metavar="N", help="megatron (default: 1)")
    layout.add_argument("--megatron-layers", choices=("te", "local"),
                        help="megatron: names of Transformer Engine's layers (default) or of its own")
    layout.add_argument("--no-biases", action="store_true", help="nanogpt: leave biases out, if all are zero")
    return parser.parse_args(argv)


def open_source(kind: str, path: Path, options: argparse.Namespace) -> Source:
    """SOURCE, its headers read; CheckpointError where it isn't what it is said to be."""
    try:
        source = open_format(kind, path, options)
    except (store.CheckpointError, OSError):
        raise
    except Exception as error:  # in a foreign file anything can be wrong
        raise store.CheckpointError(f"{path} can't be read as {kind}: {type(error).__name__} {error}") from None
    if options.vocabulary is not None and options.vocabulary != source.model.vocabulary:
        source = Unpadded(source, options.vocabulary)
    return source


def open_format(kind: str, path: Path, options: argparse.Namespace) -> Source:
    known = {"activation": options.activation, "vocabulary": options.vocabulary, "heads": options.heads}
    if not path.exists():
        raise store.CheckpointError(f"{path} does not exist")
    if kind == "huggingface":
        return HuggingFace(path)
    if kind == "megagpt2":
        store.verify(path)
        return Checkpoint(path)
    if kind == "megatron":
        return megatron.Megatron(path, version=options.checkpoint_version, **known)
    if kind == "deepspeed":
        return DeepSpeed(path, qkv=options.qkv, **known)
    if kind == "openai":
        return OpenAI(path)
    if kind == "nanogpt":
        if options.activation is None:
            raise store.CheckpointError(
                "--activation tanh|erf is needed: nanoGPT's files don't say which GELU they were trained with (erf's"
                " since May 2023)"
            )
        return nanogpt.NanoGPT(path, options.activation, options.zero_biases)
    return llmc.LlmC(path)


class Changed:
    """A source that gives some of what it has in another way."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class Cast(Changed):
    """Weights in another type; in fp32 the masters, where there are any."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        super().__init__(source)
        self.dtype = dtype
        self._masters = dtype == torch.float32 and "master" in getattr(source, "kinds", ())

    def read(self, spec: Spec) -> Tensor:
        return self._source.state("master", spec) if self._masters else self._source.read(spec).to(self.dtype)


class Unpadded(Changed):
    """The first rows of an embedding that says not itself how many of them are words."""

    def __init__(self, source: Source, vocabulary: int) -> None:
        super().__init__(source)
        rows = source.model.vocabulary
        if not 0 < vocabulary <= rows:
            raise store.CheckpointError(f"--vocabulary {vocabulary}: the embedding has {rows} rows")
        self.model = source.model.model_copy(update={"vocabulary": vocabulary})
        self._rows = rows

    def _whole(self, spec: Spec) -> Spec:
        return replace(spec, shape=(self._rows, *spec.shape[1:])) if spec.name == "wte.weight" else spec

    def read(self, spec: Spec) -> Tensor:
        return self._source.read(self._whole(spec))[: spec.shape[0]]

    def state(self, kind: str, spec: Spec) -> Tensor:
        return self._source.state(kind, self._whole(spec))[: spec.shape[0]]


def write_target(kind: str, path: Path, source: Source, options: argparse.Namespace) -> Path:
    """DESTINATION (or what takes its place until it is known to be right); returns what the reader opens."""
    if kind in ("llmc", "nanogpt"):
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        path.mkdir(parents=True)
    inside = options.source / "model" if options.source_format == "megagpt2" else options.source
    texts = tokenizer_files(options.tokenizer or inside)
    end = end_of_text(texts)
    if kind == "huggingface":
        huggingface.write(path, source, source.dtype, texts, end)
    elif kind == "megagpt2":
        return convert.write_checkpoint(path, source, texts, end)
    elif kind == "megatron":
        megatron.write(
            path, source, options.tensor_parallel or 1, options.pipeline_parallel or 1,
            layers=options.megatron_layers or "te",
        )
    elif kind == "nanogpt":
        nanogpt.write(path, source, not options.no_biases)
    else:
        llmc.write(path, source, source.dtype)
    return path


def tokenizer_files(folder: Path) -> dict[str, str]:
    """A tokenizer's files under transformers' names; OpenAI's are the same under others."""
    names = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"} | {name: name for name in TOKENIZER_FILES}
    if not folder.is_dir():
        return {}
    found = {ours: (folder / n).read_text(encoding="utf-8") for n, ours in names.items() if (folder / n).is_file()}
    if {"vocab.json", "merges.txt"} <= set(found) and "tokenizer_config.json" not in found:
        found["tokenizer_config.json"] = json.dumps(GPT2_TOKENIZER, indent=1)
    return found


def end_of_text(texts: dict[str, str]) -> int | None:
    """<|endoftext|>'s number, where there is a vocabulary."""
    try:
        return json.loads(texts.get("vocab.json", "{}")).get("<|endoftext|>")
    except (ValueError, AttributeError, RecursionError) as error:
        raise store.CheckpointError(f"the tokenizer's vocabulary (vocab.json, encoder.json) is none: {error}") from None


def check_request(options: argparse.Namespace) -> None:
    """What can be refused before anything is opened."""
    if options.destination.exists() or options.destination.is_symlink():
        raise store.CheckpointError(f"{options.destination} is there already: name another DESTINATION, or remove it")
    formats = (OF_SOURCE, options.source_format, "--from"), (OF_TARGET, options.target_format, "--to")
    for table, kind, which in formats:
        for name, kinds in table.items():
            if getattr(options, name) not in (None, False) and kind not in kinds:
                raise store.CheckpointError(
                    f"--{name.replace('_', '-')} says nothing with {which} {kind}: it is for {', '.join(kinds)}"
                )
    for name in ("tensor_parallel", "pipeline_parallel"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise store.CheckpointError(f"--{name.replace('_', '-')} {value}: use at least 1")
    if options.tokenizer is not None and not tokenizer_files(options.tokenizer):
        raise store.CheckpointError(f"--tokenizer {options.tokenizer} holds none of {', '.join(TOKENIZER_FILES)}")


def check_target(options: argparse.Namespace, source: Source) -> None:
    """What the format that is asked for can't hold."""
    if options.target_format != "huggingface" and source.model.norm != "pre":
        raise store.CheckpointError(f"{options.target_format} has no GPT-1 (norm: post): huggingface has")
    if options.target_format == "llmc" and source.dtype not in (torch.float32, torch.bfloat16):
        raise store.CheckpointError(f"llm.c has no files of {source.dtype}: give --dtype fp32 or bf16")
    if options.target_format == "megagpt2" and (options.dtype or options.source_format == "megagpt2"):
        raise store.CheckpointError(
            "--to megagpt2 keeps masters and state as they are: leave --dtype out; a checkpoint of ours can be copied"
        )
    if options.target_format == "megagpt2" and not getattr(source, "kinds", ()):
        raise store.CheckpointError(
            f"{options.source} holds no optimizer state to go on from: convert --to huggingface, and begin a run with"
            " checkpoint.weights"
        )


def same_logits(source: Source, target: Source) -> bool:
    """Say how far apart the logits of both sides are: weights that are alike give the same bits."""
    found, largest = convert.difference(source, target)
    print(f"logits: largest difference {found:.3g} (largest logit {largest:.3g})", flush=True)
    return found == 0.0


def as_transformers(folder: Path, ours: Source) -> bool:
    """Whether transformers computes with a folder what we do with the same weights, as far as it is installed."""
    if (theirs := transformers_logits(folder, ours)) is None:
        return True
    logits = convert.logits_of(ours, convert.fixed_input(ours.model.vocabulary, ours.model.context))
    found, limit = float((theirs - logits).abs().max()), TOLERANCE * max(float(logits.abs().max()), 1.0)
    print(f"transformers: largest difference {found:.3g} (limit {limit:.3g})", flush=True)
    return found <= limit


def transformers_logits(folder: Path, source: Source) -> torch.Tensor | None:
    """What transformers computes with a folder, in fp32; None where it is not installed, or has no memory for it."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: its logits are not compared")
        return None
    if (needed := 2 * 4 * source.model.parameters()) > (free := free_memory()):  # it has the whole model in memory
        print(f"transformers' logits are not compared: they take {show_bytes(needed)}, and {show_bytes(free)} are free")
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(convert.fixed_input(source.model.vocabulary, source.model.context)).logits
    return logits[..., : source.model.vocabulary]


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def convert_checkpoint(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    check_request(options)
    source = open_source(options.source_format, options.source, options)
    stored = source
    wanted = options.dtype or ("fp32" if options.target_format == "nanogpt" else None)
    if wanted is not None and TYPES[wanted] != source.dtype:
        source = Cast(source, TYPES[wanted])
    check_target(options, source)
    model = source.model
    print(
        f"{options.source}: {model.layers} layers, {model.width} wide, {model.heads} heads, vocabulary"
        f" {model.vocabulary:,}, context {model.context:,}, {len(whole_specs(model))} tensors in {stored.dtype}"
    )
    for note in source.notes:
        print(f"note: {note}")
    partial = options.destination.with_name(f".{options.destination.name}.partial-{os.getpid()}")
    try:
        written = write_target(options.target_format, partial, source, options)
        again = argparse.Namespace(**vars(options) | {
            "vocabulary": model.vocabulary, "heads": model.heads, "activation": "tanh", "checkpoint_version": None,
            "zero_biases": True,
        })
        target = open_source(options.target_format, written, again)
        good = same_logits(source, target)
        if options.target_format in ("huggingface", "megagpt2"):
            good &= as_transformers(written / "model" if options.target_format == "megagpt2" else written, target)
        elif options.source_format == "huggingface":
            good &= as_transformers(options.source, stored)
        if not good:
            print(f"the two sides differ: nothing is left at {options.destination}", file=sys.stderr)
            return 1
        partial.rename(options.destination)
    finally:
        remove(partial)
    print(f"wrote {options.destination} in {time.perf_counter() - began:.1f} s")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        return convert_checkpoint(options)
    except (store.CheckpointError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""DeepSpeed's own checkpoints (https://github.com/deepspeedai/DeepSpeed), read: of a PipelineModule with
Megatron-DeepSpeed's or GPT-NeoX's layers, of a plain engine whose module has transformers' or Megatron's names, and
universal ones.

    ROOT/latest                                           the tag
    ROOT/TAG/layer_02-model_01-model_states.pt            a layer of the pipeline's list, one tensor-parallel rank
    ROOT/TAG/mp_rank_01_model_states.pt                   module (a plain engine's), param_shapes, args
    ROOT/TAG/[bf16_]zero_pp_rank_0_mp_rank_01_optim_states.pt     stretches of masters and moments (zero.py)
    ROOT/TAG/zero/2.self_attention.dense.weight/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt           universal

mp_rank = stage x tensor-parallel ranks + tensor-parallel rank. A tied parameter is taken from the first stage: the last
one's copy of the positions is not kept in step. Every master is compared with its weight, so that a layout that was
misunderstood can't pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt2.checkpoint.formats import megatron
from megagpt2.checkpoint.formats.huggingface import is_transposed
from megagpt2.checkpoint.formats.pickles import load_pickled
from megagpt2.checkpoint.formats.source import check_shape, gpt2_config, refuse_others, whole_specs, widest
from megagpt2.checkpoint.formats.zero import KINDS, UniversalStates, ZeroStates
from megagpt2.checkpoint.store import CheckpointError
from megagpt2.config.schema import ModelConfig
from megagpt2.model.parameters import Spec

_LAYER_FILE = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
_TRANSFORMERS = re.compile(r"(?:transformer\.)?((?:h\.\d+|wte|wpe|ln_f)\..+)")
_BUFFER = re.compile(r"h\.\d+\.attn\.(?:bias|masked_bias)")
_IN_LIST = re.compile(r"(\d+)\.(.+)")  # the pipeline's list
_LAST_NORM = re.compile(r"(\d+)\.(?:norm\.)?(weight|bias)")


class _Names:
    """Our names of DeepSpeed's. The numbers of a pipeline's list differ between programs: blocks are found by what they
    hold."""

    def __init__(self, where: Path, names: Iterable[str]) -> None:
        self.where = where
        plain = [self._plain(name) for name in names]
        blocks = {int(m[1]) for name in plain if (m := re.match(r"(\d+)\..*query_key_value", name))}
        self.blocks = {index: number for number, index in enumerate(sorted(blocks))}
        self.last = {int(m[1]) for name in plain if (m := _LAST_NORM.fullmatch(name))}
        self.transformers = any(_TRANSFORMERS.fullmatch(name) for name in plain)

    @staticmethod
    def _plain(name: str) -> str:
        return name.removeprefix("module.").removeprefix("sequential.")

    def ours(self, theirs: str) -> str | None:
        """None for what is no parameter. CheckpointError for another model's."""
        name = self._plain(theirs)
        if name.endswith("_extra_state"):
            return None
        if name == "lm_head.weight":
            return megatron.HEAD
        if found := _TRANSFORMERS.fullmatch(name):
            return None if _BUFFER.fullmatch(found[1]) else found[1]
        if found := _IN_LIST.fullmatch(name):
            index, name = int(found[1]), found[2]
            if index in self.blocks and (ours := megatron.in_layer(name)):
                return f"h.{self.blocks[index]}.{ours}"
            if index in self.last:
                return f"ln_f.{name.removeprefix('norm.')}"
        name = re.sub(r"^tied_modules\.\w+\.", "", name)
        if name in ("word_embeddings.weight", "position_embeddings.weight"):
            name = f"embedding.{name}"
        try:
            layer, ours = megatron.our_name(name) or (None, None)
        except KeyError:
            refuse_others(self.where, [theirs])
            raise
        return ours if layer is None else f"h.{layer}.{ours}"


class DeepSpeed:
    """An open folder: ROOT, or one of its tags. qkv: "heads" ([heads, 3, head] in query_key_value's rows) or "thirds"
    (q | k | v on each rank, Megatron-DeepSpeed from December 2024 on); None finds it out from the files."""

    def __init__(
        self, folder: Path, activation: str | None = None, vocabulary: int | None = None, heads: int | None = None,
        qkv: str | None = None,
    ) -> None:
        self.folder = tag_folder(folder)
        self.notes: list[str] = []
        files = sorted(path.name for path in self.folder.iterdir())
        models = {int(m[1]): self.folder / m[0] for name in files if (m := _MODEL_FILE.fullmatch(name))}
        layers = {
            (int(m[1]), int(m[2] or 0)): self.folder / m[0] for name in files if (m := _LAYER_FILE.fullmatch(name))
        }
        if not (models or layers):
            raise CheckpointError(f"{self.folder} holds neither layer_XX nor mp_rank_XX files: it is not DeepSpeed's")
        about = load_pickled(models[min(models)]) if models else {}
        args = megatron.arguments_of(about)
        universal = (self.folder / "zero").is_dir()
        self._states = (UniversalStates if universal else ZeroStates)(self.folder, models)
        stored = _of_layers(layers) if layers else _of_modules(models)
        self._names = _Names(self.folder, {name for _, name, _ in stored} | {n for _, n in self._states.names()})
        self.tensor = 1 + max(rank for rank, *_ in stored) if stored else len(models)  # ranks that share the weights
        self._states_of = 1 if universal else self.tensor  # and the states
        self._parts, self._places = self._by_our_names(stored)
        self.dtype = self._type_of_weights(about)
        self.kinds, self.updates = (KINDS, self._states.updates) if self._places else ((), 0)
        if self._states.why_not:
            self.notes.append(self._states.why_not)
        thirds = qkv == "thirds" or (qkv is None and "ds_sequence_parallel_fpdt" in args)
        if thirds and universal and args.get("tensor_model_parallel_size", 1) != 1:
            raise CheckpointError(
                f"{self.folder}: its query_key_value has q | k | v of each tensor-parallel rank, one after the other,"
                " and nothing says where one ends: convert the checkpoint that it was made of"
            )
        self._version = 0.0 if thirds else 3.0
        if self._names.transformers and activation is None:
            activation = "tanh"  # what GPT-2 has there, unless it was told otherwise
            self.notes.append("nothing says which GELU was used: GPT-2's (tanh) is assumed, see --activation")
        megatron.check_arguments(self.folder, args, activation)
        self.model = self._geometry(args | _original_vocabulary(about), vocabulary, heads)
        self._check()

    def _by_our_names(self, stored: list[tuple[int, str, Tensor]]) -> tuple[dict, dict]:
        """{ours: the weights of all tensor-parallel ranks}, {ours: (mp_rank, theirs) of all tensor-parallel ranks}."""
        parts: dict[str, list[Tensor]] = {}
        for _, theirs, value in stored:
            if (ours := self._names.ours(theirs)) and value.numel():
                parts.setdefault(ours, []).append(value)
        places: dict[str, dict[int, tuple[int, str]]] = {}
        for rank, theirs in self._states.names():
            if (ours := self._names.ours(theirs)) and ours != megatron.HEAD:
                places.setdefault(ours, {}).setdefault(rank % self._states_of, (rank, theirs))  # the lowest stage's
        for head, word in zip(parts.pop(megatron.HEAD, ()), parts.get("wte.weight", ()), strict=False):
            if not torch.equal(head, word):
                raise CheckpointError(f"{self.folder}: the head is not the embedding: GPT-2's is tied to it")
        return parts, {ours: [by_rank[n] for n in sorted(by_rank)] for ours, by_rank in places.items()}

    def _type_of_weights(self, about: dict[str, Any]) -> torch.dtype:
        if self._parts:
            return widest(part.dtype for parts in self._parts.values() for part in parts)
        if not self._places:
            raise CheckpointError(f"{self.folder} holds no weights: ZeRO-3's are in the optimizer's files")
        given = about.get("ds_config") if isinstance(about.get("ds_config"), dict) else {}
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if given.get(name, {}).get("enabled"):
                return dtype
        return torch.float32

    def _shape_before_cut(self, name: str) -> tuple[int, ...]:
        """The whole parameter's shape, if it is cut on its first dimension over tensor-parallel ranks or not at all."""
        for found, shape_of, ranks in (
            (self._parts, lambda part: tuple(part.shape), self.tensor),
            (self._places, lambda place: self._states.shape(*place), self._states_of),
        ):
            if name in found:
                first, *rest = shape_of(found[name][0])
                return (first if name == "wpe.weight" else first * ranks, *rest)
        raise CheckpointError(f"{self.folder} has no {name} by any of the names that are known")

    def _geometry(self, args: dict[str, Any], vocabulary: int | None, heads: int | None) -> ModelConfig:
        rows, width = self._shape_before_cut("wte.weight")
        if self._names.transformers and vocabulary is None:
            vocabulary = rows  # which transformers does not pad
        words, notes = megatron.true_vocabulary(args, rows, vocabulary)
        heads, more = megatron.true_heads(args, width, heads)
        self.notes += notes + more
        return gpt2_config(
            self.folder, layers=len({name.split(".")[1] for name in self._every() if name.startswith("h.")}),
            width=width, heads=heads, vocabulary=words, context=self._shape_before_cut("wpe.weight")[0],
            feed_forward=self._shape_before_cut("h.0.mlp.c_fc.bias")[0],
            layer_norm_epsilon=args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
        )

    def _every(self) -> set[str]:
        return set(self._parts or self._places)

    def _check(self) -> None:
        """Nothing is missing on any rank, nothing is left over."""
        specs = {spec.name for spec in whole_specs(self.model)}
        for found, ranks, what in (
            (self._parts, self.tensor, "weight"), (self._places, self._states_of, "optimizer state"),
        ):
            if not found:
                continue
            refuse_others(self.folder, set(found) - specs)
            for name in sorted(specs):
                if (count := len(found.get(name, ()))) != ranks:
                    raise CheckpointError(
                        f"{self.folder} has {what} of {name} on {count} of {ranks} tensor-parallel ranks"
                    )

    def _whole(self, spec: Spec, parts: list[Tensor]) -> Tensor:
        """Ours of the parts on all tensor-parallel ranks."""
        if self._names.transformers:
            whole = parts[0].T if is_transposed(spec.name) else parts[0]
        else:
            local = re.sub(r"^h\.\d+\.", "", spec.name)
            try:
                whole = megatron.join(parts, local, self._version, self.model.head_width)
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(f"{self.folder}: {spec.name}: {error}") from None
        if spec.name == "wte.weight":
            whole = whole[: spec.shape[0]]
        return check_shape(self.folder, spec.name, whole, spec.shape)

    def _state(self, kind: str, spec: Spec) -> Tensor:
        return self._whole(spec, [self._states.value(kind, *place) for place in self._places[spec.name]]).float()

    def read(self, spec: Spec) -> Tensor:
        if not self._parts:
            return self._state("master", spec).to(self.dtype)
        weight = self._whole(spec, self._parts[spec.name])
        if self._places and not torch.equal(self._state("master", spec).to(weight.dtype), weight):
            raise CheckpointError(
                f"{self.folder}: the master of {spec.name} is not its weight: the optimizer's files are laid out in a"
                " way that is not understood, or are of another step"
            )
        return weight.to(self.dtype)

    def state(self, kind: str, spec: Spec) -> Tensor:
        return self._state(kind, spec)


def _of_layers(files: dict[tuple[int, int], Path]) -> list[tuple[int, str, Tensor]]:
    """(tensor-parallel rank, name with the layer's number, weight) of a pipeline's layer files."""
    return [
        (rank, f"{index}.{name}", value)
        for (index, rank), path in sorted(files.items()) for name, value in load_pickled(path).items()
    ]


def _of_modules(models: dict[int, Path]) -> list[tuple[int, str, Tensor]]:
    """The same of a plain engine's module; ZeRO-3's weights are there, and empty. None of a universal pipeline's."""
    found = []
    for rank, path in sorted(models.items()):
        module = load_pickled(path).get("module")
        if isinstance(module, dict):
            found += [(rank, n, value) for n, value in megatron.flattened(module) if isinstance(value, Tensor)]
    return found


def _original_vocabulary(about: dict[str, Any]) -> dict[str, Any]:
    for name in ("universal_checkpoint_info", "checkpoint_info"):
        told = about.get(name)
        if isinstance(told, dict) and "original_vocab_size" in told:
            return {"original_vocab_size": told["original_vocab_size"]}
    return {}


def tag_folder(folder: Path) -> Path:
    """The folder of the files, by `latest` where ROOT is given."""
    for pointer in ("latest_universal", "latest"):
        if (folder / pointer).is_file():
            tag = (folder / pointer).read_text(encoding="utf-8", errors="replace").strip()
            if Path(tag).name != tag:
                raise CheckpointError(f"{folder / pointer} names {tag[:60]!r}, which lies outside the folder")
            folder = folder / tag
            break
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    return folder

"""Hugging Face's GPT-2 and GPT-1: names, orientation and config.json of what `transformers` opens.

Ours [out, in] is theirs [in, out] for the four projections of a block (transformers' Conv1D); c_attn's outputs are
q | k | v in both. The head is tied and not stored; padding rows never leave (DESIGN I9).
"""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt2.checkpoint.disk import write_file
from megagpt2.checkpoint.formats.pickles import load_pickled, tensors_in
from megagpt2.checkpoint.formats.source import Source, refuse_others, whole_specs, widest
from megagpt2.checkpoint.rectangles import copy_shared, rectangles, whole
from megagpt2.checkpoint.store import CheckpointError, get_tensor, open_safetensors
from megagpt2.checkpoint.stream import TensorFile
from megagpt2.config.schema import ModelConfig
from megagpt2.model.parameters import Extent, Spec

_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_GPT1_NAMES = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}
_ONLY = {  # transformers' variants of GPT-2 with other arithmetic; these are the values that mean GPT-2 itself
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_CONFIG_KEYS = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
INDEX = "model.safetensors.index.json"


def foreign_name(name: str, model: ModelConfig) -> str:
    """transformers' name of one of our parameters."""
    return "transformer." + (_GPT1_NAMES.get(name, name) if model.norm == "post" else name)


def is_transposed(name: str) -> bool:
    """Whether transformers stores one of our parameters [out, in] as [in, out]."""
    return name.endswith(_TRANSPOSED)


def foreign_shape(spec: Spec) -> tuple[int, ...]:
    """The whole tensor's, as transformers stores it."""
    return spec.shape[::-1] if is_transposed(spec.name) else spec.shape


def transpose_if_projection(name: str, tensor: Tensor) -> Tensor:
    """Between [out, in] and [in, out]: the same operation in both directions."""
    return tensor.T if is_transposed(name) else tensor


def config_json(model: ModelConfig, dtype: torch.dtype, end_of_text: int | None) -> dict[str, Any]:
    """The config.json that makes transformers build this very model."""
    common = {
        "vocab_size": model.vocabulary, "n_positions": model.context, "n_embd": model.width, "n_layer": model.layers,
        "n_head": model.heads, "embd_pdrop": model.embedding_dropout, "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.residual_dropout, "layer_norm_epsilon": model.layer_norm_epsilon,
        "initializer_range": model.initial_std, "tie_word_embeddings": True,
        "bos_token_id": end_of_text, "eos_token_id": end_of_text,
        **dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch.")),  # transformers 5's and 4's name
    }
    if model.norm == "post":
        if model.inner != 4 * model.width:
            raise CheckpointError(
                f"model.feed_forward {model.inner} can't be told to transformers' GPT-1, whose inner width is"
                f" always 4 x width = {4 * model.width}"
            )
        return {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu", **common}
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_inner": model.inner, "n_ctx": model.context, **common,
    }


def read_model_config(folder: Path) -> ModelConfig:
    """Our description of the model in a folder that transformers wrote, or we."""
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {folder} is not a Hugging Face model folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no description of a model")
    kind = data.get("model_type")
    if kind not in ("gpt2", "openai-gpt"):
        raise CheckpointError(f"{path} describes a {kind!r} model; gpt2 and openai-gpt can be read")
    missing = [key for key in _CONFIG_KEYS if not isinstance(data.get(key), int)]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}: it doesn't describe a whole model")
    activation = data.get("activation_function", data.get("afn", "gelu_new"))
    if activation not in ("gelu_new", "gelu_pytorch_tanh") and not (kind == "openai-gpt" and activation == "gelu"):
        raise CheckpointError(f"{path}: activation {activation!r}; only GPT-2's tanh GELU (gelu_new) is implemented")
    for key, value in _ONLY.items():
        if data.get(key, value) is not value:
            raise CheckpointError(f"{path}: {key} {data[key]!r}; only {value!r} is implemented")
    try:
        return _model_config(data)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a GPT-2: {error}") from None


def _model_config(data: dict[str, Any]) -> ModelConfig:
    def dropout(key: str) -> float:
        return float(0.1 if data.get(key) is None else data[key])

    kind = data["model_type"]
    return ModelConfig(
        name=kind, layers=data["n_layer"], width=data["n_embd"], heads=data["n_head"], vocabulary=data["vocab_size"],
        context=data["n_positions"], feed_forward=data.get("n_inner"), norm="pre" if kind == "gpt2" else "post",
        layer_norm_epsilon=data.get("layer_norm_epsilon", 1e-5),
        embedding_dropout=dropout("embd_pdrop"), attention_dropout=dropout("attn_pdrop"),
        residual_dropout=dropout("resid_pdrop"), initial_std=data.get("initializer_range", 0.02),
    )


class Weights:
    """Parameters, by our names, in a folder with model.safetensors or its shards. Files are mapped: what is not asked
    for is not read."""

    single_first = False  # a checkpoint of ours has an index: a file that somebody put beside it does not count

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder, self.model = folder, model
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        self.files = self._list()

    def _list(self) -> dict[str, str]:
        """{their name: file}."""
        folder, index, single = self.folder, self.folder / INDEX, self.folder / "model.safetensors"
        if single.exists() and (self.single_first or not index.exists()):
            return dict.fromkeys(self._file(single.name).keys(), single.name)
        if index.exists():
            try:
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                outside = [file for file in files.values() if Path(file).name != file]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(f"{index} is not an index of safetensors files") from None
            if outside:
                raise CheckpointError(f"{index} names the file {outside[0]!r}, which lies outside the folder")
            return files
        raise CheckpointError(f"{folder} has neither {INDEX} nor model.safetensors")

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in: all are alike."""
        name, file = next(iter(self.files.items()))
        return get_tensor(self._file(file), self.folder / file, name).dtype

    def _file(self, name: str):
        if name not in self._open:
            self._open[name] = open_safetensors(self.folder / name)
        return self._open[name]

    def _stored(self, spec: Spec) -> Tensor:
        """A parameter as it lies in its file."""
        name = foreign_name(spec.name, self.model)
        if name not in self.files:  # transformers' base models are stored without the prefix
            name = name.removeprefix("transformer.")
        if name not in self.files:
            raise CheckpointError(f"{self.folder} has no tensor transformer.{name}: is it another architecture?")
        file = self.files[name]
        stored = get_tensor(self._file(file), self.folder / file, name)
        expected = foreign_shape(spec)
        if tuple(stored.shape) != expected or not stored.is_floating_point():
            raise CheckpointError(
                f"{self.folder}: {name} is {stored.dtype} {list(stored.shape)}, the model's has shape {list(expected)}"
            )
        return stored

    def piece(self, extent: Extent) -> Tensor:
        """What a rank holds of a parameter, [elements], in the type it was stored in; padding is 0."""
        spec = extent.spec
        stored, source = self._stored(spec), whole(spec.shape, is_transposed(spec.name))
        values = torch.zeros(extent.elements, dtype=stored.dtype)
        for target in rectangles(extent):
            self.bytes_read += stored.itemsize * copy_shared(source, stored, target, values)
        return values

    def local(self, spec: Spec) -> Tensor:
        """A rank's part of a parameter."""
        return self.piece(Extent.whole(spec)).view(spec.local_shape)

    def read(self, spec: Spec) -> Tensor:
        """The whole parameter."""
        return self.local(Spec(spec.name, spec.shape)).to(self.dtype)


class HuggingFace(Weights):
    """A folder of transformers' as a source of conversions: its safetensors, or the pytorch_model.bin of older ones.
    What would make it another model is refused: unknown tensors, a head of its own."""

    single_first = True  # as transformers does

    def __init__(self, folder: Path) -> None:
        self.notes: list[str] = []
        self._pickled: dict[str, Tensor] = {}
        old = folder / "pytorch_model.bin"
        if old.is_file() and not (folder / "model.safetensors").exists() and not (folder / INDEX).exists():
            self._pickled = dict(tensors_in(load_pickled(old)))
        super().__init__(folder, read_model_config(folder))
        if len(self.files) < 12 * self.model.layers:  # before anything is built for them
            raise CheckpointError(f"{folder} holds {len(self.files)} tensors, too few for {self.model.layers} layers")
        buffers = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
        specs = whole_specs(self.model)
        known = {foreign_name(spec.name, self.model) for spec in specs}
        known |= {name.removeprefix("transformer.") for name in known}
        left = {name for name in self.files if name not in known and not buffers.fullmatch(name)}
        if "lm_head.weight" in left:
            head = get_tensor(self._file(self.files["lm_head.weight"]), self.folder, "lm_head.weight")
            if not torch.equal(head, self._stored(specs[0])):
                raise CheckpointError(f"{folder}: lm_head.weight is not the embedding: GPT-2's head is tied to it")
        refuse_others(folder, left - {"lm_head.weight"})

    @cached_property
    def dtype(self) -> torch.dtype:
        stored = (get_tensor(self._file(file), self.folder / file, name) for name, file in self.files.items())
        return widest(tensor.dtype for tensor in stored)

    def _list(self) -> dict[str, str]:
        return dict.fromkeys(self._pickled, "pytorch_model.bin") if self._pickled else super()._list()

    def _file(self, name: str):
        return _Pickled(self._pickled) if self._pickled else super()._file(name)


class _Pickled:
    """A dict of tensors with the interface of an open safetensors file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.get_tensor, self.keys = tensors.__getitem__, tensors.keys


def write(
    folder: Path, source: Source, dtype: torch.dtype, tokenizer_files: dict[str, str], end_of_text: int | None,
    largest_file: int = 5_000_000_000,
) -> None:
    """A folder that transformers opens, in files of at most about `largest_file` bytes."""
    groups: list[list[Spec]] = [[]]
    size = 0
    for spec in whole_specs(source.model):
        needed = math.prod(spec.shape) * dtype.itemsize
        if groups[-1] and size + needed > largest_file:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += needed
    weight_map = {}
    for number, specs in enumerate(groups, 1):
        alone = len(groups) == 1
        name = "model.safetensors" if alone else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries = [(foreign_name(spec.name, source.model), dtype, foreign_shape(spec)) for spec in specs]
        with TensorFile(folder / name, entries, {"format": "pt"}) as file:
            for (theirs, *_), spec in zip(entries, specs, strict=True):
                file.add(theirs, transpose_if_projection(spec.name, source.read(spec).to(dtype)))
                weight_map[theirs] = name
    if len(groups) > 1:
        total = source.model.parameters() * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(folder / INDEX, json.dumps(index, indent=1).encode())
    config = config_json(source.model, dtype, end_of_text)
    write_file(folder / "config.json", json.dumps(config, indent=1).encode())
    for name, text in tokenizer_files.items():
        write_file(folder / name, text.encode())

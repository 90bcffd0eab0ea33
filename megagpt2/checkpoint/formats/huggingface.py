"""Hugging Face's GPT-2 and GPT-1: names, orientation and config.json of what `transformers` opens.

Ours [out, in] is theirs [in, out] for the four projections of a block (transformers' Conv1D); c_attn's outputs are
q | k | v in both. The head is tied and not stored; padding rows never leave (DESIGN I9).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt2.checkpoint.store import CheckpointError, open_safetensors
from megagpt2.config.schema import ModelConfig
from megagpt2.model.parameters import Spec

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


def transpose_if_projection(name: str, tensor: Tensor) -> Tensor:
    """Between [out, in] and [in, out]: the same operation in both directions."""
    return tensor.T if name.endswith(_TRANSPOSED) else tensor


def config_json(model: ModelConfig, dtype: torch.dtype, end_of_text: int | None) -> dict[str, Any]:
    """The config.json that makes transformers build this very model."""
    common = {
        "vocab_size": model.vocabulary, "n_positions": model.context, "n_embd": model.width, "n_layer": model.layers,
        "n_head": model.heads, "embd_pdrop": model.embedding_dropout, "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.residual_dropout, "layer_norm_epsilon": model.layer_norm_epsilon,
        "initializer_range": model.initial_std, "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."), "bos_token_id": end_of_text, "eos_token_id": end_of_text,
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
    kind = data.get("model_type")
    if kind not in ("gpt2", "openai-gpt"):
        raise CheckpointError(f"{path} describes a {kind!r} model; gpt2 and openai-gpt can be read")
    missing = [key for key in _CONFIG_KEYS if key not in data]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}: it doesn't describe a whole model")
    activation = data.get("activation_function", data.get("afn", "gelu_new"))
    if activation not in ("gelu_new", "gelu_pytorch_tanh") and not (kind == "openai-gpt" and activation == "gelu"):
        raise CheckpointError(f"{path}: activation {activation!r}; only GPT-2's tanh GELU (gelu_new) is implemented")
    for key, value in _ONLY.items():
        if data.get(key, value) is not value:
            raise CheckpointError(f"{path}: {key} {data[key]!r}; only {value!r} is implemented")
    return ModelConfig(
        name=kind, layers=data["n_layer"], width=data["n_embd"], heads=data["n_head"], vocabulary=data["vocab_size"],
        context=data["n_positions"], feed_forward=data.get("n_inner"), norm="pre" if kind == "gpt2" else "post",
        layer_norm_epsilon=data.get("layer_norm_epsilon", 1e-5),
        embedding_dropout=float(data.get("embd_pdrop", 0.1)), attention_dropout=float(data.get("attn_pdrop", 0.1)),
        residual_dropout=float(data.get("resid_pdrop", 0.1)), initial_std=data.get("initializer_range", 0.02),
    )


class Weights:
    """Reads parameters, by our names, from a folder with model.safetensors or its shards."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder, self.model = folder, model
        index = folder / INDEX
        if index.exists():
            try:
                self.files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                outside = [file for file in self.files.values() if Path(file).name != file]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(f"{index} is not an index of safetensors files") from None
            if outside:
                raise CheckpointError(f"{index} names the file {outside[0]!r}, which lies outside the folder")
        else:
            single = folder / "model.safetensors"
            if not single.exists():
                raise CheckpointError(f"{folder} has neither {INDEX} nor model.safetensors")
            with open_safetensors(single) as f:
                self.files = dict.fromkeys(f.keys(), single.name)

    def read(self, spec: Spec) -> Tensor:
        """The whole parameter in our orientation, in the dtype it was stored in."""
        name = foreign_name(spec.name, self.model)
        file = self.files.get(name)
        if file is None:  # transformers' base models are stored without the prefix
            name = name.removeprefix("transformer.")
            file = self.files.get(name)
        if file is None:
            raise CheckpointError(f"{self.folder} has no tensor transformer.{name}: is it another architecture?")
        with open_safetensors(self.folder / file) as f:
            tensor = transpose_if_projection(spec.name, f.get_tensor(name))
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{self.folder}: {name} has shape {list(tensor.shape)}, the model {list(spec.shape)}")
        return tensor

    def local_value(self, spec: Spec) -> Tensor:
        """This rank's part, fp32."""
        return spec.local(self.read(spec)).float()

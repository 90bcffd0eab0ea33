"""Checkpoints of other programs, written here as those programs lay them out; each function says where that is told.

They are made of our own parameters: {our name: whole tensor, [out, in]}.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from megagpt2.config.schema import ModelConfig

Parameters = dict[str, Tensor]


def parameters(model: ModelConfig, seed: int = 3) -> Parameters:
    """Random parameters of a model, whole."""
    from megagpt2.checkpoint.formats.source import whole_specs

    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: 0.2 * torch.randn(spec.shape, generator=generator) + ("ln_" in spec.name and "weight" in spec.name)
        for spec in whole_specs(model)
    }


# Megatron-LM: megatron/checkpointing.py (`fix_query_key_value_ordering`, `get_checkpoint_name`), megatron/model/
# language_model.py and transformer.py for the names of each age.

_NAMES = {
    "first": {  # to 2021: language_model.transformer, attention
        "trunk": "transformer", "ln_1": "input_layernorm", "attn.c_attn": "attention.query_key_value",
        "attn.c_proj": "attention.dense", "ln_2": "post_attention_layernorm", "ln_f": "final_layernorm",
    },
    "encoder": {  # to 2023
        "trunk": "encoder", "ln_1": "input_layernorm", "attn.c_attn": "self_attention.query_key_value",
        "attn.c_proj": "self_attention.dense", "ln_2": "post_attention_layernorm", "ln_f": "final_layernorm",
    },
    "norm": {  # legacy models of 2023 and later
        "trunk": "encoder", "ln_1": "input_norm", "attn.c_attn": "self_attention.query_key_value",
        "attn.c_proj": "self_attention.dense", "ln_2": "post_attention_norm", "ln_f": "final_norm",
    },
}


def query_key_value(thirds: Tensor, rank: int, ranks: int, version: float, head: int) -> Tensor:
    """A rank's rows of ours [3 width, ...], in the order of a checkpoint_version."""
    whole = thirds.view(3, -1, head, *thirds.shape[1:])  # [3, heads, head, ...]
    mine = whole.chunk(ranks, dim=1)[rank]
    rest = range(3, mine.dim())
    order = {0: (0, 1, 2), 1: (1, 2, 0), 2: (1, 0, 2), 3: (1, 0, 2)}[int(version)]
    return mine.permute(*order, *rest).reshape(-1, *thirds.shape[1:])


def megatron_rank(
    values: Parameters, model: ModelConfig, rank: int, tensor: int, version: float, names: str, first_layer: int,
    layers: int,
) -> dict:
    """`model` of one file: the layers from `first_layer` on, under names of an age. Padding rows are 0.01."""
    table, language = _NAMES[names], {}
    rows = -(-model.vocabulary // (128 * tensor)) * 128 * tensor
    word = torch.cat([values["wte.weight"], torch.full((rows - model.vocabulary, model.width), 0.01)])
    if first_layer == 0:
        language["embedding"] = {
            "word_embeddings": {"weight": word.chunk(tensor)[rank]},
            "position_embeddings": {"weight": values["wpe.weight"]},
        }
    trunk: dict[str, Tensor] = {}
    for layer in range(layers):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            theirs = {**table, "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}[part]
            for what in ("weight", "bias"):
                whole = values[f"h.{first_layer + layer}.{part}.{what}"]
                if part == "attn.c_attn":
                    whole = query_key_value(whole, rank, tensor, version, model.head_width)
                elif part == "mlp.c_fc":
                    whole = whole.chunk(tensor)[rank]
                elif part.endswith("c_proj") and what == "weight":
                    whole = whole.chunk(tensor, dim=1)[rank]
                trunk[f"layers.{layer}.{theirs}.{what}"] = whole.contiguous()
    if first_layer + layers == model.layers:
        trunk |= {f"{table['ln_f']}.{what}": values[f"ln_f.{what}"] for what in ("weight", "bias")}
    language[table["trunk"]] = trunk
    found: dict = {"language_model": language}
    if first_layer and first_layer + layers == model.layers:
        found["word_embeddings_for_head"] = {"weight": word.chunk(tensor)[rank]}
    return found


# megatron-core's GPTModel in a classic file: megatron/core/models/gpt/gpt_model.py, gpt_layer_specs.py (Transformer
# Engine's layers norm in front of their product), transformer/transformer_layer.py. `_extra_state` is Transformer
# Engine's (pytorch/module/base.py, get_extra_state): None, a tensor of bytes, or, to 1.x, a stream of pickled bytes.

_CORE_NAMES = {
    "core-te": {
        "input_layernorm": "self_attention.linear_qkv.layer_norm_{}",
        "post_attention_layernorm": "mlp.linear_fc1.layer_norm_{}",
    },
    "core-local": {
        "input_layernorm": "input_layernorm.{}", "post_attention_layernorm": "pre_mlp_layernorm.{}",
    },
}
_CORE_PRODUCTS = {
    "self_attention.query_key_value": "self_attention.linear_qkv.{}",
    "self_attention.dense": "self_attention.linear_proj.{}", "mlp.dense_h_to_4h": "mlp.linear_fc1.{}",
    "mlp.dense_4h_to_h": "mlp.linear_fc2.{}",
}


def core_rank(legacy: dict, names: str) -> dict[str, Tensor | io.BytesIO | None]:
    """What `megatron_rank` gives under names of "encoder", as megatron-core calls it."""
    table = _CORE_PRODUCTS | _CORE_NAMES[names]
    torch.save(None, stream := io.BytesIO())
    extra_states = None, stream, io.BytesIO(), torch.empty(0, dtype=torch.uint8)
    language, found = legacy["language_model"], {}
    for part, tensors in language.get("embedding", {}).items():
        found[f"embedding.{part}.weight"] = tensors["weight"]
    for name, value in language["encoder"].items():
        if name.startswith("final_layernorm."):
            found[f"decoder.{name}"] = value
            continue
        _, layer, rest = name.split(".", 2)
        theirs, what = rest.rsplit(".", 1)
        found[f"decoder.layers.{layer}.{table[theirs].format(what)}"] = value
        if names == "core-te" and what == "weight" and theirs in _CORE_PRODUCTS:
            stem = table[theirs].removesuffix("{}")
            found[f"decoder.layers.{layer}.{stem}_extra_state"] = extra_states[int(layer) % 4]
    if "word_embeddings_for_head" in legacy:
        found["output_layer.weight"] = legacy["word_embeddings_for_head"]["weight"]
        found["output_layer._extra_state"] = None
    return found


def write_megatron(
    root: Path, values: Parameters, model: ModelConfig, tensor: int = 1, pipeline: int = 1, virtual: int = 1,
    version: float = 3.0, names: str = "encoder", **args,
) -> None:
    """A classic checkpoint of `grid` ranks; chunk v of stage p holds layers (v pipeline + p) n and following."""
    rows = -(-model.vocabulary // (128 * tensor)) * 128 * tensor
    each = model.layers // (pipeline * virtual)
    about = argparse.Namespace(**{
        "num_layers": model.layers, "hidden_size": model.width, "num_attention_heads": model.heads,
        "max_position_embeddings": model.context, "bias_gelu_fusion": True, "padded_vocab_size": rows, **args,
    })
    for stage in range(pipeline):
        for rank in range(tensor):
            core = names in _CORE_NAMES
            chunks = [
                megatron_rank(values, model, rank, tensor, version, "encoder" if core else names,
                              (v * pipeline + stage) * each, each)
                for v in range(virtual)
            ]
            chunks = [core_rank(chunk, names) for chunk in chunks] if core else chunks
            content = {"args": about, "checkpoint_version": version, "iteration": 7, "rng_state": [
                {"np_rng_state": np.random.RandomState(0).get_state()}
            ]}
            if version == 0:
                del content["checkpoint_version"]
            content |= {"model": chunks[0]} if virtual == 1 else {f"model{v}": chunk for v, chunk in enumerate(chunks)}
            folder = root / "iter_0000007" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            folder.mkdir(parents=True)
            torch.save(content, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("7")


# GPT-NeoX: megatron/model/gpt2_model.py (`init_specs`) for the list's numbers, transformer.py for names.


def write_neox(
    root: Path, values: Parameters, model: ModelConfig, tensor: int, mlp: tuple[str, str], version: float = 3.0
) -> None:
    """Layer files as DeepSpeed's PipelineModule saves them. mlp: the projections' names, which changed in 2024.
    version: 3.0, or 0.0 for query_key_value in thirds (as Megatron-DeepSpeed splits it since December 2024)."""
    folder = root / "global_step9"
    folder.mkdir(parents=True)
    (root / "latest").write_text("global_step9")
    for rank in range(tensor):
        found = megatron_rank(values, model, rank, tensor, version, "first", 0, model.layers)["language_model"]
        embedding = {f"{name}.weight": part["weight"] for name, part in found["embedding"].items()}
        files: dict[int, dict[str, Tensor]] = {0: embedding, model.layers + 3: {}}
        for name, value in found["transformer"].items():
            if name.startswith("final_"):
                files[model.layers + 3][f"norm.{name.split('.')[-1]}"] = value
                continue
            _, layer, rest = name.split(".", 2)
            rest = rest.replace("dense_h_to_4h", mlp[0]).replace("dense_4h_to_h", mlp[1])
            files.setdefault(int(layer) + 2, {})[rest] = value
        for index, tensors in files.items():
            torch.save(tensors, folder / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")


# OpenAI: a bundle (tensorflow/core/util/tensor_bundle/tensor_bundle.cc, tensorflow/core/lib/io/table_builder.cc).


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _masked(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value) if value else b""


def _block(entries: list[tuple[bytes, bytes]], interval: int) -> bytes:
    out, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % interval:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        last = key
    return out + b"".join(struct.pack("<I", at) for at in restarts or [0]) + struct.pack("<I", len(restarts or [0]))


def bundle(variables: dict[str, np.ndarray], kind: int = 0) -> tuple[bytes, bytes]:
    """(index, data) of a bundle of one shard. kind: the type of its blocks: 0, plain."""
    data, entries = b"", [(b"", _field(1, 1) + _field(3, _field(1, 1)))]
    for name, values in sorted(variables.items(), key=lambda item: item[0].encode()):
        raw = values.astype("<f4").tobytes()
        shape = b"".join(_field(2, _field(1, n)) for n in values.shape)
        crc = _varint(6 << 3 | 5) + struct.pack("<I", _masked(raw))
        place = _field(4, len(data)) + _field(5, len(raw)) + crc
        entries.append((name.encode(), _field(1, 1) + _field(2, shape) + place))
        data += raw
    file = b""

    def add(block: bytes) -> bytes:
        nonlocal file
        handle = _varint(len(file)) + _varint(len(block))
        typed = block + bytes([kind])
        file += typed + struct.pack("<I", _masked(typed))
        return handle

    half = len(entries) // 2  # two blocks: large indices have several
    handles = [(part[-1][0], add(_block(part, 16))) for part in (entries[:half], entries[half:])]
    metaindex, index = add(_block([], 16)), add(_block(handles, 1))
    footer = (metaindex + index).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")
    return file + footer, data


def write_openai(folder: Path, values: Parameters, model: ModelConfig) -> None:
    """OpenAI's release: github.com/openai/gpt-2, src/model.py for names and shapes, download_model.py for files."""
    variables = {}
    for name, tensor in values.items():
        scope, what = name.rsplit(".", 1)
        scope = re.sub(r"^h\.(\d+)", r"h\1", scope).replace(".", "/")
        if scope in ("wte", "wpe"):
            variables[f"model/{scope}"] = tensor.numpy()
        elif "ln_" in scope:
            variables[f"model/{scope}/{'g' if what == 'weight' else 'b'}"] = tensor.numpy()
        else:
            variables[f"model/{scope}/{what[0]}"] = tensor.T.numpy()[None] if what == "weight" else tensor.numpy()
    folder.mkdir()
    index, data = bundle(variables)
    (folder / "model.ckpt.index").write_bytes(index)
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    text = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    (folder / "checkpoint").write_text(text)
    (folder / "hparams.json").write_text(json.dumps({
        "n_vocab": model.vocabulary, "n_ctx": model.context, "n_embd": model.width, "n_head": model.heads,
        "n_layer": model.layers,
    }))


# nanoGPT: train.py (the dict), model.py (names; `configure_optimizers` for the order of the moments).


def write_nanogpt(
    path: Path, values: Parameters, model: ModelConfig, bias: bool = True, compiled: bool = False
) -> dict:
    """ckpt.pt after two steps of AdamW, which change `values`; returns {our name: its state}."""
    named = {name: torch.nn.Parameter(t.clone()) for name, t in values.items() if bias or not name.endswith(".bias")}
    torch.manual_seed(0)
    decay = [p for p in named.values() if p.dim() >= 2]
    others = [p for p in named.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    for _ in range(2):
        for p in named.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
    prefix = "_orig_mod." if compiled else ""
    state = {f"{prefix}transformer.{name}": p.detach() for name, p in named.items()}
    state[f"{prefix}lm_head.weight"] = named["wte.weight"].detach()
    arguments = {
        "n_layer": model.layers, "n_head": model.heads, "n_embd": model.width, "block_size": model.context,
        "bias": bias, "vocab_size": model.vocabulary, "dropout": 0.0,
    }
    torch.save({
        "model": state, "optimizer": optimizer.state_dict(), "model_args": arguments, "iter_num": 2,
        "best_val_loss": torch.tensor(3.0), "config": {"learning_rate": 6e-4},
    }, path)
    for name, p in named.items():
        values[name] = p.detach().clone()
    return {name: optimizer.state[p] for name, p in named.items()}


# llm.c: train_gpt2.py (`write_model`, `write_tensors`).


def write_llmc(path: Path, values: Parameters, model: ModelConfig, dtype: torch.dtype) -> None:
    rows = -(-model.vocabulary // 128) * 128
    header = torch.zeros(256, dtype=torch.int32)
    header[:8] = torch.tensor([
        20240326, 3 if dtype == torch.float32 else 5, model.context, model.vocabulary, model.layers, model.heads,
        model.width, rows,
    ])
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    word = torch.nn.functional.pad(values["wte.weight"], (0, 0, 0, rows - model.vocabulary))
    tensors = [word, values["wpe.weight"]] + [
        values[f"h.{layer}.{part}.{what}"]
        for part in parts for what in ("weight", "bias") for layer in range(model.layers)
    ] + [values["ln_f.weight"], values["ln_f.bias"]]
    with path.open("wb") as file:
        file.write(header.numpy().tobytes())
        for tensor in tensors:
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    assert path.stat().st_size == 1024 + dtype.itemsize * sum(math.prod(t.shape) for t in tensors)

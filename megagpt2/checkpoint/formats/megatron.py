"""Megatron-LM's classic checkpoints (https://github.com/NVIDIA/Megatron-LM), both ways.

    ROOT/latest_checkpointed_iteration.txt         the iteration, or "release"
    ROOT/iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt
        args, iteration, checkpoint_version, model (or model0, model1, ... of a virtual pipeline), optimizer, ...

Names have changed three times, tensors only in the rows of query_key_value, by `checkpoint_version`, on each
tensor-parallel rank of n heads: 0 (or none) [3, n, head], 1 [n, head, 3], from 2 on [n, 3, head]. Column-parallel
tensors and the vocabulary are cut on dim 0, row-parallel ones on dim 1; layers are numbered from 0 in each pipeline
stage, and the chunks of a virtual pipeline follow one another across the stages. The vocabulary is padded, and nothing
says what with.

Folders of megatron-core's distributed format (torch_dist) hold pickled metadata and are refused, with the command that
saves them anew as classic ones.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt2.checkpoint.formats.pickles import Inert, load_pickled
from megagpt2.checkpoint.formats.source import Source, check_shape, gpt2_config, refuse_others, whole_specs, widest
from megagpt2.checkpoint.formats.staging import save_pickled, staged
from megagpt2.checkpoint.store import CheckpointError
from megagpt2.config.schema import ModelConfig
from megagpt2.model.parameters import Spec

TRACKER = "latest_checkpointed_iteration.txt"
HEAD = "head"  # the tied embedding's copy on the last stage
_WORDS = 50257  # GPT-2's vocabulary
HEAD_WIDTH = 64  # of every GPT-2, where nothing says how many heads there are
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_TRUNK = re.compile(r"(?:language_model\.)?(?:transformer|encoder|decoder)\.(.+)")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_IN_LAYER = [  # theirs in all generations of names -> ours
    (r"(?:input_layernorm|input_norm)\.(weight|bias)", "ln_1"),
    (r"self_attention\.(?:linear_qkv|layernorm_qkv)\.layer_norm_(weight|bias)", "ln_1"),
    (r"(?:self_)?attention\.query_key_value\.(weight|bias)", "attn.c_attn"),
    (r"self_attention\.(?:linear_qkv|layernorm_qkv)\.(weight|bias)", "attn.c_attn"),
    (r"(?:self_)?attention\.(?:dense|linear_proj|proj)\.(weight|bias)", "attn.c_proj"),
    (r"(?:post_attention_layernorm|post_attention_norm|pre_mlp_layernorm)\.(weight|bias)", "ln_2"),
    (r"(?:mlp\.linear_fc1|layernorm_mlp)\.layer_norm_(weight|bias)", "ln_2"),
    (r"mlp\.(?:dense_h_to_4h|linear_fc1|linear1)\.(weight|bias)", "mlp.c_fc"),
    (r"layernorm_mlp\.fc1_(weight|bias)", "mlp.c_fc"),
    (r"mlp\.(?:dense_4h_to_h|linear_fc2|linear2)\.(weight|bias)", "mlp.c_proj"),
    (r"layernorm_mlp\.fc2_(weight|bias)", "mlp.c_proj"),
]
_IN_LAYER = [(re.compile(pattern), ours) for pattern, ours in _IN_LAYER]
_OUTSIDE = {
    "embedding.word_embeddings.weight": "wte.weight", "embedding.position_embeddings.weight": "wpe.weight",
    "word_embeddings_for_head.weight": HEAD, "output_layer.weight": HEAD,
}
_DIM = {  # which tensors tensor parallelism cuts, and where
    "wte.weight": 0, HEAD: 0, "attn.c_attn.weight": 0, "attn.c_attn.bias": 0, "attn.c_proj.weight": 1,
    "mlp.c_fc.weight": 0, "mlp.c_fc.bias": 0, "mlp.c_proj.weight": 1,
}
_MUST_BE = {  # of args: what a GPT-2 has; where it is absent it is that
    "position_embedding_type": ("learned_absolute", "absolute", 2), "add_position_embedding": (True,),
    "normalization": ("LayerNorm", "layernorm"), "use_rotary_position_embeddings": (False,),
    "apply_layernorm_1p": (False,), "add_bias_linear": (True,),
    "disable_bias_linear": (False,), "swiglu": (False,), "squared_relu": (False,), "quick_geglu": (False,),
    "gated_linear_unit": (False,), "num_experts": (None, [1]), "multi_latent_attention": (False,),
    "qk_layernorm": (False,),
    "window_size": (None,), "softmax_type": ("vanilla",), "softmax_scale": (None,), "attention_output_gate": (False,),
    "mtp_num_layers": (None,), "apply_residual_connection_post_layernorm": (False,),
    "untie_embeddings_and_output_weights": (False,), "use_te_activation_func": (False,),
}


def our_name(theirs: str) -> tuple[int | None, str] | None:
    """(number of the layer in its chunk or None, our name in it); None for what is no weight."""
    if theirs.endswith("_extra_state"):
        return None
    plain = theirs.removeprefix("language_model.")
    if plain in _OUTSIDE:
        return None, _OUTSIDE[plain]
    trunk = _TRUNK.fullmatch(theirs)
    if trunk:
        if found := re.fullmatch(r"final_(?:layer)?norm\.(weight|bias)", trunk[1]):
            return None, f"ln_f.{found[1]}"
        if (layer := _LAYER.fullmatch(trunk[1])) and (ours := in_layer(layer[2])):
            return int(layer[1]), ours
    raise KeyError(theirs)


def in_layer(theirs: str) -> str | None:
    """Our name of a tensor of a layer."""
    return next((f"{ours}.{m[1]}" for pattern, ours in _IN_LAYER if (m := pattern.fullmatch(theirs))), None)


def join(parts: list[Tensor], name: str, version: float, head_width: int) -> Tensor:
    """A whole tensor from those of all tensor-parallel ranks, query_key_value as q | k | v; what is not cut must be
    alike everywhere. name: ours, without the layer."""
    if name in ("attn.c_attn.weight", "attn.c_attn.bias"):
        ordered = [in_thirds(part, version, head_width) for part in parts]
        return torch.cat(ordered, dim=1).reshape(-1, *parts[0].shape[1:])  # [3, heads, head, ...] -> [3 width, ...]
    if name in _DIM:
        return torch.cat(parts, dim=_DIM[name]) if len(parts) > 1 else parts[0]
    if any(not torch.equal(part, parts[0]) for part in parts[1:]):
        raise ValueError(f"the tensor-parallel ranks have different {name}")
    return parts[0]


def in_thirds(part: Tensor, version: float, head_width: int) -> Tensor:
    """A rank's query_key_value [3 n head, ...] as [3, n, head, ...]."""
    heads, rest = part.shape[0] // (3 * head_width), part.shape[1:]
    if version < 1:
        return part.view(3, heads, head_width, *rest)
    if version < 2:
        return part.view(heads, head_width, 3, *rest).movedim(2, 0)
    return part.view(heads, 3, head_width, *rest).movedim(1, 0)


def flattened(content: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dicts as dotted names."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_arguments(where: object, args: dict[str, Any], activation: str | None) -> None:
    """CheckpointError where `args` describe another architecture, or leave open which GELU it has."""
    for name, values in _MUST_BE.items():
        value = args.get(name, values[0])
        if isinstance(value, Inert):  # an enumeration's member
            value = next(iter(getattr(value, "arguments", ())), value)
        if value not in (*values, None) and not (value is False and values == (None,)):
            raise CheckpointError(f"{where}: args.{name} is {value!r}: GPT-2 has {values[0]!r}")
    if args.get("group_query_attention") and args.get("num_query_groups") != args.get("num_attention_heads"):
        raise CheckpointError(f"{where}: args.num_query_groups is {args.get('num_query_groups')}: GPT-2 has no groups")
    if activation is not None:
        found = activation
    elif "bias_gelu_fusion" in args or "openai_gelu" in args:
        found = "tanh" if args.get("bias_gelu_fusion") or args.get("openai_gelu") else "erf"
    else:
        raise CheckpointError(
            f"{where}: nothing in it says which GELU the model has: give --activation tanh (GPT-2's, and Megatron-LM's"
            " unless it was told otherwise) or erf (GPT-NeoX's)"
        )
    if found != "tanh":
        raise CheckpointError(
            f"{where}: the model has the {found} GELU, GPT-2's is tanh's (--bias-gelu-fusion): its weights would give"
            " other results here"
        )


def true_vocabulary(args: dict[str, Any], rows: int, asked: int | None) -> tuple[int, list[str]]:
    """How many rows of a padded embedding are words, and what was assumed."""
    if asked is not None:
        if not 0 < asked <= rows:
            raise CheckpointError(f"--vocabulary {asked}: the embedding has {rows} rows")
        return asked, []
    for name in ("orig_vocab_size", "original_vocab_size"):
        if isinstance(args.get(name), int):
            return args[name], []
    if rows == _WORDS:
        return rows, []
    if rows in {-(-_WORDS // multiple) * multiple for multiple in (128 << n for n in range(8))}:
        return _WORDS, [f"of the embedding's {rows} rows GPT-2's {_WORDS} are taken: --vocabulary N says otherwise"]
    raise CheckpointError(
        f"the embedding has {rows} rows, padding included, and nothing says how many are words: give --vocabulary N"
    )


def true_heads(args: dict[str, Any], width: int, asked: int | None) -> tuple[int, list[str]]:
    """How many attention heads there are, and what was assumed."""
    if heads := asked or args.get("num_attention_heads"):
        return heads, []
    heads = width // HEAD_WIDTH
    return heads, [f"nothing says how many heads there are: {heads} of width {HEAD_WIDTH}, see --heads"]


class Megatron:
    """An open classic checkpoint: ROOT, or one of its iterations."""

    def __init__(
        self, folder: Path, activation: str | None = None, vocabulary: int | None = None, heads: int | None = None,
        version: float | None = None,
    ) -> None:
        self.folder = iteration_folder(folder)
        files = self._files()
        self.tensor = 1 + max(tensor for tensor, _ in files)
        self.pipeline = 1 + max(stage for _, stage in files)
        if len(files) != self.tensor * self.pipeline:
            raise CheckpointError(
                f"{self.folder} has {len(files)} rank folders, not tensor {self.tensor} x pipeline {self.pipeline}"
            )
        first = load_pickled(files[0, 0])
        args = arguments_of(first)
        self.notes: list[str] = []
        check_arguments(files[0, 0], args, activation)
        self.version = float(first.get("checkpoint_version", 0) if version is None else version)
        self._parts = self._collect(files)
        self.model = self._geometry(args, vocabulary, heads)
        self.dtype = widest(part.dtype for parts in self._parts.values() for part in parts)
        self._check()

    def _files(self) -> dict[tuple[int, int], Path]:
        found = {}
        for path in sorted(self.folder.glob("mp_rank_*")):
            rank = _RANK.fullmatch(path.name)
            present = [path / name for name in ("model_optim_rng.pt", "model_rng.pt") if (path / name).is_file()]
            if rank and present:
                found[int(rank[1]), int(rank[2] or 0)] = present[0]
        if not found:
            raise CheckpointError(f"{self.folder} holds no mp_rank_XX/model_optim_rng.pt: it is no classic checkpoint")
        return found

    def _collect(self, files: dict[tuple[int, int], Path]) -> dict[str, list[Tensor]]:
        """{our name: the tensors of all tensor-parallel ranks}; layers are counted, not calculated."""
        contents = {place: load_pickled(path) for place, path in files.items()}
        parts: dict[str, list[Tensor]] = {}
        first = contents[0, 0]
        models = ["model"] if "model" in first else [name for name in first if re.fullmatch(r"model\d+", name)]
        if not models:
            raise CheckpointError(f"{files[0, 0]} holds no model")
        unknown: set[str] = set()
        before = 0
        for model in sorted(models, key=lambda name: int(name[5:] or 0)):
            for stage in range(self.pipeline):
                count = 0
                for tensor in range(self.tensor):
                    if (tensor, stage) not in contents:
                        raise CheckpointError(f"{self.folder} has no mp_rank of tensor {tensor}, pipeline {stage}")
                    for theirs, value in flattened(contents[tensor, stage].get(model, {})):
                        try:
                            named = our_name(theirs)
                        except KeyError:
                            unknown.add(theirs)
                            continue
                        if named is None or not isinstance(value, Tensor):
                            continue
                        layer, ours = named
                        if layer is not None:
                            count = max(count, layer + 1)
                            ours = f"h.{before + layer}.{ours}"
                        parts.setdefault(ours, []).append(value)
                before += count
        refuse_others(self.folder, unknown)
        self.layers = before
        return parts

    def _geometry(self, args: dict[str, Any], vocabulary: int | None, heads: int | None) -> ModelConfig:
        for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight", "ln_f.weight"):
            if name not in self._parts:
                raise CheckpointError(f"{self.folder} has no {name} by any of Megatron's names")
        rows, width = sum(part.shape[0] for part in self._parts["wte.weight"]), self._parts["wte.weight"][0].shape[1]
        words, notes = true_vocabulary(args, rows, vocabulary)
        heads, more = true_heads(args, width, heads)
        self.notes += notes + more
        return gpt2_config(
            self.folder, layers=self.layers, width=width, heads=heads, vocabulary=words,
            context=self._parts["wpe.weight"][0].shape[0],
            feed_forward=sum(part.shape[0] for part in self._parts["h.0.mlp.c_fc.weight"]),
            layer_norm_epsilon=args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
            embedding_dropout=float(args.get("hidden_dropout", 0.0)),
            residual_dropout=float(args.get("hidden_dropout", 0.0)),
            attention_dropout=float(args.get("attention_dropout", 0.0)),
        )

    def _check(self) -> None:
        specs = {spec.name: spec for spec in whole_specs(self.model)}
        refuse_others(self.folder, set(self._parts) - set(specs) - {HEAD})
        for name in specs:
            if (count := len(self._parts.get(name, ()))) != self.tensor:
                raise CheckpointError(f"{self.folder} has {name} on {count} of {self.tensor} tensor-parallel ranks")
        for head, word in zip(self._parts.get(HEAD, ()), self._parts["wte.weight"], strict=False):
            if not torch.equal(head, word):
                raise CheckpointError(f"{self.folder}: the head is not the embedding: GPT-2's is tied to it")

    def read(self, spec: Spec) -> Tensor:
        local = re.sub(r"^h\.\d+\.", "", spec.name)
        try:
            whole = join(self._parts[spec.name], local, self.version, self.model.head_width)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder}: {spec.name}: {error}") from None
        if spec.name == "wte.weight":
            whole = whole[: spec.shape[0]]
        return check_shape(self.folder, spec.name, whole, spec.shape).to(self.dtype)


def arguments_of(content: dict[str, Any]) -> dict[str, Any]:
    """Megatron's args, which older files don't have, as a dict."""
    args = content.get("args")
    return dict(vars(args)) if isinstance(args, (Inert, argparse.Namespace)) else dict(args or {})


def iteration_folder(folder: Path) -> Path:
    """The folder of the ranks; CheckpointError where there is none, or one of another format."""
    if (folder / TRACKER).is_file():
        text = (folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"\d+|release", text):
            raise CheckpointError(f"{folder / TRACKER} holds {text[:40]!r}, neither an iteration nor 'release'")
        folder = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if (folder / "metadata.json").exists() or (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder} is of megatron-core's distributed format, whose metadata is a pickled program: it is not opened."
            " Save it as a classic one: the run's own command with --ckpt-convert-format torch --ckpt-convert-save DIR,"
            " then convert DIR/torch"
        )
    return folder


# Writing.

_CORE = {  # ours in a layer -> megatron-core's; {norm}: with the layers of Transformer Engine, or without
    "ln_1": {"te": "self_attention.linear_qkv.layer_norm_", "local": "input_layernorm."},
    "attn.c_attn": "self_attention.linear_qkv.", "attn.c_proj": "self_attention.linear_proj.",
    "ln_2": {"te": "mlp.linear_fc1.layer_norm_", "local": "pre_mlp_layernorm."},
    "mlp.c_fc": "mlp.linear_fc1.", "mlp.c_proj": "mlp.linear_fc2.",
}


def core_name(name: str, layer: int, layers: str) -> str:
    """megatron-core's name of one of ours; `layer` is its number on its stage. layers: "te" or "local"."""
    outside = {
        "wte.weight": "embedding.word_embeddings.weight", "wpe.weight": "embedding.position_embeddings.weight",
        "ln_f.weight": "decoder.final_layernorm.weight", "ln_f.bias": "decoder.final_layernorm.bias",
    }
    if name in outside:
        return outside[name]
    part, what = re.sub(r"^h\.\d+\.", "", name).rsplit(".", 1)
    theirs = _CORE[part]
    return f"decoder.layers.{layer}.{theirs if isinstance(theirs, str) else theirs[layers]}{what}"


def shard(whole: Tensor, name: str, tensor: int, count: int, head_width: int) -> Tensor:
    """The part of tensor-parallel rank `tensor` of `count`, query_key_value in the rows of version 3."""
    local = re.sub(r"^h\.\d+\.", "", name)
    if local in ("attn.c_attn.weight", "attn.c_attn.bias"):
        by_head = whole.view(3, -1, head_width, *whole.shape[1:]).movedim(0, 1)  # [heads, 3, head, ...]
        return by_head.chunk(count)[tensor].reshape(-1, *whole.shape[1:])
    return whole.chunk(count, dim=_DIM[local])[tensor] if local in _DIM else whole


def write(
    root: Path, source: Source, tensor: int = 1, pipeline: int = 1, iteration: int = 1, layers: str = "te"
) -> None:
    """A classic checkpoint for megatron-core, without optimizer (load it with --finetune or --no-load-optim
    --no-load-rng). Padding of the vocabulary is zeros."""
    model = source.model
    for name, value, parts in (("heads", model.heads, tensor), ("inner width", model.inner, tensor),
                               ("layers", model.layers, pipeline)):
        if value % parts:
            raise CheckpointError(f"Megatron cuts {name} evenly: {value} can't be cut into {parts}")
    rows = -(-model.vocabulary // (128 * tensor)) * 128 * tensor
    specs = {spec.name: spec for spec in whole_specs(model)}
    per_stage = model.layers // pipeline
    folder = root / f"iter_{iteration:07d}"
    for stage in range(pipeline):
        last = stage == pipeline - 1
        names = [name for name in specs if _stage_of(name, per_stage, pipeline) == stage]
        state: list[dict[str, Tensor]] = [{} for _ in range(tensor)]
        for name in names + (["wte.weight"] if last and stage else []):
            whole = source.read(specs[name])
            if name == "wte.weight":
                whole = torch.cat([whole, whole.new_zeros(rows - model.vocabulary, model.width)])
            layer = int(name.split(".")[1]) - stage * per_stage if name.startswith("h.") else 0
            theirs = "output_layer.weight" if name == "wte.weight" and stage else core_name(name, layer, layers)
            for rank in range(tensor):
                state[rank][theirs] = staged(root, shard(whole, name, rank, tensor, model.head_width))
        for rank in range(tensor):
            place = folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            place.mkdir(parents=True, exist_ok=True)
            save_pickled(place / "model_optim_rng.pt", {
                "args": _arguments(model, rows, tensor, pipeline, source.dtype), "checkpoint_version": 3.0,
                "iteration": iteration, "model": state[rank],
            })
    (root / TRACKER).write_text(str(iteration), encoding="utf-8")


def _stage_of(name: str, per_stage: int, pipeline: int) -> int:
    if name.startswith("h."):
        return int(name.split(".")[1]) // per_stage
    return pipeline - 1 if name.startswith("ln_f") else 0


def _arguments(model: ModelConfig, rows: int, tensor: int, pipeline: int, dtype: torch.dtype) -> argparse.Namespace:
    """What Megatron's --use-checkpoint-args reads."""
    return argparse.Namespace(
        num_layers=model.layers, hidden_size=model.width, ffn_hidden_size=model.inner, seq_length=model.context,
        num_attention_heads=model.heads, kv_channels=model.head_width, max_position_embeddings=model.context,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, padded_vocab_size=rows,
        orig_vocab_size=model.vocabulary, make_vocab_size_divisible_by=128, tokenizer_type="GPT2BPETokenizer",
        position_embedding_type="learned_absolute", add_position_embedding=True, add_bias_linear=True,
        add_qkv_bias=True, swiglu=False, normalization="LayerNorm", apply_layernorm_1p=False,
        norm_epsilon=model.layer_norm_epsilon, bias_gelu_fusion=True, openai_gelu=False,
        untie_embeddings_and_output_weights=False, params_dtype=dtype, hidden_dropout=model.residual_dropout,
        attention_dropout=model.attention_dropout,
    )

"""What every format is read as: a model's description, and its parameters one at a time, by our names."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from megagpt2.checkpoint.store import CheckpointError
from megagpt2.config.schema import ModelConfig
from megagpt2.model.gpt2 import GPT2
from megagpt2.model.layers import DenseBuilder
from megagpt2.model.parameters import Spec


class Source(Protocol):
    """An open checkpoint of some format."""

    model: ModelConfig
    dtype: torch.dtype  # of the weights as they are stored
    notes: list[str]  # what the files don't say and was assumed, or was left out

    def read(self, spec: Spec) -> Tensor:
        """A whole parameter: ours in name, shape, orientation [out, in] and order of rows; no padding."""


class WithOptimizer(Protocol):
    """What a source has too where its files hold Adam's state."""

    kinds: tuple[str, ...]  # of "master", "exp_avg", "exp_avg_sq"
    updates: int

    def state(self, kind: str, spec: Spec) -> Tensor:
        """fp32, as `read` gives the parameter."""


def whole_specs(model: ModelConfig) -> list[Spec]:
    """Every parameter of a model, whole, in the order of its layers."""
    with torch.device("meta"):
        dense = GPT2(model, DenseBuilder(seed=0))
    return [Spec(p.spec.name, p.spec.shape, tied=p.spec.tied) for p in dense.parameters()]


def gpt2_config(where: object, **fields) -> ModelConfig:
    """A description made of what a foreign file says; CheckpointError where it is no GPT-2's."""
    try:
        return ModelConfig.model_validate({"name": "gpt2", **fields})
    except ValueError as error:
        raise CheckpointError(f"{where} does not describe a GPT-2: {error}") from None


def first_difference(one: ModelConfig, other: ModelConfig) -> str | None:
    """The first field by which two are not the same function of the same parameters. Dropout may differ."""
    names = ("layers", "width", "heads", "vocabulary", "context", "inner", "norm", "layer_norm_epsilon")
    return next((name for name in names if getattr(one, name) != getattr(other, name)), None)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating-point type that holds all of these without rounding: of a file whose tensors differ."""
    return functools.reduce(torch.promote_types, (dtype for dtype in dtypes if dtype.is_floating_point))


def check_shape(where: object, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor; CheckpointError unless it is of floats and has this shape."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise CheckpointError(f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, expected is {list(shape)}")
    return tensor


def refuse_others(where: object, left: Iterator[str] | list[str] | set[str]) -> None:
    """CheckpointError where a checkpoint holds tensors that no GPT-2 has: the model would be another one."""
    if others := sorted(left):
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise CheckpointError(
            f"{where} holds tensors that GPT-2 does not have: {', '.join(others[:5])}{more}. It is another architecture"
        )

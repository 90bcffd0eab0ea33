"""The operators' benchmark cases: one module an operator, of the operator's name, with `cases(device, small)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Call = Callable[[], object]  # what is timed


@dataclass(frozen=True)
class Case:
    """One call to time. bytes: what any implementation must move: each input read once, each output written once.

    peers: functions with the operator's result by other means; "eager" is what torch users write, and what is compiled
    for "compile". timed: the call to time of such a function.
    """

    name: str  # "layer_norm forward 8192x1600 bf16"
    bytes: int
    ours: Call
    timed: Callable[[Callable], Call]
    peers: dict[str, Callable]
    operations: int = 0  # of matrix products, where they are the work: the case is measured in TFLOP/s then
    memory: Callable[[], dict[str, float]] | None = None  # bytes held at most beyond inputs and results: "ours", peers


def forward(*tensors: Tensor) -> Callable[[Callable], Call]:
    """`timed` of a function's result."""
    return lambda function: partial(function, *tensors)


def backward(leaves: Sequence[Tensor], upstream: object) -> Callable[[Callable], Call]:
    """`timed` of the leaves' gradients, from the upstream gradient of the function's result."""

    def timed(function: Callable) -> Call:
        result = function(*leaves)
        return lambda: torch.autograd.grad(result, leaves, upstream, retain_graph=True)

    return timed


def library(path: str, device: str) -> Callable | None:
    """The function "package.module:name" of a library for GPUs; None on a CPU and where it can't be imported."""
    if device != "cuda":
        return None
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # not installed, or not for this torch or this GPU: libraries fail in many ways
        return None

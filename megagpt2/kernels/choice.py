"""Which implementation of an operator a model uses, where there are several."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """attention: a name in model/attention.py; layer_norm: one in kernels/layer_norm.py."""

    attention: str = "auto"
    layer_norm: str = "fused"


DEFAULT = Kernels()

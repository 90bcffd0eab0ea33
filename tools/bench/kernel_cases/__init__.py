"""The operators' benchmark cases: one module an operator, of the operator's name, with `cases(device, small)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One call to time. bytes: what any implementation must move: each input read once, each output written once.

    peers: the same result by other means; "eager" is what torch users write, and what is compiled for "compile".
    """

    name: str  # "layer_norm forward 8192x1600 bf16"
    bytes: int
    ours: Callable[[], object]
    eager: Callable[[], object]
    compiled: Callable[[], object] | None = None  # eager's function, for torch.compile: without autograd's parts
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    operations: int = 0  # of matrix products, where they are the work: the case is measured in TFLOP/s then
    memory: Callable[[], dict[str, float]] | None = None  # bytes held at most beyond inputs and results: "ours", peers

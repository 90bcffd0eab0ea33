"""What every operator's tests share: invariant I8, poisoned outputs, types and skips."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megagpt2.kernels.extension import EXTENSION

TYPES = [torch.float32, torch.bfloat16, torch.float16]

compiled = pytest.mark.skipif(not EXTENSION.compiled, reason=f"the operators are not compiled: {EXTENSION.reason}")

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def assert_as_exact(
    found: Tensor, exact: Tensor, torchs: Tensor, name: str = "", scale: float = 0.0, kept: float = 0.0
) -> None:
    """Invariant I8: our largest error against float64 is at most twice torch's.

    Or a few units in the last place of the largest value, since torch may be spared by luck in a small tensor: one for
    16-bit types, whose arithmetic is fp32 with one rounding, four for fp32, which rounds at every operation. Where
    terms cancel, their size is `scale`. `kept`: what the rounding of results that are kept for a gradient makes of it.
    """
    assert found.shape == exact.shape and found.dtype == torchs.dtype, name
    if not exact.numel():
        return
    one, other = ((t.double() - exact).abs().max().item() for t in (found, torchs))
    units = 4 if found.dtype == torch.float32 else 1
    noise = max(units * torch.finfo(found.dtype).eps * exact.abs().max().item(), 4 * 2.0**-23 * scale, kept)
    limit = max(2 * other, noise)
    assert one <= limit, f"{name}: error {one:.3g}, torch's {other:.3g}, limit {limit:.3g}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Tensors are born full of NaN: an element that an operator leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """function(*inputs) and its gradients for `upstream`, with respect to every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def assert_threads_decide_nothing(function: Callable[[], list[Tensor]]) -> None:
    """The same bits with any number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))

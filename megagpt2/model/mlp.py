"""The position-wise feed-forward network with GPT's GELU (Hendrycks and Gimpel 2016, the tanh form)."""

from __future__ import annotations

from torch import Tensor, nn

from megagpt2.model.layers import Builder


class MLP(nn.Module):
    def __init__(self, build: Builder, name: str, *, width: int, inner: int, std: float, residual_std: float) -> None:
        super().__init__()
        self.c_fc = build.column_linear(f"{name}.c_fc", width, parts=1, units=inner, unit=1, std=std, gelu=True)
        self.c_proj = build.row_linear(f"{name}.c_proj", width, units=inner, unit=1, std=residual_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., width] -> (what to add to the residual stream, a bias to add to it)."""
        return self.c_proj(self.c_fc(x))

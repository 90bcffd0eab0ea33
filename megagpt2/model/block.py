"""A transformer block: GPT-2's pre-LN form, and GPT-1's post-LN form."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from megagpt2.kernels.bias_dropout_add import bias_dropout_add
from megagpt2.model.attention import Attention
from megagpt2.model.layers import Builder
from megagpt2.model.mlp import MLP

State = tuple[Tensor, Tensor]  # hidden [batch, sequence, width], sample numbers int64 [batch]


class Block(nn.Module):
    """pre:  x + attn(ln_1(x)), then x + mlp(ln_2(x))     (Radford et al. 2019, section 2.3)
    post: ln_1(x + attn(x)), then ln_2(x + mlp(x))      (Radford et al. 2018; Vaswani et al. 2017)
    """

    def __init__(
        self, build: Builder, name: str, layer: int, *, width: int, heads: int, inner: int, norm: str,
        epsilon: float, attention_dropout: float, residual_dropout: float, std: float, residual_std: float,
        recompute: str,
    ) -> None:
        super().__init__()
        self.pre_norm = norm == "pre"
        self.recompute = recompute in ("full", "full_offload")
        self.offload = recompute == "full_offload"
        self.ln_1 = (build.layer_norm if self.pre_norm else build.residual_layer_norm)(f"{name}.ln_1", width, epsilon)
        self.attn = Attention(
            build, f"{name}.attn", layer, width=width, heads=heads, dropout=attention_dropout, std=std,
            residual_std=residual_std, recompute=recompute == "selective",
        )
        self.ln_2 = build.residual_layer_norm(f"{name}.ln_2", width, epsilon)
        self.mlp = MLP(build, f"{name}.mlp", width=width, inner=inner, std=std, residual_std=residual_std)
        self.attention_residual = build.dropout(residual_dropout, layer, "attention_residual")
        self.mlp_residual = build.dropout(residual_dropout, layer, "mlp_residual")

    def forward(self, state: State) -> State:
        x, samples = state
        if self.recompute and torch.is_grad_enabled():
            # Dropout masks are functions of their coordinates: there is no generator state to preserve.
            with save_on_cpu(pin_memory=x.is_cuda) if self.offload else nullcontext():  # what is saved: x and samples
                x = checkpoint(self.transform, x, samples, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self.transform(x, samples)
        return x, samples

    def transform(self, x: Tensor, samples: Tensor) -> Tensor:
        """A sublayer gives (h, bias). dropout(h + bias) joins the residual stream where that is normalized next."""
        h, bias = self.attn(self.ln_1(x) if self.pre_norm else x, samples)
        dropout = self.attention_residual.arguments(h, samples)
        if self.pre_norm:
            x, normalized = self.ln_2(h, bias, x, dropout)
            h, bias = self.mlp(normalized)
            return bias_dropout_add(h, bias, x, *self.mlp_residual.arguments(h, samples))
        _, x = self.ln_1(h, bias, x, dropout)
        h, bias = self.mlp(x)
        return self.ln_2(h, bias, x, self.mlp_residual.arguments(h, samples))[1]

"""The layers a GPT-2 is made of, as a Builder offers them, and the dense builder: plain torch, one rank.

`parallel/tensor.py` offers the same interface with weights sharded over ranks. The model asks for a layer
by what it does (DESIGN D1):

    column_linear   x [..., in]  -> y [..., out]: out is made of `units` that may live on different ranks
    row_linear      y [..., in]  -> x [..., out]: the inverse, completing the sum over those units
    layer_norm, position_embedding, dropout: on the residual stream, which may be split along the sequence
    tied_embedding  tokens -> residual stream; residual stream -> loss or logits
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt2.kernels import cross_entropy, layer_norm
from megagpt2.kernels.choice import DEFAULT, Kernels
from megagpt2.kernels.dropout import dropout
from megagpt2.kernels.philox import key_of
from megagpt2.model.parameters import Spec, declare


class Builder(Protocol):
    """What a model may ask for. Names are the parameters' names in a checkpoint."""

    kernels: Kernels

    def column_linear(self, name: str, width_in: int, *, parts: int, units: int, unit: int, std: float) -> nn.Module:
        """Linear to parts x units x unit outputs; rank r gets its share of the units of every part."""

    def row_linear(self, name: str, width_out: int, *, units: int, unit: int, std: float) -> nn.Module:
        """Linear from units x unit inputs, of which rank r has its share, to the residual stream."""

    def layer_norm(self, name: str, width: int, epsilon: float) -> nn.Module: ...

    def position_embedding(self, name: str, context: int, width: int, std: float) -> nn.Module: ...

    def tied_embedding(self, name: str, vocabulary: int, padded: int, width: int, std: float) -> nn.Module: ...

    def dropout(self, probability: float, layer: int, site: str, heads: int | None = None) -> nn.Module:
        """Dropout on the residual stream, or on attention weights [batch, heads, query, key] if heads is given."""


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]."""

    def __init__(self, weight: Spec, bias: Spec) -> None:
        super().__init__()
        self.weight = declare(weight)
        self.bias = declare(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """Layer normalization over the last dimension (Ba et al. 2016)."""

    def __init__(self, name: str, width: int, epsilon: float, backend: str) -> None:
        super().__init__()
        self.weight = declare(Spec(f"{name}.weight", (width,), constant=1.0))
        self.bias = declare(Spec(f"{name}.bias", (width,)))
        self.epsilon = epsilon
        self.normalize = layer_norm.BACKENDS[backend]

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight, self.bias, self.epsilon)


class PositionEmbedding(nn.Module):
    """Adds a learned vector for each position to x [batch, sequence, width]."""

    def __init__(self, name: str, context: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = declare(Spec(f"{name}.weight", (context, width), standard_deviation=std, decay=True))

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        return x + self.weight[first : first + x.shape[1]]


class TiedEmbedding(nn.Module):
    """Word embedding and output head over one matrix [words, width] (Radford et al. 2018; Press and Wolf 2017).

    One module with three uses, told apart by their arguments, because ZeRO-3 gathers the matrix in the hooks
    around `forward`, and the pipeline ties the module as a whole.
    """

    def __init__(self, weight: Spec, first: int, rows: int) -> None:
        super().__init__()
        self.weight = declare(weight)
        self.first, self.rows = first, rows  # the words this rank holds: first .. first + rows - 1

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """int64 tokens [batch, sequence] -> hidden [batch, sequence, width];
        hidden and targets [batch, sequence] -> mean loss; hidden alone -> logits [..., vocabulary]."""
        if not x.is_floating_point():
            return self.embed(x)
        if targets is not None:
            return self.loss(x, self.weight, targets)
        return self.logits(x)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)

    def loss(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy.head_cross_entropy(
            hidden.flatten(0, -2), weight, targets.flatten(), self.first, self.rows
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight[: self.rows])


class Dropout(nn.Module):
    """Counter-based dropout. The identity in evaluation and at probability 0."""

    def __init__(self, probability: float, key: tuple[int, int]) -> None:
        super().__init__()
        self.probability, self.key = probability, key

    def start(self, x: Tensor) -> int:
        """Number, within its sample's whole tensor, of the first element of x[i]."""
        return 0

    def forward(self, x: Tensor, samples: Tensor) -> Tensor:
        if not self.active:
            return x
        return dropout(x, samples, self.key, self.probability, self.start(x))

    @property
    def active(self) -> bool:
        return self.training and self.probability > 0.0


class DenseBuilder:
    """Everything on one rank."""

    def __init__(self, seed: int, kernels: Kernels = DEFAULT) -> None:
        self.seed, self.kernels = seed, kernels

    def column_linear(self, name, width_in, *, parts, units, unit, std):
        out = parts * units * unit
        return Linear(
            Spec(f"{name}.weight", (out, width_in), standard_deviation=std, decay=True), Spec(f"{name}.bias", (out,))
        )

    def row_linear(self, name, width_out, *, units, unit, std):
        return Linear(
            Spec(f"{name}.weight", (width_out, units * unit), standard_deviation=std, decay=True),
            Spec(f"{name}.bias", (width_out,)),
        )

    def layer_norm(self, name, width, epsilon):
        return LayerNorm(name, width, epsilon, self.kernels.layer_norm)

    def position_embedding(self, name, context, width, std):
        return PositionEmbedding(name, context, width, std)

    def tied_embedding(self, name, vocabulary, padded, width, std):
        spec = Spec(
            f"{name}.weight", (vocabulary, width), standard_deviation=std, decay=True, tied=True,
            dim=0, ranges=((0, vocabulary),), padding=padded - vocabulary,
        )
        return TiedEmbedding(spec, 0, vocabulary)

    def dropout(self, probability, layer, site, heads=None):
        return Dropout(probability, key_of(self.seed, "dropout", layer, site))

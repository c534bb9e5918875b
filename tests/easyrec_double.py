"""A test double of TorchEasyRec's DIN encoders, which cannot be installed beside this torch.

Written down from what they compute: the same names of modules, the same steps. Source of the facts:
https://github.com/alibaba/TorchEasyRec, ``tzrec/modules/sequence.py``, ``mlp.py``, ``activation.py``. Dice's BatchNorm
is affine in some releases and plain in others: ``Dice.affine``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transpose(nn.Module):
    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.dims = first, second

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(*self.dims)


class Dice(nn.Module):
    affine: ClassVar[bool] = True

    def __init__(self, hidden_size: int, dim: int = 3) -> None:
        super().__init__()
        self.dim = dim
        self.bn = nn.BatchNorm1d(hidden_size, affine=self.affine)
        self.alpha = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.bn(x.transpose(1, 2)).transpose(1, 2))
        return self.alpha * (1 - p) * x + p * x


class Perceptron(nn.Module):
    """Linear > [BatchNorm | LayerNorm] > activation > [Dropout] on (B, L, inputs)."""

    def __init__(
        self, inputs: int, units: int, activation: type[nn.Module], use_bn: bool, use_ln: bool, dropout: float
    ) -> None:
        super().__init__()
        found: list[nn.Module] = [nn.Linear(inputs, units, bias=not use_bn)]
        if use_bn:
            found += [Transpose(1, 2), nn.BatchNorm1d(units), Transpose(1, 2)]
        if use_ln:
            found.append(nn.LayerNorm(units))
        found.append(Dice(units) if activation is Dice else activation())
        if dropout > 0.0:
            found.append(nn.Dropout(dropout))
        self.perceptron = nn.Sequential(*found)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.perceptron(x)
        return out


class MLP(nn.Module):
    def __init__(
        self,
        in_features: int,
        hidden_units: Sequence[int],
        activation: type[nn.Module] = nn.ReLU,
        use_bn: bool = False,
        use_ln: bool = False,
        dropout_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden_units]
        self.mlp = nn.ModuleList(
            Perceptron(a, b, activation, use_bn, use_ln, dropout_ratio) for a, b in itertools.pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.mlp:
            x = layer(x)
        return x


class _Encoder(nn.Module):
    """What the two have in common: the names of the inputs, and the query filled up with zeros."""

    def __init__(self, sequence_dim: int, query_dim: int, input: str) -> None:
        super().__init__()
        if query_dim > sequence_dim:
            raise ValueError("query_dim > sequence_dim not supported yet.")
        self._sequence_dim, self._query_dim = sequence_dim, query_dim
        self._query_name = f"{input}.query"
        self._sequence_name = f"{input}.sequence"
        self._sequence_length_name = f"{input}.sequence_length"

    def inputs(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        query = F.pad(tensors[self._query_name], (0, self._sequence_dim - self._query_dim))
        return query, tensors[self._sequence_name], tensors[self._sequence_length_name]


class DINEncoder(_Encoder):
    def __init__(
        self, sequence_dim: int, query_dim: int, input: str, attn_mlp: dict[str, object], max_seq_length: int = 0
    ) -> None:
        super().__init__(sequence_dim, query_dim, input)
        self.mlp = MLP(4 * sequence_dim, **attn_mlp)  # type: ignore[arg-type]
        self.linear = nn.Linear(self.mlp.mlp[-1].perceptron[0].out_features, 1)  # type: ignore[union-attr,index]
        self._max_seq_length = max_seq_length

    def forward(self, sequence_embedded: dict[str, Tensor]) -> Tensor:
        query, sequence, lengths = self.inputs(sequence_embedded)
        if self._max_seq_length > 0:
            lengths = torch.clamp_max(lengths, self._max_seq_length)
            sequence = sequence[:, : self._max_seq_length]
        q = query.unsqueeze(1).expand_as(sequence)
        score = self.linear(self.mlp(torch.cat([q, sequence, q - sequence, q * sequence], dim=-1))).transpose(1, 2)
        valid = torch.arange(sequence.shape[1]) < lengths.unsqueeze(1)
        score = torch.where(valid.unsqueeze(1), score, torch.ones_like(score) * (-(2**31) + 1))
        return torch.matmul(F.softmax(score, dim=-1), sequence).squeeze(1)


class MultiWindowDINEncoder(_Encoder):
    windows_len: Tensor
    cumsum_windows_len: Tensor

    def __init__(
        self, sequence_dim: int, query_dim: int, input: str, windows_len: list[int], attn_mlp: dict[str, object]
    ) -> None:
        super().__init__(sequence_dim, query_dim, input)
        windows = torch.tensor(windows_len)
        self.register_buffer("windows_len", windows)
        self.register_buffer("cumsum_windows_len", windows.cumsum(0) - windows)
        self.mlp = MLP(3 * sequence_dim, **attn_mlp)  # type: ignore[arg-type]
        self.linear = nn.Linear(self.mlp.mlp[-1].perceptron[0].out_features, 1)  # type: ignore[union-attr,index]
        self.active = nn.PReLU()

    def forward(self, sequence_embedded: dict[str, Tensor]) -> Tensor:
        query, sequence, lengths = self.inputs(sequence_embedded)
        q = query.unsqueeze(1).expand_as(sequence)
        score = self.active(self.linear(self.mlp(torch.cat([sequence, q * sequence, q], dim=-1))))
        valid = torch.arange(sequence.shape[1]) < lengths.unsqueeze(1)
        weighted = score * valid.unsqueeze(2) * sequence
        padded = F.pad(weighted, (0, 0, 0, int(self.windows_len.sum()) - sequence.shape[1]))
        sums = torch.stack([part.sum(dim=1) for part in padded.split(self.windows_len.tolist(), dim=1)], dim=1)
        counts = torch.minimum(lengths.unsqueeze(1) - self.cumsum_windows_len, self.windows_len)
        means = sums / torch.maximum(counts, torch.ones_like(counts)).unsqueeze(2)
        return torch.cat([means, query.unsqueeze(1)], dim=1).reshape(len(query), -1)


MODULES: dict[str, list[type[nn.Module]]] = {
    "tzrec.modules.activation": [Dice],
    "tzrec.modules.sequence": [DINEncoder, MultiWindowDINEncoder],
    "tzrec.modules.utils": [Transpose],
}

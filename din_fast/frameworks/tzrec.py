"""TorchEasyRec: ``DINEncoder`` and ``MultiWindowDINEncoder``.

Source: https://github.com/alibaba/TorchEasyRec, ``tzrec/modules/sequence.py``, ``mlp.py``, ``activation.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tzrec.modules.activation import Dice
from tzrec.modules.sequence import DINEncoder, MultiWindowDINEncoder
from tzrec.modules.utils import Transpose

from din_fast.frameworks.common import (
    Activation,
    Fused,
    Plan,
    Unsupported,
    check_children,
    fill_overflows,
    live,
    one_slope,
    read,
    run,
    whole_lengths,
)


class FusedDINEncoder(Fused, DINEncoder):
    """``DINEncoder`` on the kernels: always softmax; a masked score is -2**31 + 1."""

    framework = "TorchEasyRec"
    host = DINEncoder
    _max_seq_length: int

    @staticmethod
    def plan(unit: Any) -> Plan:
        return _read(unit, [unit.linear], softmax=True, empty="uniform")

    def forward(self, sequence_embedded: dict[str, Tensor]) -> Tensor:
        """``{input}.query`` (B, Dq), ``.sequence`` (B, L, D), ``.sequence_length`` (B,) -> (B, D); Dq <= D."""
        plan = live(self)
        if plan is None:
            return super().forward(sequence_embedded)
        query, sequence, lengths = _inputs(self, sequence_embedded)
        if self._max_seq_length > 0:
            lengths, sequence = lengths.clamp_max(self._max_seq_length), sequence[:, : self._max_seq_length]
        lengths = whole_lengths(lengths, sequence.shape[1])
        return run(self, fill_overflows(plan, sequence), query, sequence, lengths=lengths, query_name="query")


class FusedMultiWindowDINEncoder(Fused, MultiWindowDINEncoder):
    """``MultiWindowDINEncoder``: the kernels give the scores, PReLU included; the windows are summed in torch."""

    framework = "TorchEasyRec"
    host = MultiWindowDINEncoder
    windows_len: Tensor
    cumsum_windows_len: Tensor

    @staticmethod
    def plan(unit: Any) -> Plan:
        return _read(unit, [unit.linear, unit.active], blocks=("k", "q*k", "q"), pooling="none")

    def forward(self, sequence_embedded: dict[str, Tensor]) -> Tensor:
        """Inputs as :class:`FusedDINEncoder` -> (B, (windows + 1) * D): a mean for each window, then the query."""
        plan = live(self)
        if plan is None:
            return super().forward(sequence_embedded)
        query, sequence, lengths = _inputs(self, sequence_embedded)
        length = sequence.shape[1]
        weights = run(
            self, plan, query, sequence, lengths=whole_lengths(lengths, length), query_name="query"
        )  # (B, L), 0 where masked
        first = self.cumsum_windows_len.unsqueeze(1)
        position = torch.arange(length, device=sequence.device)
        within = (position >= first) & (position < first + self.windows_len.unsqueeze(1))  # (windows, L)
        sums = torch.bmm((weights.unsqueeze(1) * within).to(sequence.dtype), sequence).to(sequence.dtype)
        valid = torch.minimum(lengths.unsqueeze(1) - self.cumsum_windows_len, self.windows_len).clamp_min(1)
        return torch.cat([sums / valid.unsqueeze(2), query.unsqueeze(1)], dim=1).flatten(1)


def _inputs(unit: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, filled up with zeros to the size of the sequence, sequence and lengths."""
    query = tensors[unit._query_name]
    if unit._query_dim < unit._sequence_dim:
        query = F.pad(query, (0, unit._sequence_dim - unit._query_dim))
    return query, tensors[unit._sequence_name], tensors[unit._sequence_length_name]


def _read(unit: Any, end: list[nn.Module], **fields: Any) -> Plan:
    check_children(unit)
    if getattr(unit.mlp, "return_hidden_layer_feature", False):
        raise Unsupported("its MLP returns every layer")
    modules: list[nn.Module] = []
    for layer in unit.mlp.mlp:
        modules += _without_transposes(list(layer.perceptron))
    return read([*modules, *end], unit._sequence_dim, _activation, **fields)


def _without_transposes(modules: list[nn.Module]) -> list[nn.Module]:
    """A perceptron's modules, where a BatchNorm stands between two Transposes: its statistics are of hidden units."""
    rest = [m for m in modules if type(m) is not Transpose]
    norms = [i for i, m in enumerate(modules) if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for i in norms:
        if [type(m) for m in modules[i - 1 : i + 2]].count(Transpose) != 2:
            raise Unsupported("a BatchNorm along the positions")
    if len(modules) - len(rest) != 2 * len(norms):
        raise Unsupported("a Transpose without a BatchNorm")
    return rest


def _activation(module: Any) -> Activation:
    if type(module) is Dice:
        if module.dim != 3:
            raise Unsupported("a Dice for inputs of 2 dimensions")
        return Activation("dice_batch", slope=module.alpha, gate_norm=module.bn)
    return one_slope(module)


def recognise(module: nn.Module) -> type[Fused] | None:
    for fused in (FusedDINEncoder, FusedMultiWindowDINEncoder):
        if isinstance(module, fused.host):
            return fused
    return None

"""RecBole 1.2.1: ``SequenceAttLayer`` of its DIN and DIEN.

Source: https://github.com/RUCAIBox/RecBole, ``recbole/model/layers.py``.
"""

from __future__ import annotations

from typing import Any

from recbole.model.layers import Dice, SequenceAttLayer
from torch import Tensor, nn

from din_fast.frameworks.common import (
    Activation,
    Fused,
    Plan,
    Unsupported,
    check_children,
    live,
    one_slope,
    read,
    run,
)


class FusedSequenceAttLayer(Fused, SequenceAttLayer):
    """``SequenceAttLayer`` on the kernels, pooled or scores out.

    Scores are divided by sqrt(D); a masked one is 0, or -inf in front of a softmax: NaN where no position is valid.
    """

    framework = "RecBole"
    host = SequenceAttLayer
    mask_mat: Tensor

    @staticmethod
    def plan(unit: Any) -> Plan:
        check_children(unit)
        layers = unit.att_mlp_layers.mlp_layers
        for module in layers:
            if isinstance(module, nn.Dropout) and module.p != 0.0:
                raise Unsupported("a dropout in front of a Linear")
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise Unsupported("a BatchNorm along the positions")
        return read(
            [*layers, unit.dense],
            unit.att_hidden_size[0] // 4,
            _activation,
            softmax=bool(unit.softmax_stag),
            empty="nan",
            pooling="none" if unit.return_seq_weight else "sum",
            scale_scores=True,
        )

    def forward(self, queries: Tensor, keys: Tensor, keys_length: Tensor) -> Tensor:
        """queries (B, D), keys (B, T, D), keys_length (B,) -> (B, 1, D), or scores (B, 1, T)."""
        plan = live(self)
        if plan is None:
            return super().forward(queries, keys, keys_length)
        valid = ~(self.mask_mat >= keys_length.unsqueeze(1))
        return run(self, plan, queries, keys, valid.expand(keys.shape[:2]), query_name="queries").unsqueeze(1)


def _activation(module: nn.Module) -> Activation:
    if type(module) is Dice:
        return Activation("silu")  # its gate is not normalised, and its alpha a plain tensor of zeros
    return one_slope(module)


def recognise(module: nn.Module) -> type[Fused] | str | None:
    if not isinstance(module, SequenceAttLayer):
        return None
    # Read here, once: nothing in RecBole changes it, and a call should not wait for a device to look.
    if any(isinstance(m, Dice) and bool(m.alpha.any()) for m in module.modules()):
        return "a Dice whose alpha is not 0"
    return FusedSequenceAttLayer

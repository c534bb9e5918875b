"""torch-rechub 0.9.0: ``ActivationUnit`` of its DIN.

Source: https://github.com/datawhalechina/torch-rechub, ``torch_rechub/models/ranking/din.py``, ``basic/activation.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch_rechub.basic.activation import Dice
from torch_rechub.models.ranking.din import ActivationUnit

from din_fast.frameworks.common import Activation, Fused, Plan, activation_of, check_children, live, read, run


class FusedActivationUnit(Fused, ActivationUnit):
    """``ActivationUnit`` on the kernels: no mask, every position counts; a BatchNorm in each hidden layer."""

    framework = "torch-rechub"
    host = ActivationUnit

    @staticmethod
    def plan(unit: Any) -> Plan:
        check_children(unit)
        return read(unit.attention.mlp, unit.emb_dim, _activation, softmax=bool(unit.use_softmax))

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        """history (B, L, D), target (B, D) -> (B, D)."""
        plan = live(self)
        if plan is None:
            return super().forward(history, target)
        # Under autocast the host multiplies scores of a half type with the history as it came.
        return run(self, plan, target, history).to(history.dtype)


def _activation(module: Any) -> Activation:
    if type(module) is Dice:
        return Activation("dice_row", slope=module.alpha, dice_eps=module.epsilon)
    return activation_of(module)


def recognise(module: nn.Module) -> type[Fused] | None:
    return FusedActivationUnit if isinstance(module, ActivationUnit) else None

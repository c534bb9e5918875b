"""FuxiCTR 2.3.10: ``DIN_Attention``.

Source: https://github.com/reczoo/FuxiCTR, ``fuxictr/pytorch/layers/attentions/target_attention.py``,
``layers/activations.py``, ``layers/blocks/mlp_block.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from fuxictr.pytorch.layers.activations import Dice
from fuxictr.pytorch.layers.attentions.target_attention import DIN_Attention
from torch import Tensor, nn

from din_fast.frameworks.common import Activation, Fused, Plan, activation_of, check_children, live, read, run


class FusedDINAttention(Fused, DIN_Attention):
    """``DIN_Attention`` on the kernels: any mask, and the host's rules for it."""

    framework = "FuxiCTR"
    host = DIN_Attention

    @staticmethod
    def plan(unit: Any) -> Plan:
        check_children(unit)
        return read_block(unit.attention_layer, unit.embedding_dim, unit.use_softmax, "sum")

    def forward(self, target_item: Tensor, history_sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        """target_item (B, D), history_sequence (B, L, D), mask (B, L) bool, int or float, 0 = masked -> (B, D)."""
        plan = live(self)
        if plan is None:
            return super().forward(target_item, history_sequence, mask)
        return masked(self, plan, target_item, history_sequence, mask)


def read_block(block: Any, dim: int, softmax: bool, pooling: str) -> Plan:
    """The plan of an ``MLP_Block`` that scores. A masked logit is -1e9: uniform over all L where none is valid."""
    return read(block.mlp, dim, activation, softmax=bool(softmax), empty="uniform", pooling=pooling)


def masked(unit: Fused, plan: Plan, target: Tensor, history: Tensor, mask: Tensor | None) -> Tensor:
    """The unit with the host's mask: scores are multiplied by it, and a softmax gets -1e9 (1 - mask) added.

    A mask of zeros and ones is the kernels' own. Any other is applied here, to scores that the kernels give. Whether it
    is one is read from numbers on the CPU only, where that waits for nothing, and not while torch.compile traces.
    """
    # Under autocast the host multiplies scores with a float mask, and with the history as it came.
    dtype = history.dtype
    if mask is None or mask.dtype == torch.bool or _binary(mask):
        valid = None if mask is None else (mask != 0).expand(history.shape[:2])
        return run(unit, plan, target, history, valid).to(dtype)
    scoring = plan._replace(spec=replace(plan.spec, softmax=False, pooling="none"))
    valid = (mask != 0).expand(history.shape[:2])  # where the mask is 0 so is the product, whatever the score
    weight = run(unit, scoring, target, history, valid) * mask.float()
    if plan.spec.softmax:
        weight = (weight - 1e9 * (1 - mask.float())).softmax(dim=-1)
    if plan.spec.pooling == "none":
        return weight.to(dtype)
    return torch.bmm(weight.to(dtype).unsqueeze(1), history).squeeze(1).to(dtype)


def _binary(mask: Tensor) -> bool:
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(((mask == 0) | (mask == 1)).all())


def activation(module: Any) -> Activation:
    if type(module) is Dice:
        return Activation("dice_batch", slope=module.alpha, gate_norm=module.bn)
    return activation_of(module)


def recognise(module: nn.Module) -> type[Fused] | None:
    return FusedDINAttention if isinstance(module, DIN_Attention) else None

"""DeepCTR-Torch 0.3.0: ``AttentionSequencePoolingLayer`` of its DIN and DIEN.

Source: https://github.com/shenweichen/DeepCTR-Torch, ``deepctr_torch/layers/sequence.py``, ``core.py``,
``activation.py``.
"""

from __future__ import annotations

from typing import Any

from deepctr_torch.layers.activation import Dice, Identity
from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer
from torch import Tensor, nn

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


class FusedAttentionSequencePoolingLayer(Fused, AttentionSequencePoolingLayer):
    """``AttentionSequencePoolingLayer`` on the kernels, pooled or scores out.

    Masked scores are 0, or -2**32 + 1 in front of a softmax: uniform over all T positions where none is valid.
    """

    framework = "DeepCTR-Torch"
    host = AttentionSequencePoolingLayer

    @staticmethod
    def plan(unit: Any) -> Plan:
        check_children(unit)
        local = unit.local_att
        dnn = local.dnn
        if dnn.use_bn:
            raise Unsupported("a BatchNorm along the positions (use_bn)")
        modules: list[nn.Module] = []
        for linear, activation in zip(dnn.linears, dnn.activation_layers, strict=True):
            modules += [linear, activation, dnn.dropout]
        return read(
            [*modules, local.dense],
            dnn.linears[0].in_features // 4,
            _activation,
            softmax=bool(unit.weight_normalization),
            empty="uniform",
            pooling="none" if unit.return_score else "sum",
        )

    def forward(self, query: Tensor, keys: Tensor, keys_length: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (B, 1, D), keys (B, T, D), keys_length (B, 1), mask (B, T) bool -> (B, 1, D), or scores (B, 1, T).

        With ``supports_masking`` the mask counts, else the lengths.
        """
        plan = live(self, None if query.shape[1] == 1 else "a query for each position")
        if plan is None:
            return super().forward(query, keys, keys_length, mask)
        valid = lengths = None
        batch, length = keys.shape[:2]
        if self.supports_masking:
            if mask is None:
                raise ValueError("When supports_masking=True,input must support masking")
            valid = mask.expand(batch, length)
        else:
            lengths = whole_lengths(keys_length.view(-1), length).expand(batch)
        plan = fill_overflows(plan, keys)
        return run(self, plan, query.squeeze(1), keys, valid, lengths, query_name="query").unsqueeze(1)


def _activation(module: Any) -> Activation:
    if type(module) is Dice:
        if module.dim != 3:
            raise Unsupported("a Dice for inputs of 2 dimensions")
        return Activation("dice_batch", slope=module.alpha, gate_norm=module.bn)
    if type(module) is Identity:
        return Activation("identity")
    return one_slope(module)


def recognise(module: nn.Module) -> type[Fused] | None:
    return FusedAttentionSequencePoolingLayer if isinstance(module, AttentionSequencePoolingLayer) else None

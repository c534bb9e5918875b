"""FuxiCTR 2.3.10: the attention of its DIEN, where it is DIN's (``attention_type="din_attention"``).

Source: https://github.com/reczoo/FuxiCTR, ``model_zoo/LongCTR/DIEN/DIEN.py``, as the package installs it.
"""

from __future__ import annotations

from typing import Any

from model_zoo.LongCTR.DIEN.DIEN import AttentionLayer
from torch import Tensor, nn

from din_fast.frameworks.common import Fused, Plan, Unsupported, check_children, live
from din_fast.frameworks.fuxictr import masked, read_block


class FusedAttentionLayer(Fused, AttentionLayer):
    """DIEN's ``AttentionLayer`` on the kernels: the scores."""

    framework = "FuxiCTR"
    host = AttentionLayer

    @staticmethod
    def plan(unit: Any) -> Plan:
        check_children(unit)
        if unit.attention_type != "din_attention":
            raise Unsupported(f"its attention_type is {unit.attention_type}")
        block = unit.attn_mlp
        return read_block(block, block.mlp[0].in_features // 4, unit.use_attention_softmax, "none")

    def forward(self, sequence_emb: Tensor, target_emb: Tensor, mask: Tensor | None = None) -> Tensor:
        """sequence_emb (B, L, D), target_emb (B, D), mask (B, L) bool, int or float, 0 = masked -> (B, L)."""
        plan = live(self)
        if plan is None:
            return super().forward(sequence_emb, target_emb, mask)
        return masked(self, plan, target_emb, sequence_emb, mask)


def recognise(module: nn.Module) -> type[Fused] | None:
    # Bilinear and dot-product attention are no DIN units: they are not ours to report as left.
    ours = isinstance(module, AttentionLayer) and module.attention_type == "din_attention"
    return FusedAttentionLayer if ours else None

"""The presets of frameworks that are not in bench/peers.py: RecBole's unit itself; of the others, which cannot be
installed beside this torch, their steps written down again as their sources have them (each names its source)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from din_fast import FusedActivationUnit, preset
from tests import hosts
from tests.truth import MASKINGS, Case, Inputs, draw, fused_unit, randomise

B, L, D = 6, 9, 7


def masked_fill_then_softmax(s: Tensor, valid: Tensor, fill: float, scale: float) -> Tensor:
    return torch.softmax(torch.where(valid, s, torch.tensor(fill, dtype=s.dtype)) * scale, dim=1)


def paper(score: Tensor, valid: Tensor, history: Tensor) -> Tensor:
    """zhougr1993/DeepInterestNetwork, din/model.py, attention(): mask by -2**32 + 1, then / sqrt(D), softmax, sum."""
    return (masked_fill_then_softmax(score, valid, -(2**32) + 1, D**-0.5).unsqueeze(1) @ history).squeeze(1)


def easyrec(score: Tensor, valid: Tensor, history: Tensor) -> Tensor:
    """TorchEasyRec, tzrec/modules/sequence.py, DINEncoder: mask by -2**31 + 1, softmax, sum."""
    return (masked_fill_then_softmax(score, valid, -(2**31) + 1, 1.0).unsqueeze(1) @ history).squeeze(1)


def rechorus(score: Tensor, valid: Tensor, history: Tensor) -> Tensor:
    """ReChorus, context_seq/DIN.py, attention(): 0 where masked, then / sqrt(D), sum."""
    return (score.masked_fill(~valid, 0.0) / D**0.5 * 1.0).unsqueeze(1).matmul(history).squeeze(1)


def recstudio(score: Tensor, valid: Tensor, history: Tensor) -> Tensor:
    """RecStudio, module/layers.py, AttentionLayer: / sqrt(D), then 0 where masked, sum."""
    return (score / D**0.5).masked_fill(~valid, 0.0).unsqueeze(1).matmul(history).squeeze(1)


def sparrow(score: Tensor, valid: Tensor, history: Tensor) -> Tensor:
    """SparrowRecSys, TFRecModel DIN.py: sigmoid, sum. It has no mask; here a masked position has no weight."""
    return (torch.sigmoid(score) * valid).unsqueeze(1).matmul(history).squeeze(1)


def standard(q: Tensor, k: Tensor) -> list[Tensor]:
    return [q, k, q - k, q * k]


Score = Callable[[Tensor, Tensor, Tensor], Tensor]
RESTATED: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], list[Tensor]], Score]] = {
    "paper": ({}, standard, paper),
    "easyrec": ({}, standard, easyrec),
    "easyrec dice": ({"activation": "dice"}, standard, easyrec),
    "easyrec dice norm": ({"activation": "dice", "batch_norm": True}, standard, easyrec),
    "rechorus": ({}, standard, rechorus),
    "recstudio": ({}, lambda q, k: [q, q, q * k, q - k], recstudio),
    "sparrow": ({}, lambda q, k: [k - q, k, q, q * k], sparrow),
}


def gradients(out: Tensor, unit: nn.Module, inputs: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(out, [inputs.history, inputs.target, *unit.parameters()], inputs.upstream))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("name", RESTATED)
def test_a_preset_is_what_the_framework_computes(name: str, masking: str, training: bool, backend: str) -> None:
    options, blocks, rest = RESTATED[name]
    spec = preset(name.split()[0], [8, 5], **options)
    unit = fused_unit(spec, D, backend).double().train(training)
    again = fused_unit(spec, D, "reference").double().train(training)
    inputs = draw(Case(spec, (B, L, D), masking), 0, torch.float64)
    inputs.history.requires_grad_()
    inputs.target.requires_grad_()
    found = unit(inputs.history, inputs.target, inputs.mask, inputs.lengths)
    assert unit.last_backend == backend
    valid = torch.ones(B, L, dtype=torch.bool) if inputs.valid is None else inputs.valid
    features = torch.cat(blocks(inputs.target.unsqueeze(1).expand(-1, L, -1), inputs.history), dim=-1)
    score = again.attention(features.flatten(0, 1)).view(B, L)  # the layers are ordinary modules
    right = rest(score, valid, inputs.history)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-11)
    for a, b in zip(gradients(found, unit, inputs), gradients(right, again, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def recbole_unit(hidden: list[int], activation: str, softmax: bool) -> nn.Module:
    unit: nn.Module = hosts.load("recbole.model.layers").SequenceAttLayer(
        torch.arange(L).view(1, -1), [4 * D, *hidden], activation, softmax_stag=softmax, return_seq_weight=False
    )
    return unit


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["sigmoid", "dice", "relu", "tanh"])
def test_recboles_own_unit(activation: str, softmax: bool, masked: bool, backend: str) -> None:
    """Its NaN for a softmax over nothing included, in the output and in every gradient."""
    host = recbole_unit([8, 5], activation, softmax).double()
    randomise(host, torch.Generator().manual_seed(3))
    unit = FusedActivationUnit(D, spec=preset("recbole", [8, 5], activation, softmax), backend=backend).double()
    theirs = [m for m in host.modules() if isinstance(m, nn.Linear)]
    ours = [m for m in unit.modules() if isinstance(m, nn.Linear)]
    for mine, other in zip(ours, theirs, strict=True):
        mine.load_state_dict(other.state_dict())
    inputs = draw(Case(unit.spec, (B, L, D), "lengths" if masked else "none"), 0, torch.float64)
    inputs.history.requires_grad_()
    inputs.target.requires_grad_()
    lengths = torch.full((B,), L) if inputs.lengths is None else inputs.lengths
    right = host(inputs.target, inputs.history, lengths).squeeze(1)
    found = unit(inputs.history, inputs.target, lengths=inputs.lengths)
    assert unit.last_backend == backend and bool(found.isnan().any()) == (softmax and masked)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12, equal_nan=True)
    for a, b in zip(gradients(found, unit, inputs), gradients(right, host, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, equal_nan=True)

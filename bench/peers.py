"""The activation units of other frameworks, as installed, behind one calling form.

Nothing of their code is patched; ``bench/hosts.py`` imports them.

Names are those of :func:`din_fast.preset`: ``rechub`` (torch-rechub ``ActivationUnit``), ``fuxictr`` (FuxiCTR
``DIN_Attention``), ``deepctr`` (DeepCTR-Torch ``AttentionSequencePoolingLayer``), ``recbole`` (RecBole
``SequenceAttLayer``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import hosts

PACKAGES = {"rechub": "torch-rechub", "fuxictr": "fuxictr", "deepctr": "deepctr-torch", "recbole": "recbole"}
# What each is timed with, by the names of din_fast.preset: Dice but for RecBole, whose Dice normalises nothing.
ACTIVATIONS = {"rechub": "dice", "fuxictr": "dice", "deepctr": "dice", "recbole": "sigmoid"}
_FUXICTR_ACTIVATIONS = {
    "dice": "Dice",
    "relu": "ReLU",
    "prelu": "PReLU",
    "sigmoid": "Sigmoid",
    "identity": "Identity",
}
_RECBOLE_ACTIVATIONS: dict[str, Any] = {"identity": "none", "prelu": nn.PReLU}


def _load(module: str, name: str) -> Any:
    return getattr(hosts.load(module), name)


def _known(name: str) -> None:
    if name not in PACKAGES:
        raise ValueError(f"name: expected one of {', '.join(PACKAGES)}; got {name!r}")


def build(
    name: str,
    dim: int,
    hidden_units: Sequence[int],
    activation: str | None = None,
    softmax: bool = False,
    length: int = 50,
) -> nn.Module:
    """A framework's unit with its own initial weights, float32.

    Args:
        name: ``rechub``, ``fuxictr``, ``deepctr`` or ``recbole``.
        dim: D, the size of an embedding.
        hidden_units: widths of the hidden layers.
        activation: as :func:`din_fast.preset` names them: ``dice``, ``relu``, ``prelu``, ``sigmoid``, ``identity``;
            default: that of :data:`ACTIVATIONS`.
        softmax: normalise the scores.
        length: L, which RecBole's unit is made for; the others take any.

    Raises:
        ValueError: an unknown name.
        ImportError: the framework is not installed.
    """
    _known(name)
    activation = ACTIVATIONS[name] if activation is None else activation
    if name == "rechub":
        unit = _load("torch_rechub.models.ranking.din", "ActivationUnit")
        act = nn.Identity if activation == "identity" else activation
        return unit(dim, dims=list(hidden_units), activation=act, use_softmax=softmax)
    if name == "fuxictr":
        unit = _load("fuxictr.pytorch.layers", "DIN_Attention")
        act = _FUXICTR_ACTIVATIONS[activation]
        return unit(dim, attention_units=list(hidden_units), hidden_activations=act, use_softmax=softmax)
    if name == "recbole":
        unit = _load("recbole.model.layers", "SequenceAttLayer")
        sizes, act = [4 * dim, *hidden_units], _RECBOLE_ACTIVATIONS.get(activation, activation)
        return unit(torch.arange(length).view(1, -1), sizes, act, softmax_stag=softmax, return_seq_weight=False)
    unit = _load("deepctr_torch.layers.sequence", "AttentionSequencePoolingLayer")
    return unit(
        att_hidden_units=tuple(hidden_units),
        att_activation="linear" if activation == "identity" else activation,
        weight_normalization=softmax,
        supports_masking=True,
        embedding_dim=dim,
    )


def call(name: str, module: nn.Module, history: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """history (B, L, D), target (B, D), valid (B, L) bool with True = valid, or None for all -> (B, D).

    Raises:
        ValueError: an unknown name, or ``valid`` for torch-rechub, whose unit has no mask, or valid positions behind a
            masked one for RecBole, whose unit takes lengths.
    """
    _known(name)
    if name == "rechub":
        if valid is not None:
            raise ValueError("valid: torch-rechub's unit has no mask, expected None")
        return module(history, target)
    if name == "fuxictr":
        return module(target, history, valid)
    if name == "recbole":
        return module(target, history, _lengths(history, valid)).squeeze(1)
    if valid is None:
        valid = torch.ones(history.shape[:2], dtype=torch.bool, device=history.device)
    lengths = valid.sum(dim=1, keepdim=True)  # not read where a mask is given
    return module(target.unsqueeze(1), history, lengths, valid).squeeze(1)


def _lengths(history: Tensor, valid: Tensor | None) -> Tensor:
    """The number of valid positions of each history (B,), which must come first."""
    batch, length = history.shape[:2]
    if valid is None:
        return torch.full((batch,), length, device=history.device)
    lengths = valid.sum(dim=1)
    if not torch.equal(valid, torch.arange(length, device=history.device) < lengths.unsqueeze(1)):
        raise ValueError("valid: RecBole's unit takes lengths, expected the valid positions before the masked ones")
    return lengths


def chain(unit: nn.Module) -> list[nn.Module]:
    """The modules of a unit's MLP in the order of computation, those without state included."""
    if hasattr(unit, "local_att"):  # DeepCTR-Torch
        local: Any = unit.local_att
        pairs = zip(local.dnn.linears, local.dnn.activation_layers, strict=True)
        return [*(module for pair in pairs for module in pair), local.dense]
    if hasattr(unit, "att_mlp_layers"):  # RecBole
        mlp: Any = unit.att_mlp_layers
        return [*mlp.mlp_layers, unit.dense]
    holder: Any = unit.attention_layer if hasattr(unit, "attention_layer") else unit.attention
    return list(holder.mlp)


def has_softmax(unit: nn.Module) -> bool:
    """Whether a framework's unit normalises its scores."""
    names = ("use_softmax", "weight_normalization", "softmax_stag")
    return any(bool(getattr(unit, name, False)) for name in names)


def layers(unit: nn.Module) -> list[nn.Module]:
    """The modules of a unit's MLP that hold state, in the order of computation.

    For the four frameworks' units, din_fast's reference and :class:`din_fast.FusedActivationUnit`: Linear,
    [BatchNorm1d], [Dice or PReLU] per hidden layer, then the last Linear. The tensors inside corresponding layers have
    the same names everywhere (``weight``, ``alpha``, ``bn.running_mean``, ...), though not always the same shape.
    """
    return [m for m in chain(unit) if m.state_dict()]


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and running statistics from one unit to another of the same layers, whatever their classes.

    Raises:
        ValueError: the units do not have the same layers.
        RuntimeError: a layer's tensors do not correspond by name or size.
    """
    theirs, ours = layers(source), layers(target)
    if len(theirs) != len(ours):
        raise ValueError(f"target: expected {len(theirs)} layers with weights as the source has, got {len(ours)}")
    for one, other in zip(theirs, ours, strict=True):
        shapes = {name: t.shape for name, t in other.state_dict().items()}
        other.load_state_dict({name: _shaped(t, shapes.get(name)) for name, t in one.state_dict().items()})


def _shaped(t: Tensor, shape: torch.Size | None) -> Tensor:
    """A slope of (H, 1) as (H,) and the like; whatever differs by more than dimensions of 1 stays as it is."""
    return t.reshape(shape) if shape is not None and [n for n in t.shape if n > 1] == [n for n in shape if n > 1] else t

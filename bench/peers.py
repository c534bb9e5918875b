"""The activation units of other frameworks, as installed, behind one calling form.

Nothing of their code is patched; ``bench/hosts.py`` imports them.

Names are those of :func:`din_fast.preset`: ``rechub`` (torch-rechub ``ActivationUnit``), ``fuxictr`` (FuxiCTR
``DIN_Attention``), ``deepctr`` (DeepCTR-Torch ``AttentionSequencePoolingLayer``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import hosts

PACKAGES = {"rechub": "torch-rechub", "fuxictr": "fuxictr", "deepctr": "deepctr-torch"}
_FUXICTR_ACTIVATIONS = {
    "dice": "Dice",
    "relu": "ReLU",
    "prelu": "PReLU",
    "sigmoid": "Sigmoid",
    "identity": "Identity",
}


def _load(module: str, name: str) -> Any:
    return getattr(hosts.load(module), name)


def _known(name: str) -> None:
    if name not in PACKAGES:
        raise ValueError(f"name: expected one of {', '.join(PACKAGES)}; got {name!r}")


def build(
    name: str, dim: int, hidden_units: Sequence[int], activation: str = "dice", softmax: bool = False
) -> nn.Module:
    """A framework's unit with its own initial weights, float32.

    Args:
        name: ``rechub``, ``fuxictr`` or ``deepctr``.
        dim: D, the size of an embedding.
        hidden_units: widths of the hidden layers.
        activation: as :func:`din_fast.preset` names them: ``dice``, ``relu``, ``prelu``, ``sigmoid``, ``identity``.
        softmax: normalise the scores.

    Raises:
        ValueError: an unknown name.
        ImportError: the framework is not installed.
    """
    _known(name)
    if name == "rechub":
        unit = _load("torch_rechub.models.ranking.din", "ActivationUnit")
        act = nn.Identity if activation == "identity" else activation
        return unit(dim, dims=list(hidden_units), activation=act, use_softmax=softmax)
    if name == "fuxictr":
        unit = _load("fuxictr.pytorch.layers", "DIN_Attention")
        act = _FUXICTR_ACTIVATIONS[activation]
        return unit(dim, attention_units=list(hidden_units), hidden_activations=act, use_softmax=softmax)
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
        ValueError: an unknown name, or ``valid`` for torch-rechub, whose unit has no mask.
    """
    _known(name)
    if name == "rechub":
        if valid is not None:
            raise ValueError("valid: torch-rechub's unit has no mask, expected None")
        return module(history, target)
    if name == "fuxictr":
        return module(target, history, valid)
    if valid is None:
        valid = torch.ones(history.shape[:2], dtype=torch.bool, device=history.device)
    lengths = valid.sum(dim=1, keepdim=True)  # not read where a mask is given
    return module(target.unsqueeze(1), history, lengths, valid).squeeze(1)


def layers(unit: nn.Module) -> list[nn.Module]:
    """The modules of a unit's MLP that hold state, in the order of computation.

    For the three frameworks' units, din_fast's reference and :class:`din_fast.FusedActivationUnit`: Linear,
    [BatchNorm1d], [Dice or PReLU] per hidden layer, then the last Linear. The tensors inside corresponding layers have
    the same names everywhere (``weight``, ``alpha``, ``bn.running_mean``, ...), though not always the same shape.
    """
    modules: list[nn.Module] = []
    if hasattr(unit, "local_att"):  # DeepCTR-Torch
        local: Any = unit.local_att
        for pair in zip(local.dnn.linears, local.dnn.activation_layers, strict=True):
            modules.extend(pair)
        modules.append(local.dense)
    else:
        holder: Any = unit.attention_layer if hasattr(unit, "attention_layer") else unit.attention
        modules.extend(holder.mlp)
    return [m for m in modules if m.state_dict()]


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

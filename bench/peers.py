"""The activation units of other frameworks, as installed, behind one calling form.

Nothing of their code is patched. Where an import asks for a package that the unit never uses, an empty module stands in
for it while the import runs, and is taken out again.

Names are those of :func:`din_fast.preset`: ``rechub`` (torch-rechub ``ActivationUnit``), ``fuxictr`` (FuxiCTR
``DIN_Attention``), ``deepctr`` (DeepCTR-Torch ``AttentionSequencePoolingLayer``).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = {"rechub": "torch-rechub", "fuxictr": "fuxictr", "deepctr": "deepctr-torch"}
_FUXICTR_ACTIVATIONS = {
    "dice": "Dice",
    "relu": "ReLU",
    "prelu": "PReLU",
    "sigmoid": "Sigmoid",
    "identity": "Identity",
}

_FUXICTR_STUBS: dict[str, dict[str, object]] = {
    "h5py": {},
    "polars": {},
    "yaml": {},
    "ray": {},
    "ray.data": {"SaveMode": object, "TaskPoolStrategy": object},
    "ray.data.datasource": {},
    "ray.data.datasource.filename_provider": {"FilenameProvider": object},
}
# DeepCTR-Torch asks the package index for its newest version at import; this answer ends that without a word.
_DEEPCTR_STUBS: dict[str, dict[str, object]] = {
    "requests": {"get": lambda url: SimpleNamespace(status_code=None), "codes": SimpleNamespace(ok=200)}
}


@contextmanager
def _standing_in(stubs: Mapping[str, Mapping[str, object]], always: bool = False) -> Iterator[None]:
    """Put stubs in place of packages that are not installed (``always``: of installed ones too), then undo it."""
    absent = [n for n in stubs if always or not _installed(n.partition(".")[0])]
    before = {n: sys.modules[n] for n in absent if n in sys.modules}
    for name in absent:
        module = ModuleType(name)
        vars(module).update(stubs[name])
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        sys.modules.update(before)


def _installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _load(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks' own imports
        return getattr(importlib.import_module(module), name)


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
        with _standing_in(_FUXICTR_STUBS):
            unit = _load("fuxictr.pytorch.layers", "DIN_Attention")
        act = _FUXICTR_ACTIVATIONS[activation]
        return unit(dim, attention_units=list(hidden_units), hidden_activations=act, use_softmax=softmax)
    with _standing_in(_DEEPCTR_STUBS, always=True):
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

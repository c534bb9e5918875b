"""DIN as a whole model in plain PyTorch, with either form of its activation unit, and its two usual baselines.

Source: Zhou et al. 2018, https://arxiv.org/abs/1706.06978: figure 2, the base model on the left and DIN on the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from din_fast import reference
from din_fast.spec import UnitSpec, preset
from din_fast.unit import FusedActivationUnit

ATTENTIONS = ("fused", "reference", "dot", "none")
EMBEDDING_STD = 0.01  # torch's N(0, 1) drowns the first steps in noise; the 1e-4 of some frameworks is lost in float32
# Dice of the last MLP: the paper's, section 5.3.
TOP_DICE = UnitSpec(activation="dice_batch", dice_eps=1e-8, per_channel_slope=True)


@dataclass(frozen=True)
class Feature:
    """A named part of the input: :class:`Dense`, :class:`Sparse` or :class:`History`."""

    name: str


@dataclass(frozen=True)
class Dense(Feature):
    """Continuous columns, given to the MLP as they are: (B, width), or (B,) for one column.

    Raises:
        ValueError: width is not positive.
    """

    width: int = 1

    def __post_init__(self) -> None:
        _positive("width", self.width)


@dataclass(frozen=True)
class Sparse(Feature):
    """An id with a table of embeddings: (B,), ids from 0 to vocabulary - 1; where a history shares the table, id 0 is
    the pad, whose row is zero and stays so.

    Raises:
        ValueError: vocabulary or dim is not positive.
    """

    vocabulary: int
    dim: int

    def __post_init__(self) -> None:
        _positive("vocabulary", self.vocabulary)
        _positive("dim", self.dim)


@dataclass(frozen=True)
class History(Feature):
    """The ids that a user met before: (B, L), any L, 0 where there is none; it shares the table of a candidate's
    :class:`Sparse` feature, which it is pooled against."""

    candidate: str


class DIN(nn.Module):
    """DIN: the history is pooled against the candidate, then everything goes through an MLP with Dice.

    Args:
        features: the columns of the input, in any order; at least one history.
        attention: how a history is pooled over its valid positions, those whose id is not 0: ``fused`` and
            ``reference`` are the activation unit of ``spec``, by :class:`~din_fast.FusedActivationUnit` or by
            :class:`din_fast.reference.ActivationUnit`, with the same state_dict keys; ``dot`` is
            softmax(q k / sqrt(D)); ``none`` is the sum, the paper's base model.
        spec: of the activation unit; default torch-rechub's, ``preset("rechub")``.
        concatenate: pool all histories together, as one of concatenated embeddings (FuxiCTR, DeepCTR-Torch), instead
            of each by itself (torch-rechub). They must have the same L, and the first one's ids say what is valid.
        backend: of the fused units.
        hidden_units: widths of the last MLP; default the paper's.
        outputs: 1 for one logit (sigmoid), 2 for two (softmax over no click and click, as in the paper).

    Attributes:
        units: the activation units, one per history or just one; empty for ``dot`` and ``none``.

    Raises:
        ValueError: a name that is empty, has a dot or comes twice, a history without its candidate, no history, an
            unknown attention, spec or backend where no unit would use it, a spec that does not pool, hidden_units not
            positive, outputs neither 1 nor 2.
        TypeError: a feature that is none of the three.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        attention: str = "fused",
        spec: UnitSpec | None = None,
        concatenate: bool = False,
        backend: str = "auto",
        hidden_units: Sequence[int] = (200, 80),
        outputs: int = 1,
    ) -> None:
        super().__init__()
        _check_features(features)
        _check_attention(attention, spec, backend)
        for units in hidden_units:
            _positive("hidden_units", units)
        if outputs not in (1, 2):
            raise ValueError(f"outputs: expected 1 or 2, got {outputs!r}")
        self.dense = [f for f in features if isinstance(f, Dense)]
        self.sparse = {f.name: f for f in features if isinstance(f, Sparse)}
        self.histories = [f for f in features if isinstance(f, History)]
        self.attention = attention
        self.concatenate = concatenate
        padded = {h.candidate for h in self.histories}
        self.embeddings = nn.ModuleDict({_key(n): _embedding(f, n in padded) for n, f in self.sparse.items()})
        dims = [self.sparse[h.candidate].dim for h in self.histories]
        spec = preset("rechub") if spec is None else spec
        self.units = nn.ModuleList(
            _unit(attention, dim, spec, backend)
            for dim in ([sum(dims)] if concatenate else dims)
            if attention in ("fused", "reference")
        )
        inputs = sum(f.width for f in self.dense) + sum(f.dim for f in self.sparse.values()) + sum(dims)
        self.top = _mlp(inputs, hidden_units, outputs)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """The logits of B samples.

        Args:
            x: a tensor for each feature, by its name: a :class:`Dense` one (B, width) of any dtype, cast to the
                model's; a :class:`Sparse` one (B,) and a :class:`History` (B, L), int32 or int64. Others are ignored.

        Returns:
            (B,), or (B, 2) with two outputs; see :func:`click_loss` and :func:`click_probability`.

        Raises:
            ValueError: a feature is missing or has another shape; on the CPU, an id outside its table.
            TypeError: ids that are no integers.
        """
        self._check(x)
        dtype = next(self.parameters()).dtype
        dense = [x[f.name].reshape(-1, f.width).to(dtype) for f in self.dense]
        sparse = {name: self._embed(name, x[name]) for name in self.sparse}
        logits: Tensor = self.top(torch.cat([*dense, *sparse.values(), *self._interests(x, sparse)], dim=1))
        return logits.squeeze(1) if logits.shape[1] == 1 else logits

    def _embed(self, name: str, ids: Tensor) -> Tensor:
        embedded: Tensor = self.embeddings[_key(name)](ids)
        return embedded

    def _interests(self, x: Mapping[str, Tensor], sparse: Mapping[str, Tensor]) -> list[Tensor]:
        """The pooled histories."""
        keys = [self._embed(h.candidate, x[h.name]) for h in self.histories]
        queries = [sparse[h.candidate] for h in self.histories]
        valid = [x[h.name] != 0 for h in self.histories]
        if self.concatenate:
            keys, queries, valid = [torch.cat(keys, dim=-1)], [torch.cat(queries, dim=-1)], valid[:1]
        if self.attention == "none":
            return [sum_pooling(k, v) for k, v in zip(keys, valid, strict=True)]
        if self.attention == "dot":
            return [dot_attention(k, q, v) for k, q, v in zip(keys, queries, valid, strict=True)]
        return [unit(k, q, v) for unit, k, q, v in zip(self.units, keys, queries, valid, strict=True)]

    def _check(self, x: Mapping[str, Tensor]) -> None:
        for name in (*(f.name for f in self.dense), *self.sparse, *(f.name for f in self.histories)):
            if name not in x:
                raise ValueError(f"x: expected a tensor for each feature, got none for {name!r}")
        batch = x[self.histories[0].name].shape[0]
        for dense in self.dense:
            _check_shape(dense.name, x[dense.name], (batch, dense.width), (batch,) if dense.width == 1 else None)
        for sparse in self.sparse.values():
            _check_ids(sparse.name, x[sparse.name], (batch,), sparse.vocabulary)
        length = x[self.histories[0].name].shape[-1]
        for history in self.histories:
            ids = x[history.name]
            shape = (batch, length if self.concatenate else ids.shape[-1])
            _check_ids(history.name, ids, shape, self.sparse[history.candidate].vocabulary)


def dot_attention(history: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Dot-product target attention, softmax(q k / sqrt(D)) over the valid positions.

    history (B, L, D), target (B, D), valid (B, L) bool -> (B, D); zeros where nothing is valid.
    """
    return F.scaled_dot_product_attention(target.unsqueeze(1), history, history, valid.unsqueeze(1)).squeeze(1)


def sum_pooling(history: Tensor, valid: Tensor) -> Tensor:
    """The base model's pooling: history (B, L, D), valid (B, L) bool -> (B, D), the sum over the valid positions."""
    return history.masked_fill(~valid.unsqueeze(-1), 0.0).sum(dim=1)


def click_loss(logits: Tensor, label: Tensor) -> Tensor:
    """The mean cross-entropy of either head: logits (B,) or (B, 2), label (B,) 0 or 1 of any dtype -> ()."""
    if logits.dim() == 1:
        return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype))
    return F.cross_entropy(logits, label.long())


def click_probability(logits: Tensor) -> Tensor:
    """The probability of a click by either head: logits (B,) or (B, 2) -> (B,)."""
    return logits.sigmoid() if logits.dim() == 1 else logits.softmax(dim=1)[:, 1]


def _key(name: str) -> str:
    """The name of a table in the ModuleDict, which takes no names that are its own, such as ``items``."""
    return f"of_{name}"


def _embedding(feature: Sparse, padded: bool) -> nn.Embedding:
    table = nn.Embedding(feature.vocabulary, feature.dim, padding_idx=0 if padded else None)
    with torch.no_grad():
        table.weight.mul_(EMBEDDING_STD)
    return table


def _unit(attention: str, dim: int, spec: UnitSpec, backend: str) -> nn.Module:
    if attention == "fused":
        return FusedActivationUnit(dim, spec=spec, backend=backend)
    return reference.ActivationUnit(dim, spec)


def _mlp(inputs: int, hidden_units: Sequence[int], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for units in hidden_units:
        layers += [nn.Linear(inputs, units), reference.BatchDice(units, TOP_DICE)]
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")


def _check_features(features: Sequence[Feature]) -> None:
    for feature in features:
        if not isinstance(feature, Dense | Sparse | History):
            raise TypeError(f"features: expected Dense, Sparse or History, got {type(feature).__name__}")
        if not feature.name or "." in feature.name:
            raise ValueError(f"features: expected a name without dots, got {feature.name!r}")
    names = [feature.name for feature in features]
    if len(set(names)) < len(names):
        raise ValueError(f"features: expected different names, got {names}")
    sparse = {feature.name for feature in features if isinstance(feature, Sparse)}
    histories = [feature for feature in features if isinstance(feature, History)]
    if not histories:
        raise ValueError("features: expected at least one History, got none")
    for history in histories:
        if history.candidate not in sparse:
            raise ValueError(
                f"features: expected a Sparse feature as the candidate of {history.name!r}, got {history.candidate!r}"
            )


def _check_attention(attention: str, spec: UnitSpec | None, backend: str) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}; got {attention!r}")
    if spec is not None and attention in ("dot", "none"):
        raise ValueError(f"spec: expected None with attention {attention!r}, which has no unit; got a UnitSpec")
    if spec is not None and spec.pooling == "none":
        raise ValueError("spec: expected one that pools, got one with the pooling 'none'")
    if backend != "auto" and attention != "fused":
        raise ValueError(f"backend: expected 'auto' with attention {attention!r}, which has none; got {backend!r}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], other: tuple[int, ...] | None = None) -> None:
    if value.shape not in (shape, other):
        expected = f"{shape}" if other is None else f"{shape} or {other}"
        raise ValueError(f"x[{name!r}]: expected the shape {expected}, got {tuple(value.shape)}")


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...], vocabulary: int) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"x[{name!r}]: expected int32 or int64 ids, got {ids.dtype}")
    _check_shape(name, ids, shape)
    # On a GPU reading them would wait for it; there, the lookup asserts.
    if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"x[{name!r}]: expected ids from 0 to {vocabulary - 1}, got {low} to {high}")

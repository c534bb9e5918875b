"""What a DIN activation unit computes, as data: one :class:`UnitSpec`, and a preset per framework.

The notation is that of the paper (Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
https://arxiv.org/abs/1706.06978): ``q`` is the candidate item's embedding, ``k`` one item of the history, D their size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

# A feature block is linear in (q, k, q*k); its coefficients are all that the folded first layer needs.
BLOCKS: dict[str, tuple[int, int, int]] = {
    "q": (1, 0, 0),
    "k": (0, 1, 0),
    "q-k": (1, -1, 0),
    "k-q": (-1, 1, 0),
    "q*k": (0, 0, 1),
}
# The order of these tuples is the numbering that the kernels use (csrc/unit.h).
ACTIVATIONS = ("identity", "relu", "sigmoid", "prelu", "dice_row", "dice_batch")
SCORE_ACTIVATIONS = ("none", "sigmoid")
POOLINGS = ("sum", "mean", "mean_valid")
EMPTY_RULES = ("zeros", "uniform", "nan")
MAX_HIDDEN_LAYERS = 3


@dataclass(frozen=True)
class UnitSpec:
    """A DIN activation unit as data.

    Args:
        hidden_units: width of each hidden layer, 0 to 3 of them.
        blocks: the blocks of D features, in the order of the first Linear's input columns; each one of ``q``, ``k``,
            ``q-k``, ``k-q``, ``q*k``.
        activation: after each hidden layer: ``dice_row`` (torch-rechub: gate normalised along the hidden axis of one
            row), ``dice_batch`` (paper, DeepCTR-Torch, FuxiCTR: gate normalised by a BatchNorm per hidden unit),
            ``prelu``, ``relu``, ``sigmoid`` or ``identity``.
        batch_norm: a BatchNorm1d (affine, eps 1e-5, momentum 0.1) between each hidden Linear and its activation.
        dice_eps: the eps of Dice, 1e-3 for ``dice_row``, else that of its BatchNorm.
        dice_affine: whether Dice's BatchNorm has a weight and a bias.
        dice_momentum: the momentum of Dice's BatchNorm.
        per_channel_slope: one slope (PReLU's weight, Dice's alpha) per hidden unit instead of one per layer.
        prelu_init: the first value of PReLU's weight.
        score_activation: ``none`` or ``sigmoid``, on the score of a position.
        softmax: normalise the scores over the valid positions.
        empty: weights of a history without a valid position under softmax: ``zeros``, ``uniform`` (1/L on all L rows,
            as FuxiCTR and DeepCTR-Torch) or ``nan`` (as RecBole).
        pooling: of weight times history: ``sum``, ``mean`` (over all L rows) or ``mean_valid`` (over the valid ones).
        dropout: None for no dropout modules; 0.0 adds ``nn.Dropout(0)`` after each activation, which only shifts the
            names in the state_dict (torch-rechub's). Positive values are not built yet.

    Raises:
        ValueError: a field is not one of the values above.
    """

    hidden_units: tuple[int, ...] = (36,)
    blocks: tuple[str, ...] = ("q", "k", "q-k", "q*k")
    activation: str = "dice_row"
    batch_norm: bool = False
    dice_eps: float = 1e-3
    dice_affine: bool = False
    dice_momentum: float = 0.1
    per_channel_slope: bool = False
    prelu_init: float = 0.25
    score_activation: str = "none"
    softmax: bool = False
    empty: str = "zeros"
    pooling: str = "sum"
    dropout: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_units", check_widths("hidden_units", self.hidden_units))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise ValueError("blocks: expected at least one feature block, got none")
        for block in self.blocks:
            _one_of("blocks", block, BLOCKS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("score_activation", self.score_activation, SCORE_ACTIVATIONS)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("empty", self.empty, EMPTY_RULES)
        if self.softmax and self.score_activation != "none":
            raise ValueError(f"score_activation: expected none together with softmax, got {self.score_activation!r}")
        if self.dropout is not None and self.dropout != 0.0:
            raise ValueError(f"dropout: expected None or 0.0 (dropout is not built yet), got {self.dropout!r}")

    @property
    def has_slope(self) -> bool:
        """Whether the activation has a learned slope: PReLU's weight or Dice's alpha."""
        return self.activation in ("prelu", "dice_row", "dice_batch")


def _one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")


def check_widths(name: str, units: Sequence[int]) -> tuple[int, ...]:
    """The widths of the hidden layers as a tuple; an error names them as the caller does."""
    if isinstance(units, str | int) or not all(isinstance(u, int) and not isinstance(u, bool) for u in units):
        raise TypeError(f"{name}: expected a sequence of int, got {units!r}")
    if len(units) > MAX_HIDDEN_LAYERS:
        raise ValueError(f"{name}: expected 0 to {MAX_HIDDEN_LAYERS} hidden layers, got {len(units)}")
    if any(u < 1 for u in units):
        raise ValueError(f"{name}: expected positive widths, got {tuple(units)}")
    return tuple(units)


def preset(
    framework: str,
    hidden_units: Sequence[int] | None = None,
    activation: str = "dice",
    softmax: bool = False,
    batch_norm: bool = False,
) -> UnitSpec:
    """The unit of a framework.

    Args:
        framework: ``rechub`` (torch-rechub 0.9.0 ``ActivationUnit``), ``fuxictr`` (FuxiCTR 2.3.10 ``DIN_Attention``),
            ``deepctr`` (DeepCTR-Torch 0.3.0 ``AttentionSequencePoolingLayer``), or ``blog`` (the widely copied
            [h, t, h-t, h*t] -> Linear -> PReLU -> Linear -> sigmoid unit with mean pooling; the mean is over the valid
            positions).
        hidden_units: widths of the hidden layers; default: the framework's own default.
        activation: as the framework's own strings: ``dice``, ``relu``, ``prelu``, ``sigmoid`` or ``identity``;
            the blog's unit always has ``prelu``.
        softmax: normalise the scores over the valid positions.
        batch_norm: FuxiCTR's ``batch_norm`` option; torch-rechub's unit always has it.

    Raises:
        ValueError: an unknown framework or activation, or an option that the framework does not have.
    """
    _one_of("framework", framework, PRESETS)
    defaults = PRESETS[framework]
    if framework == "blog":
        if activation not in ("dice", "prelu") or batch_norm or softmax:
            raise ValueError(
                "the preset blog has PReLU, no BatchNorm and no softmax; build a UnitSpec for another unit; "
                f"got activation={activation!r}, batch_norm={batch_norm}, softmax={softmax}"
            )
        activation = "prelu"
    if batch_norm and framework == "deepctr":
        raise ValueError("batch_norm: expected False for the preset deepctr (its unit has none), got True")
    _one_of("activation", activation, ("dice", "relu", "prelu", "sigmoid", "identity"))
    fields: dict[str, object] = dict(defaults.fields)
    if activation == "dice":
        activation = defaults.dice
    fields["batch_norm"] = batch_norm or bool(fields.get("batch_norm", False))
    fields["per_channel_slope"] = activation in defaults.per_channel
    units = defaults.hidden_units if hidden_units is None else check_widths("hidden_units", hidden_units)
    return UnitSpec(hidden_units=units, activation=activation, softmax=softmax, **fields)  # type: ignore[arg-type]


class _Preset(NamedTuple):
    hidden_units: tuple[int, ...]
    dice: str
    per_channel: tuple[str, ...]
    fields: dict[str, object]


PRESETS: dict[str, _Preset] = {
    "rechub": _Preset((36,), "dice_row", (), {"batch_norm": True, "dropout": 0.0}),
    "fuxictr": _Preset(
        (64,),
        "dice_batch",
        ("dice_batch", "prelu"),
        {"dice_eps": 1e-9, "dice_momentum": 0.01, "prelu_init": 0.1, "empty": "uniform"},
    ),
    "deepctr": _Preset(
        (80, 40), "dice_batch", ("dice_batch",), {"dice_eps": 1e-8, "dice_affine": True, "empty": "uniform"}
    ),
    "blog": _Preset(
        (36,),
        "prelu",
        (),
        {"blocks": ("k", "q", "k-q", "q*k"), "score_activation": "sigmoid", "pooling": "mean_valid"},
    ),
}


def batch_mode(norm: nn.modules.batchnorm._BatchNorm | None) -> bool:
    """Whether this BatchNorm normalises with the statistics of the batch at hand."""
    return norm is not None and (norm.training or norm.running_mean is None)


class HiddenLayer(NamedTuple):
    """The parameters of one hidden layer.

    Attributes:
        weight: (H, inputs); for the first layer the inputs are the spec's blocks, D columns each.
        bias: (H,) or None.
        norm: the BatchNorm1d between Linear and activation, or None. Its own ``training``, ``momentum``, ``eps`` and
            ``track_running_stats`` count.
        gate_norm: the BatchNorm1d inside a ``dice_batch``, or None.
        slope: PReLU's weight or Dice's alpha: H elements or one, any shape; None for the other activations.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: nn.modules.batchnorm._BatchNorm | None = None
    gate_norm: nn.modules.batchnorm._BatchNorm | None = None
    slope: Tensor | None = None


class UnitParameters(NamedTuple):
    """All parameters of a unit: its hidden layers, and the last Linear, weight (1, H) and bias (1,) or None."""

    hidden: tuple[HiddenLayer, ...]
    weight: Tensor
    bias: Tensor | None = None

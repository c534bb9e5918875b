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
ACTIVATIONS = ("identity", "relu", "leaky_relu", "sigmoid", "silu", "tanh", "prelu", "dice_row", "dice_batch")
# What the kernels know, and the others as cases of it. The order of these tuples is their numbering (csrc/unit.h).
KERNEL_ACTIVATIONS = ("identity", "relu", "sigmoid", "tanh", "prelu", "dice_row", "dice_batch")
# The others are cases of these: a slope that is fixed; a gate that sees z as it is, with an alpha of 0.
SPECIAL_CASES = {"leaky_relu": "prelu", "silu": "dice_batch"}
SCORE_ACTIVATIONS = ("none", "sigmoid", "prelu")
POOLINGS = ("sum", "mean", "mean_valid", "none")
EMPTY_RULES = ("zeros", "uniform", "nan")
BATCH_STATS = ("all", "valid")
MAX_HIDDEN_LAYERS = 3


@dataclass(frozen=True)
class UnitSpec:
    """A DIN activation unit as data.

    Args:
        hidden_units: width of each hidden layer, 0 to 3 of them.
        blocks: the blocks of D features, in the order of the first Linear's input columns; each one of ``q``, ``k``,
            ``q-k``, ``k-q``, ``q*k``.
        hidden_bias: whether the hidden Linears have a bias (TorchEasyRec's have none in front of a BatchNorm).
        activation: after each hidden layer: ``dice_row`` (torch-rechub: gate normalised along the hidden axis of one
            row), ``dice_batch`` (paper, DeepCTR-Torch, FuxiCTR: gate normalised by a BatchNorm per hidden unit),
            ``prelu``, ``relu``, ``leaky_relu``, ``sigmoid``, ``silu`` (RecBole's Dice is this), ``tanh`` or
            ``identity``.
        batch_norm: a BatchNorm1d (affine, eps 1e-5, momentum 0.1) between each hidden Linear and its activation.
        batch_stats: the rows that batch statistics are taken over: ``all`` (padded ones too, as the frameworks do) or
            ``valid`` (the valid positions only: then a pad reaches nothing, in training either).
        dice_eps: the eps of Dice, 1e-3 for ``dice_row``, else that of its BatchNorm.
        dice_affine: whether Dice's BatchNorm has a weight and a bias.
        dice_momentum: the momentum of Dice's BatchNorm.
        per_channel_slope: one slope (PReLU's weight, Dice's alpha) per hidden unit instead of one per layer.
        prelu_init: the first value of PReLU's weight.
        negative_slope: the slope of ``leaky_relu``.
        scale_scores: multiply the scores by 1/sqrt(D), before their activation and softmax. (Whether a framework does
            so before or after its mask is the same: a masked position has weight 0 either way.)
        score_activation: ``none``, ``sigmoid`` or ``prelu`` (one learned slope), on the score of a position.
        softmax: normalise the scores over the valid positions.
        empty: weights of a history without a valid position under softmax; this is all that the frameworks' ways to
            mask differ in: ``zeros`` (masked positions are left out), ``uniform`` (they get a finite number, as -1e9,
            -2**31 + 1 or -2**32 + 1 in FuxiCTR, TorchEasyRec, DeepCTR-Torch and the authors' code: 1/L on all L rows)
            or ``nan`` (-inf, as in RecBole; and as a finite number is in float16).
        pooling: of weight times history: ``sum``, ``mean`` (over all L rows), ``mean_valid`` (over the valid ones) or
            ``none``: the result is the weights themselves.
        dropout: probability that an activation of a hidden layer is dropped in training; 0.0 still adds
            ``nn.Dropout(0)`` after each activation, which only shifts the names in the state_dict (torch-rechub's);
            None for no dropout modules.

    Raises:
        ValueError: a field is not one of the values above.
    """

    hidden_units: tuple[int, ...] = (36,)
    blocks: tuple[str, ...] = ("q", "k", "q-k", "q*k")
    hidden_bias: bool = True
    activation: str = "dice_row"
    batch_norm: bool = False
    batch_stats: str = "all"
    dice_eps: float = 1e-3
    dice_affine: bool = False
    dice_momentum: float = 0.1
    per_channel_slope: bool = False
    prelu_init: float = 0.25
    negative_slope: float = 0.01
    scale_scores: bool = False
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
        _one_of("batch_stats", self.batch_stats, BATCH_STATS)
        _one_of("score_activation", self.score_activation, SCORE_ACTIVATIONS)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("empty", self.empty, EMPTY_RULES)
        if self.softmax and self.score_activation != "none":
            raise ValueError(f"score_activation: expected none together with softmax, got {self.score_activation!r}")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected None or a probability from 0 to below 1, got {self.dropout!r}")

    @property
    def has_slope(self) -> bool:
        """Whether the activation has a learned slope: PReLU's weight or Dice's alpha."""
        return self.activation in ("prelu", "dice_row", "dice_batch")

    @property
    def kernel_activation(self) -> int:
        """The number of the activation in the kernels, of which it may be a special case."""
        return KERNEL_ACTIVATIONS.index(SPECIAL_CASES.get(self.activation, self.activation))

    def score_factor(self, dim: int) -> float:
        """What the scores are multiplied by."""
        return dim**-0.5 if self.scale_scores else 1.0


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
    activation: str | None = None,
    softmax: bool | None = None,
    batch_norm: bool | None = None,
) -> UnitSpec:
    """The unit of a framework.

    Args:
        framework: one of

            ``rechub``: torch-rechub 0.9.0, ``ActivationUnit``;
            ``fuxictr``: FuxiCTR 2.3.10, ``DIN_Attention``;
            ``deepctr``: DeepCTR-Torch 0.3.0, ``AttentionSequencePoolingLayer``;
            ``recbole``: RecBole 1.2.1, ``SequenceAttLayer`` (its Dice does not normalise: it is SiLU);
            ``easyrec``: TorchEasyRec, ``DINEncoder``;
            ``recstudio``: RecStudio, ``AttentionLayer`` of its DIN ([q, q, q*k, q-k], without the raw k);
            ``rechorus``: ReChorus, ``DINBase.attention``;
            ``paper``: the authors' TensorFlow code, https://github.com/zhougr1993/DeepInterestNetwork, ``attention``;
            ``sparrow``: SparrowRecSys, ``DIN.py`` ([k-q, k, q, q*k], sigmoid on the score; its PReLU has a slope for
            each position and unit, here one for each unit);
            ``blog``: the widely copied [h, t, h-t, h*t] -> Linear -> PReLU -> Linear -> sigmoid unit with mean pooling
            (the mean is over the valid positions).
        hidden_units: widths of the hidden layers; default: the framework's own default.
        activation: ``dice`` (the framework's own), ``relu``, ``leaky_relu``, ``prelu``, ``sigmoid``, ``silu``, ``tanh``
            or ``identity``; default: the framework's default. The units of the blog, the paper, ReChorus and
            SparrowRecSys have just one.
        softmax: normalise the scores over the valid positions; default: as the framework, False where it is an option.
        batch_norm: FuxiCTR's and TorchEasyRec's option; torch-rechub's unit always has it. Default: as the framework.

    Raises:
        ValueError: an unknown framework or activation, or an option that the framework does not have.
    """
    _one_of("framework", framework, PRESETS)
    defaults = PRESETS[framework]
    activation = defaults.activation if activation is None else activation
    _one_of("activation", activation, ("dice", *(a for a in ACTIVATIONS if not a.startswith("dice"))))
    softmax = _option("softmax", framework, softmax, defaults.softmax)
    batch_norm = _option("batch_norm", framework, batch_norm, defaults.batch_norm)
    if activation != defaults.activation and defaults.dice is None:
        raise ValueError(
            f"activation: expected {defaults.activation!r}, the only one of the preset {framework}, got {activation!r}"
        )
    if activation == "dice":
        assert defaults.dice is not None
        activation = defaults.dice
    fields: dict[str, object] = dict(defaults.fields)
    if framework == "easyrec":
        fields["hidden_bias"] = not batch_norm
    fields["per_channel_slope"] = activation in defaults.per_channel
    units = defaults.hidden_units if hidden_units is None else check_widths("hidden_units", hidden_units)
    return UnitSpec(
        hidden_units=units,
        activation=activation,
        softmax=softmax,
        batch_norm=batch_norm,
        **fields,  # type: ignore[arg-type]
    )


def _option(name: str, framework: str, value: bool | None, fixed: bool | None) -> bool:
    """An option of a preset: None in ``fixed`` where the framework leaves the choice."""
    if fixed is None:
        return bool(value)
    if value is not None and value != fixed:
        raise ValueError(f"{name}: expected {fixed}, as the unit of the preset {framework} is; got {value}")
    return fixed


class _Preset(NamedTuple):
    """What a framework's unit is; None in softmax and batch_norm: its user chooses; in dice: it has one activation."""

    hidden_units: tuple[int, ...]
    activation: str
    dice: str | None
    fields: dict[str, object]
    softmax: bool | None = None
    batch_norm: bool | None = False
    per_channel: tuple[str, ...] = ()


PRESETS: dict[str, _Preset] = {
    "rechub": _Preset((36,), "dice", "dice_row", {"dropout": 0.0}, batch_norm=True),
    "fuxictr": _Preset(
        (64,),
        "dice",
        "dice_batch",
        {"dice_eps": 1e-9, "dice_momentum": 0.01, "prelu_init": 0.1, "empty": "uniform"},
        batch_norm=None,
        per_channel=("dice_batch", "prelu"),
    ),
    "deepctr": _Preset(
        (80, 40),
        "dice",
        "dice_batch",
        {"dice_eps": 1e-8, "dice_affine": True, "empty": "uniform"},
        per_channel=("dice_batch",),
    ),
    "recbole": _Preset((256, 256, 256), "sigmoid", "silu", {"scale_scores": True, "empty": "nan"}),
    "easyrec": _Preset(
        (32,),
        "relu",
        "dice_batch",
        {"dice_eps": 1e-5, "empty": "uniform"},
        softmax=True,
        batch_norm=None,
        per_channel=("dice_batch",),
    ),
    "recstudio": _Preset(
        (128, 64),
        "dice",
        "dice_batch",
        {"blocks": ("q", "q", "q*k", "q-k"), "dice_eps": 1e-8, "dice_affine": True, "scale_scores": True},
        softmax=False,
        per_channel=("dice_batch",),
    ),
    "rechorus": _Preset((64,), "sigmoid", None, {"scale_scores": True}, softmax=False),
    "paper": _Preset((80, 40), "sigmoid", None, {"scale_scores": True, "empty": "uniform"}, softmax=True),
    "sparrow": _Preset(
        (32,),
        "prelu",
        None,
        {"blocks": ("k-q", "k", "q", "q*k"), "prelu_init": 0.0, "score_activation": "sigmoid"},
        softmax=False,
        per_channel=("prelu",),
    ),
    "blog": _Preset(
        (36,),
        "prelu",
        None,
        {"blocks": ("k", "q", "k-q", "q*k"), "score_activation": "sigmoid", "pooling": "mean_valid"},
        softmax=False,
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
        dropout: the probability that an activation is dropped in this call, the same in all layers; 0 in evaluation.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: nn.modules.batchnorm._BatchNorm | None = None
    gate_norm: nn.modules.batchnorm._BatchNorm | None = None
    slope: Tensor | None = None
    dropout: float = 0.0


class UnitParameters(NamedTuple):
    """All parameters of a unit.

    Attributes:
        hidden: the hidden layers.
        weight, bias: of the last Linear, (1, H) and (1,) or None.
        score_slope: the one element of the PReLU on the score; None for the other score activations.
    """

    hidden: tuple[HiddenLayer, ...]
    weight: Tensor
    bias: Tensor | None = None
    score_slope: Tensor | None = None


def slope_of(layer: HiddenLayer, spec: UnitSpec) -> Tensor | None:
    """The slope of a hidden layer as the kernels take it: that of a leaky ReLU is a constant."""
    if spec.activation == "leaky_relu":
        return layer.weight.new_full((1,), spec.negative_slope)
    return layer.slope

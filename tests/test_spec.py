"""A unit as data: presets are the frameworks' own defaults, and what cannot be built is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from din_fast import UnitSpec, preset


def test_rechub() -> None:
    spec = preset("rechub")
    assert spec.hidden_units == (36,) and spec.blocks == ("q", "k", "q-k", "q*k")
    assert spec.activation == "dice_row" and spec.dice_eps == 1e-3 and not spec.per_channel_slope
    assert spec.batch_norm and spec.dropout == 0.0 and not spec.softmax and spec.empty == "zeros"


def test_fuxictr() -> None:
    spec = preset("fuxictr", softmax=True)
    assert spec.hidden_units == (64,) and spec.activation == "dice_batch"
    assert (spec.dice_eps, spec.dice_momentum, spec.dice_affine) == (1e-9, 0.01, False)
    assert spec.per_channel_slope and not spec.batch_norm and spec.softmax and spec.empty == "uniform"
    prelu = preset("fuxictr", activation="prelu")
    assert prelu.per_channel_slope and prelu.prelu_init == 0.1


def test_deepctr() -> None:
    spec = preset("deepctr")
    assert spec.hidden_units == (80, 40) and spec.activation == "dice_batch"
    assert (spec.dice_eps, spec.dice_momentum, spec.dice_affine) == (1e-8, 0.1, True)
    assert spec.per_channel_slope and not spec.batch_norm and spec.empty == "uniform"
    assert not preset("deepctr", activation="prelu").per_channel_slope


def test_blog() -> None:
    spec = preset("blog")
    assert spec.blocks == ("k", "q", "k-q", "q*k") and spec.activation == "prelu"
    assert spec.score_activation == "sigmoid" and spec.pooling == "mean_valid"


def test_recbole() -> None:
    spec = preset("recbole")
    assert spec.hidden_units == (256, 256, 256) and spec.activation == "sigmoid" and spec.scale_scores
    assert not spec.softmax and spec.empty == "nan" and not spec.batch_norm
    assert preset("recbole", activation="dice").activation == "silu"  # its Dice does not normalise, its alpha is 0


def test_easyrec() -> None:
    spec = preset("easyrec", [32, 8], "dice")
    assert spec.softmax and spec.empty == "uniform" and spec.hidden_bias and spec.activation == "dice_batch"
    assert (spec.dice_eps, spec.dice_momentum, spec.dice_affine) == (1e-5, 0.1, False) and spec.per_channel_slope
    assert preset("easyrec").activation == "relu" and not preset("easyrec", batch_norm=True).hidden_bias
    assert not preset("easyrec", activation="prelu").per_channel_slope


def test_recstudio() -> None:
    spec = preset("recstudio")
    assert spec.blocks == ("q", "q", "q*k", "q-k") and spec.hidden_units == (128, 64) and spec.scale_scores
    assert (spec.activation, spec.dice_eps, spec.dice_affine) == ("dice_batch", 1e-8, True) and not spec.softmax


def test_rechorus_and_the_paper() -> None:
    rechorus, paper = preset("rechorus"), preset("paper")
    assert rechorus.activation == paper.activation == "sigmoid" and rechorus.scale_scores and paper.scale_scores
    assert rechorus.hidden_units == (64,) and not rechorus.softmax
    assert paper.hidden_units == (80, 40) and paper.softmax and paper.empty == "uniform"


def test_sparrow() -> None:
    spec = preset("sparrow")
    assert spec.blocks == ("k-q", "k", "q", "q*k") and spec.hidden_units == (32,)
    assert spec.activation == "prelu" and spec.per_channel_slope and spec.prelu_init == 0
    assert spec.score_activation == "sigmoid" and not spec.softmax


def test_a_spec_is_a_value() -> None:
    units = [8, 4]
    spec = preset("fuxictr", units)
    units.append(2)
    assert spec.hidden_units == (8, 4)
    assert spec == preset("fuxictr", (8, 4)) and hash(spec) == hash(preset("fuxictr", (8, 4)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.softmax = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("hidden_units", (0,), ValueError),
        ("hidden_units", (8, -1), ValueError),
        ("hidden_units", (4, 4, 4, 4), ValueError),
        ("hidden_units", 36, TypeError),
        ("hidden_units", "36", TypeError),
        ("hidden_units", (3.5,), TypeError),
        ("hidden_units", (True,), TypeError),
        ("blocks", (), ValueError),
        ("blocks", ("q", "k+q"), ValueError),
        ("activation", "dice", ValueError),
        ("activation", "swish", ValueError),
        ("score_activation", "tanh", ValueError),
        ("pooling", "max", ValueError),
        ("empty", "ones", ValueError),
        ("batch_stats", "some", ValueError),
        ("dropout", 1.0, ValueError),
        ("dropout", -0.1, ValueError),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_name(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}: expected .* got "):
        UnitSpec(**{name: value})  # type: ignore[arg-type]


def test_softmax_goes_with_plain_scores_only() -> None:
    with pytest.raises(ValueError, match=r"score_activation: expected none together with softmax, got 'sigmoid'"):
        UnitSpec(softmax=True, score_activation="sigmoid")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"framework": "tensorflow"}, "framework: expected one of"),
        ({"framework": "rechub", "activation": "swish"}, "activation: expected one of"),
        ({"framework": "deepctr", "batch_norm": True}, "batch_norm: expected False"),
        ({"framework": "blog", "softmax": True}, "softmax: expected False"),
        ({"framework": "paper", "softmax": False}, "softmax: expected True"),
        ({"framework": "easyrec", "softmax": False}, "softmax: expected True"),
        ({"framework": "blog", "activation": "relu"}, "activation: expected 'prelu', the only one of the preset blog"),
        ({"framework": "rechorus", "activation": "dice"}, "activation: expected 'sigmoid'"),
        ({"framework": "blog", "batch_norm": True}, "batch_norm: expected False"),
        ({"framework": "rechub", "batch_norm": False}, "batch_norm: expected True"),
    ],
    ids=str,
)
def test_a_preset_that_cannot_be_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(**arguments)  # type: ignore[arg-type]

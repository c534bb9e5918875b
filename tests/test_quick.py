"""Scoring without gradient remembers where a unit's tensors are, and nothing that could be stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from din_fast import FusedActivationUnit, functional, preset, quick, reference
from tests.truth import fused_unit, randomise

DIM = 6


def unit_of(name: str = "fuxictr", **options: Any) -> FusedActivationUnit:
    """In evaluation, after a call that found its places."""
    unit = fused_unit(preset(name, [9, 5], **options), DIM, "native").eval()
    assert quickly(unit)
    return unit


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(4, 11, DIM, generator=g).to(dtype), torch.randn(4, DIM, generator=g).to(dtype)


def quickly(unit: FusedActivationUnit, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a call goes the short way; either way it must be right."""
    history, target = inputs(dtype)
    with torch.no_grad(), patch.object(functional, "run", wraps=functional.run) as run:
        found = unit(history, target)
    assert unit.last_backend == "native"
    plain = reference.ActivationUnit(DIM, unit.spec).to(dtype)
    plain.attention = unit.attention
    with torch.no_grad():
        torch.testing.assert_close(found, plain(history, target), rtol=1e-4, atol=1e-4)
    return not run.called


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["rechub", "fuxictr", "deepctr", "recbole"])
def test_every_framework(name: str, dtype: torch.dtype) -> None:
    unit = fused_unit(preset(name, [9, 5]), DIM, "native").eval().to(dtype)
    assert quickly(unit, dtype) and quickly(unit, dtype)


def in_place(unit: Any) -> None:
    unit.attention.mlp[0].weight.data.mul_(2)


def other_parameter(unit: Any) -> None:
    unit.attention.mlp[0].weight = nn.Parameter(torch.randn(9, 4 * DIM))


def loaded(unit: Any) -> None:
    other = copy.deepcopy(unit)
    randomise(other, torch.Generator().manual_seed(9))
    unit.load_state_dict(other.state_dict())


def other_module(unit: Any) -> None:
    unit.attention.mlp[2] = nn.Linear(9, 5)


def other_layers(unit: Any) -> None:
    unit.attention.mlp = copy.deepcopy(unit.attention.mlp)
    in_place(unit)


def other_mlp(unit: Any) -> None:
    unit.attention = copy.deepcopy(unit.attention)
    in_place(unit)


def other_norm(unit: Any) -> None:
    unit.attention.mlp[1].bn = nn.BatchNorm1d(9, eps=0.1, affine=False).eval()


def other_eps(unit: Any) -> None:
    unit.attention.mlp[1].bn.eps = 0.5


def given_a_bias(unit: Any) -> None:
    norm = unit.attention.mlp[1].bn
    norm.weight, norm.bias = nn.Parameter(torch.full((9,), 2.0)), nn.Parameter(torch.ones(9))


def in_float64_and_back(unit: Any) -> None:
    unit.double().float()


CHANGES = [
    in_place,
    other_parameter,
    loaded,
    other_module,
    other_layers,
    other_mlp,
    other_norm,
    other_eps,
    given_a_bias,
    in_float64_and_back,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_call(change: Callable[[Any], None]) -> None:
    unit = unit_of()
    history, target = inputs()
    with torch.no_grad():
        before = unit(history, target)
        change(unit)
        quickly(unit)  # and right
        after = unit(history, target)
    assert torch.equal(before, after) == (change is in_float64_and_back)


def test_training_and_parametrized_weights_go_the_long_way() -> None:
    unit = unit_of()
    history, target = inputs()
    with torch.no_grad(), patch.object(functional, "run", wraps=functional.run) as run:
        unit.train()(history, target)
    assert run.called
    unit = unit_of()
    parametrizations.weight_norm(unit.attention.mlp[0])
    assert not quickly(unit)
    unit = fused_unit(preset("rechub", [9]), DIM, "native").eval()
    assert quickly(unit)
    dropout: Any = next(m for m in unit.modules() if isinstance(m, nn.Dropout))
    dropout.train()
    assert not quickly(unit)


def test_a_tensor_in_two_places_goes_the_long_way() -> None:
    unit: Any = fused_unit(preset("fuxictr", [9, 9]), DIM, "native").eval()
    unit.attention.mlp[3].alpha = unit.attention.mlp[1].alpha
    assert not quickly(unit)


def test_copies_find_their_own_places() -> None:
    unit = unit_of()
    for other in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert other._quick is None
        in_place(unit)
        assert quickly(other) and quickly(unit)


@pytest.mark.parametrize(
    ("history", "target", "message"),
    [
        ((4, 11, DIM + 1), (4, DIM + 1), "emb_dim"),
        ((4, 11, DIM), (3, DIM), "target: expected shape"),
        ((4, 11, DIM), (4, DIM + 1), "target: expected shape"),
    ],
)
def test_bad_input_has_the_long_ways_errors(history: tuple[int, ...], target: tuple[int, ...], message: str) -> None:
    unit = unit_of()
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        unit(torch.zeros(history), torch.zeros(target))


def test_a_weight_of_another_type_or_shape_has_the_long_ways_errors() -> None:
    unit: Any = unit_of()
    history, target = inputs()
    weight = unit.attention.mlp[0].weight
    with torch.no_grad():
        weight.data = weight.data.double()
        with pytest.raises(TypeError, match=r"hidden\[0\]\.weight: expected torch\.float32"):
            unit(history, target)
        weight.data = torch.zeros(9, 3)
        with pytest.raises(ValueError, match=r"hidden\[0\]\.weight: expected shape"):
            unit(history, target)


def test_what_is_not_plain_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    history, target = inputs()
    assert not quick.may_be(history, target, "native")  # gradients are on
    with torch.no_grad():
        assert quick.may_be(history, target, "native") and quick.may_be(history, target, "auto")
        assert not quick.may_be(history, target, "reference")
        assert not quick.may_be(history.bfloat16(), target.bfloat16(), "native")
        assert not quick.may_be(history.transpose(1, 2), target, "native")
        assert not quick.may_be(history[:1].expand(4, -1, -1), target, "native")
        assert not quick.may_be(history[:1], target, "native")
        assert not quick.may_be(history, target.unsqueeze(1), "native")
        assert not quick.may_be(nn.Parameter(history), target, "native")
        with torch.autocast("cpu"):
            assert not quick.may_be(history, target, "native")
        monkeypatch.setenv("DIN_FAST_BACKEND", "reference")
        assert not quick.may_be(history, target, "auto")

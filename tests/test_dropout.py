"""Dropout in the hidden layers: counter-based random numbers that every pass makes again, and nothing stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from din_fast import UnitSpec, preset, reference
from tests.truth import Case, draw, fused_unit, step

SPECS: dict[str, UnitSpec] = {
    "silu": UnitSpec((4, 3), activation="silu", dropout=0.4),
    "norm": UnitSpec((4, 3), activation="tanh", batch_norm=True, dropout=0.3),
    "row-dice": UnitSpec((4,), activation="dice_row", batch_norm=True, softmax=True, dropout=0.2),
    "dice": UnitSpec((4, 3, 2), activation="dice_batch", dice_affine=True, dropout=0.3),
}
P = 0.3


@pytest.mark.parametrize("name", SPECS)
def test_gradcheck_under_a_fixed_seed(name: str, backend: str) -> None:
    unit = fused_unit(SPECS[name], 2, backend).double().train()
    inputs = draw(Case(unit.spec, (3, 4, 2), "mask"), 0, torch.float64)
    names, parameters = zip(*unit.named_parameters(), strict=True)

    def function(history: Tensor, target: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(3)
        out = functional_call(unit, dict(zip(names, values, strict=True)), (history, target, inputs.mask))
        assert isinstance(out, Tensor) and unit.last_backend == backend
        return out

    leaves = [t.detach().clone().requires_grad_() for t in (inputs.history, inputs.target, *parameters)]
    assert torch.autograd.gradcheck(function, leaves)


def test_the_same_seed_the_same_result_and_another_another(backend: str) -> None:
    unit = fused_unit(SPECS["dice"], 4, backend).train()
    inputs = draw(Case(unit.spec, (5, 20, 4)), 0, torch.float32)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out = copy.deepcopy(unit)(inputs.history, inputs.target)
        assert isinstance(out, Tensor)
        return out

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_each_call_drops_others(backend: str) -> None:
    unit = fused_unit(SPECS["silu"], 4, backend).train()
    inputs = draw(Case(unit.spec, (5, 20, 4)), 0, torch.float32)
    assert not torch.equal(unit(inputs.history, inputs.target), unit(inputs.history, inputs.target))


def test_evaluation_drops_nothing(backend: str) -> None:
    spec = preset("fuxictr", [9, 4])
    inputs = draw(Case(spec, (5, 20, 4)), 0, torch.float32)
    with_dropout = UnitSpec(**{**vars(spec), "dropout": 0.5})
    unit, plain = fused_unit(with_dropout, 4, backend).eval(), fused_unit(spec, 4, backend).eval()
    assert torch.equal(unit(inputs.history, inputs.target), plain(inputs.history, inputs.target))
    assert unit.last_backend == backend


def test_p_may_change_and_must_be_one(backend: str) -> None:
    unit = fused_unit(SPECS["dice"], 4, backend).train()
    inputs = draw(Case(unit.spec, (5, 20, 4)), 0, torch.float32)
    modules = [m for m in unit.modules() if isinstance(m, nn.Dropout)]
    for m in modules:
        m.p = 0.0
    assert torch.equal(unit(inputs.history, inputs.target), copy.deepcopy(unit)(inputs.history, inputs.target))
    modules[0].p = 0.5
    with pytest.raises(ValueError, match=r"parameters.hidden: expected one dropout in all layers, got \[0.0, 0.5\]"):
        unit(inputs.history, inputs.target)


# ---- the random numbers


def factors(seed: int, layer: int, rows: int, units: int, p: float = P) -> Tensor:
    return reference.dropout_factors(torch.tensor(seed), layer, torch.arange(rows), units, p)


def assert_fraction(dropped: Tensor, p: float = P) -> None:
    """Within five standard deviations of a binomial's."""
    n = dropped.numel()
    assert abs(float(dropped.double().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5, 2**62 - 1])
def test_the_fraction_is_p_in_all_and_in_each_row_and_unit(seed: int) -> None:
    dropped = factors(seed, 0, 4000, 64) == 0
    assert_fraction(dropped)
    for axis in (0, 1):  # the spread over rows and units is a binomial's as well
        n = dropped.shape[axis]
        fractions = dropped.double().mean(axis)
        expected = (P * (1 - P) / n) ** 0.5
        assert abs(float(fractions.std()) / expected - 1) < 0.5, axis
    kept = factors(seed, 0, 4000, 64)[~dropped]
    assert torch.equal(kept, torch.full_like(kept, 1 / (1 - P)))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("row", "next row"),
        ("unit", "next unit"),
        ("layer", "next layer"),
        ("seed", "next seed"),
        ("seed", "high seed"),
        ("row", "high row"),
    ],
)
def test_neighbours_are_independent(a: str, b: str) -> None:
    first = factors(9, 0, 5000, 48) == 0
    second = {
        "next row": lambda: first.roll(1, 0),
        "next unit": lambda: first.roll(1, 1),
        "next layer": lambda: factors(9, 1, 5000, 48) == 0,
        "next seed": lambda: factors(10, 0, 5000, 48) == 0,
        "high seed": lambda: factors(9 + 2**32, 0, 5000, 48) == 0,
        "high row": lambda: reference.dropout_factors(torch.tensor(9), 0, torch.arange(5000) + 2**32, 48, P) == 0,
    }[b]()
    assert_fraction(first & second, P * P)


def test_what_the_unit_drops_is_p_of_its_hidden_units(backend: str) -> None:
    """With weights of 1, identity and a bias of 1 the score of a position is the number of units kept, over 1 - p."""
    units, batch, length = 50, 20, 100
    spec = UnitSpec((units,), activation="identity", dropout=P, pooling="none")
    unit = fused_unit(spec, 3, backend).double().train()
    with torch.no_grad():
        for p, value in zip(unit.parameters(), (0.0, 1.0, 1.0, 0.0), strict=True):
            p.fill_(value)
    with torch.no_grad():
        kept = unit(torch.randn(batch, length, 3).double(), torch.randn(batch, 3).double()) * (1 - P)
    assert unit.last_backend == backend
    assert torch.allclose(kept, kept.round(), atol=1e-9)
    assert abs(float(kept.mean()) / units - (1 - P)) < 5 * (P * (1 - P) / (units * kept.numel())) ** 0.5
    spread = float(kept.std()) / (units * P * (1 - P)) ** 0.5
    assert abs(spread - 1) < 0.1


def test_threads_and_layout_change_nothing(backend: str, cpu: str, threads: None) -> None:
    unit = fused_unit(SPECS["dice"], 4, backend)
    inputs = draw(Case(unit.spec, (40, 20, 4), "both"), 0, torch.float32)
    runs: list[dict[str, Any]] = []
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(5)
        runs.append(step(copy.deepcopy(unit).train(), inputs))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])

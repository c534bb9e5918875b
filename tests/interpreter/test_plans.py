"""Every plan of din_fast/backends/triton/tiling.py, and TF32, by the rule of tests/truth.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from din_fast import UnitSpec, preset, reference
from din_fast.backends.triton import tiling
from tests import truth
from tests.interpreter.honest import GUARD
from tests.truth import SEEDS, Case, Comparison, assert_near, check_parity, draw, fused_unit, randomise, step


def _random(hidden: tuple[int, ...], **fields: Any) -> UnitSpec:
    return UnitSpec(hidden, batch_stats="valid", dropout=0.3, **fields)


PLANS: dict[str, tuple[UnitSpec, tuple[int, int, int]]] = {
    "f1": (preset("deepctr", [20]), (2, 70, 12)),
    "f2": (preset("fuxictr", [20, 40], softmax=True), (2, 70, 12)),
    "f3": (preset("rechub", [20], softmax=True), (2, 70, 12)),
    "rows": (preset("rechub", [20, 9], softmax=True), (9, 6, 12)),
    "split": (UnitSpec((12,), activation="prelu", pooling="mean_valid"), (2, 150, 12)),
    "split, softmax": (preset("rechub", [12, 5], softmax=True), (2, 150, 12)),
    "split, statistics": (preset("fuxictr", [12], softmax=True), (2, 150, 12)),
}
# With statistics over the valid positions, and dropout.
RANDOM: dict[str, tuple[UnitSpec, tuple[int, int, int]]] = {
    "f1": (_random((20,), activation="dice_batch", pooling="mean_valid"), (2, 70, 12)),
    "f2": (_random((20, 40), activation="tanh", batch_norm=True, softmax=True, empty="uniform"), (2, 70, 12)),
    "f3": (_random((20, 9), batch_norm=True, score_activation="prelu"), (2, 70, 12)),
    "rows": (_random((20, 9, 5), activation="silu", batch_norm=True), (9, 6, 12)),
    "split": (_random((12,), activation="dice_batch", score_activation="prelu"), (2, 150, 12)),
    "split, softmax": (_random((12, 5), activation="leaky_relu", batch_norm=True, softmax=True), (2, 150, 12)),
    "split, weights out": (_random((12,), activation="dice_batch", softmax=True, pooling="none"), (2, 150, 12)),
    "split, scores out": (_random((12,), activation="sigmoid", batch_norm=True, pooling="none"), (2, 150, 12)),
}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tiling.Plan]:
    """The plans that were made."""
    made: list[tiling.Plan] = []
    stock = tiling.plan

    def plan(shape: tiling.Shape, limits: tiling.Limits | None = None) -> tiling.Plan:
        made.append(stock(shape, limits))
        return made[-1]

    monkeypatch.setattr(tiling, "plan", plan)
    return made


@pytest.mark.parametrize(("training", "masking"), [(True, "both"), (False, "none"), (False, "mask")])
@pytest.mark.parametrize("name", PLANS)
def test_every_plan(
    name: str, training: bool, masking: str, plans: list[tiling.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, shape = PLANS[name]
    check_plan(name, Case(spec, shape, masking, training), plans, monkeypatch)


@pytest.mark.parametrize("masking", ["mask", "lengths"])
@pytest.mark.parametrize("name", RANDOM)
def test_every_plan_with_dropout_and_statistics_over_valid_positions(
    name: str, masking: str, plans: list[tiling.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truth, "SEEDS", 3)
    spec, shape = RANDOM[name]
    check_plan(name, Case(spec, shape, masking), plans, monkeypatch)


def check_plan(name: str, case: Case, plans: list[tiling.Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule; and that it was this plan that was held to it."""
    monkeypatch.setattr(tiling, "LONG", 100)  # histories of 150 are long, and cut into one tile a part
    monkeypatch.setattr(tiling, "PART_TILES", 1)
    spec = case.spec
    before = GUARD.launches
    check_parity(case, "triton")
    assert GUARD.launches > before and {p.name for p in plans} == {name.partition(",")[0]}
    kernels = {launch.kernel for launch in GUARD.log[before:]}
    merged = name.startswith("split") and (spec.softmax or spec.pooling != "none")
    assert ("merge_kernel" in kernels) == merged
    assert ("softmax_gradient_kernel" in kernels) == spec.softmax
    assert ("row_kernel" in kernels) == (spec.activation == "dice_row")


@pytest.mark.parametrize("dim", [80, 200])
def test_wide_rows_go_in_slices(dim: int, plans: list[tiling.Plan]) -> None:
    """float32 without the matrix unit, from 64 columns on."""
    for spec in (preset("rechub", [20], softmax=True), preset("fuxictr", [12, 7])):
        check_parity(Case(spec, (1, 10, dim), "lengths", True), "triton")
    assert all(p.forward.wide and p.backward.wide for p in plans)


@pytest.mark.parametrize("softmax", [True, False])
def test_a_history_of_ten_thousand(softmax: bool, plans: list[tiling.Plan]) -> None:
    spec = UnitSpec((4,), activation="relu", softmax=softmax)
    inputs = draw(Case(spec, (1, 10_001, 8)), 0, torch.float32)
    plain = reference.ActivationUnit(8, spec)
    randomise(plain, torch.Generator().manual_seed(0))
    found = step(fused_unit(spec, 8, "triton", like=plain), inputs)
    right = step(copy.deepcopy(plain).double(), inputs.to(torch.float64))
    assert {p.name for p in plans} == {"split"} and plans[0].parts > 10
    for key, tensor in right.items():
        assert_near(key, found[key].double(), tensor, 1e-5 * max(1.0, float(tensor.abs().max())))


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Sets torch's precision of float32 products, for the test."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield lambda value: setattr(settings, "fp32_precision", value)
    settings.fp32_precision = before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["rechub", "fuxictr"])
def test_tf32(name: str, training: bool, precision: Callable[[str], None]) -> None:
    """Products of float32 follow torch's own setting: operands rounded to 11 bits, sums in float32.

    The rule with TF32's unit roundoff, 2^-11; and the results are not those of exact products.
    """
    spec, shape = preset(name, [20, 9]), (4, 16, 12)
    errors = {}
    for value in ("ieee", "tf32"):
        precision(value)
        comparison = Comparison(torch.float32)
        comparison.roundoff = 2.0**-11 if value == "tf32" else comparison.roundoff
        for seed in range(SEEDS):
            inputs = draw(Case(spec, shape, "mask"), seed, torch.float32)
            plain = reference.ActivationUnit(shape[2], spec)
            randomise(plain, torch.Generator().manual_seed(seed))
            plain.train(training)
            fused = fused_unit(spec, shape[2], "triton", like=plain)
            truth = copy.deepcopy(plain).double()
            comparison.add(step(truth, inputs.to(torch.float64)), step(plain, inputs), step(fused, inputs))
        comparison.check()
        errors[value] = comparison.largest["output", "fused"]
    assert errors["tf32"] > 10 * errors["ieee"]

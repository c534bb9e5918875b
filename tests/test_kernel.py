"""Kernels against the float64 reference, by the rule of tests/truth.py: output, every gradient, running statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from din_fast import UnitSpec, preset, reference
from tests.truth import MASKINGS, SPECS, Case, assert_near, cases, check_parity, draw, fused_unit, randomise, step

CASES = cases()
MANY = {
    name: SPECS[name]
    for name in (
        "rechub-two-layers-softmax",
        "fuxictr-two-layers",
        "deepctr-softmax",
        "valid-dice",
        "scores-out",
        "score-prelu",
        "dropout-dice",
    )
}
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_unit(name: str, dtype: torch.dtype, backend: str, cpu: str) -> None:
    check_parity(CASES[name], backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("candidates", [1, 2, 7, 40])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_several_candidates_of_each_user(
    batch: int, candidates: int, training: bool, dtype: torch.dtype, backend: str, cpu: str
) -> None:
    """Whole users to a part of the work, and users that are cut between parts, one after the other."""
    names = list(MANY)
    name = names[(batch + candidates + training) % len(names)]
    length, dim = (33, 10) if batch * candidates < 100 else (9, 6)
    masking = MASKINGS[(batch + candidates // 2) % len(MASKINGS)]
    case = Case(MANY[name], (batch, length, dim), masking, training, candidates=candidates)
    check_parity(case, backend, dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hidden", [(1,), (3,), (17,), (36,), (50,), (1, 1), (40, 17), (5, 50, 3), ()], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 5, 7, 10, 36])
def test_sizes_that_are_no_multiple_of_anything(
    dim: int, hidden: tuple[int, ...], training: bool, backend: str, cpu: str
) -> None:
    frameworks = ("rechub", "fuxictr", "deepctr")
    spec = preset(frameworks[(dim + len(hidden) + sum(hidden)) % 3], hidden, softmax=dim % 2 == 0)
    check_parity(Case(spec, (3, 11, dim), "both", training), backend, torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 191, 192, 193, 400])
def test_lengths_around_the_blocks(length: int, training: bool, backend: str, cpu: str) -> None:
    check_parity(Case(preset("fuxictr", [12, 5]), (3, length, 6), "lengths", training), backend, torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["rechub-two-layers-softmax", "fuxictr", "blog"])
def test_long_histories(name: str, training: bool, backend: str) -> None:
    check_parity(Case(SPECS[name], (2, 1000, 8), "lengths", training), backend)


@pytest.mark.parametrize("training", [True, False])
def test_more_samples_than_partials(training: bool, backend: str) -> None:
    check_parity(Case(preset("fuxictr", [10, 6]), (300, 3, 4), "mask", training), backend)


@pytest.mark.parametrize("framework", ["rechub", "fuxictr", "deepctr"])
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (0, 0, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
def test_no_positions_at_all(
    framework: str, shape: tuple[int, int, int], training: bool, softmax: bool, backend: str
) -> None:
    """B = 0 and L = 0 give zeros and zero gradients, and leave the running mean and variance alone."""
    case = Case(preset(framework, [6, 3], softmax=softmax), shape, "both", training)
    unit = fused_unit(case.spec, 4, backend).train(training)
    before = {name: b.clone() for name, b in unit.named_buffers()}
    found = step(unit, draw(case, 0, torch.float32))
    assert found["output"].shape == (shape[0], 4)
    for name, tensor in found.items():
        right = before[name] if "running" in name else torch.zeros_like(tensor)
        assert torch.equal(tensor, right), name


@pytest.mark.parametrize("name", ["rechub", "fuxictr-softmax", "deepctr-softmax", "blog", "mean-over-valid"])
@pytest.mark.parametrize("training", [True, False])
def test_every_history_empty(name: str, training: bool, backend: str) -> None:
    """Zeros, or under softmax the presets' uniform mean: by the rule, since those have gradients to their pads."""
    case = Case(SPECS[name], (4, 5, 6), training=training)
    inputs = replace(draw(case, 0, torch.float64), lengths=torch.zeros(4, dtype=torch.int64))
    plain = reference.ActivationUnit(6, case.spec).double().train(training)
    randomise(plain, torch.Generator().manual_seed(0))
    fused = fused_unit(case.spec, 6, backend, like=plain)
    found = step(fused, inputs)
    for key, right in step(plain, inputs).items():
        assert_near(key, found[key], right, 1e-12)
    if case.spec.empty == "zeros":
        assert not found["output"].any() and not found["grad history"].any()


def test_softmax_over_nothing_can_be_nan(backend: str) -> None:
    """RecBole's rule: NaN for the history without a valid position, nothing unusual for its neighbours."""
    spec = UnitSpec((5,), activation="relu", softmax=True, empty="nan")
    inputs = replace(draw(Case(spec, (3, 6, 4)), 0, torch.float32), lengths=torch.tensor([6, 2, 0]))
    plain = reference.ActivationUnit(4, spec).eval()
    fused = fused_unit(spec, 4, backend, like=plain)
    out = fused(inputs.history, inputs.target, lengths=inputs.lengths)
    assert fused.last_backend == backend
    assert out[-1].isnan().all()
    torch.testing.assert_close(out[:-1], plain(inputs.history, inputs.target, inputs.valid)[:-1])


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 4), (2, 1, 4), (1, 30, 4)], ids=str)
@pytest.mark.parametrize("name", ["rechub", "fuxictr", "row-dice-without-norm", "blog"])
def test_one_sample_and_one_position(name: str, shape: tuple[int, int, int], backend: str) -> None:
    for training in (True, False):
        if shape[0] * shape[1] > 1 or not training or name in ("row-dice-without-norm", "blog"):
            check_parity(Case(SPECS[name], shape, "none", training), backend, torch.float64)


def test_scores_large_enough_to_overflow_exp(backend: str) -> None:
    """Softmax subtracts the maximum: scores of several hundreds are ordinary."""
    case = Case(preset("rechub", [8], "identity", softmax=True), (4, 20, 6), "mask", training=False, scale=30.0)
    check_parity(case, backend, torch.float64)
    unit = fused_unit(case.spec, 6, backend).eval()
    inputs = draw(case, 0, torch.float32)
    assert unit(100 * inputs.history, inputs.target, mask=inputs.mask).isfinite().all()


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "silu", "dice"])
def test_activations_where_exp_overflows(activation: str, backend: str, cpu: str) -> None:
    """A z beyond what exp holds saturates the activation, as in torch, up to the largest numbers of the type."""
    largest = [s * z for z in (80.0, 130.0, 1e5, 1e30, 3e38) for s in (1, -1)]
    spec = preset("fuxictr", [len(largest)], activation)
    unit = fused_unit(spec, 6, backend).eval()
    plain = reference.ActivationUnit(6, spec)
    plain.load_state_dict(unit.state_dict())
    with torch.no_grad():
        for module in (unit, plain):
            mlp: Any = module.attention.mlp
            mlp[0].bias.copy_(torch.tensor(largest))
            mlp[-1].weight.copy_(torch.tensor(largest).reciprocal())
        inputs = draw(Case(spec, (3, 20, 6), "none", training=False), 0, torch.float32)
        right = plain.eval()(inputs.history, inputs.target)
        found = unit(inputs.history, inputs.target)
    assert unit.last_backend == backend
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rechub-two-layers-softmax", "fuxictr-two-layers", "deepctr-softmax"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(40, 50, 16), (3, 700, 9)], ids=str)
def test_same_bits_with_one_and_two_threads_and_from_run_to_run(
    name: str, training: bool, shape: tuple[int, int, int], backend: str, cpu: str, threads: None
) -> None:
    case = Case(SPECS[name], shape, "both", training)
    inputs = draw(case, 0, torch.float32)
    runs = []
    for count in (1, 2, 2, 3, 1):
        torch.set_num_threads(count)
        runs.append(step(fused_unit(case.spec, shape[2], backend).train(training), inputs))
    for key, first in runs[0].items():
        assert all(torch.equal(first, run[key]) for run in runs[1:]), key


def test_instruction_sets_are_chosen_by_name(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, inputs = fused_unit(SPECS["rechub"], 10, backend), draw(Case(SPECS["rechub"]), 0, torch.float32)
    monkeypatch.setenv("DIN_FAST_CPU", "sse9")
    with pytest.raises((ValueError, RuntimeError), match=r"DIN_FAST_CPU.*sse9"):
        unit(inputs.history, inputs.target)

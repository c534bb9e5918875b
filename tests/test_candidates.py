"""Several candidates for one history: read once, never expanded; every way to say it gives the same."""

from __future__ import annotations

from math import isnan

import pytest
import torch
from torch import Tensor

import din_fast
from bench import cases, memory
from bench.contenders import CANDIDATES, OURS
from din_fast import preset
from tests.truth import MASKINGS, Case, assert_near, draw, fused_unit

D, L = 6, 19
SPEC = preset("fuxictr", [9, 4], softmax=True)


def gradients(out: Tensor, history: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    d_history, d_target = torch.autograd.grad(out.square().sum(), [history, target])
    return d_history, d_target


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("candidates", [1, 5, 70])
def test_one_history_said_in_three_ways(candidates: int, training: bool, any_backend: str) -> None:
    """(1, L, D) with (M, D), with (1, M, D), and expanded to (M, L, D): the same result, the same gradients."""
    history = torch.randn(1, L, D, dtype=torch.float64, requires_grad=True)
    target = torch.randn(candidates, D, dtype=torch.float64, requires_grad=True)
    results = []
    for how in ("as many targets", "three dimensions", "expanded"):
        unit = fused_unit(SPEC, D, any_backend).double().train(training)
        if how == "three dimensions":
            out = unit(history, target.unsqueeze(0)).squeeze(0)
        else:
            out = unit(history.expand(candidates, -1, -1) if how == "expanded" else history, target)
        assert unit.last_backend == any_backend and out.shape == (candidates, D)
        results.append((out, *gradients(out, history, target)))
    for found in results[1:]:
        for name, a, b in zip(("output", "d history", "d target"), results[0], found, strict=True):
            assert_near(name, b, a, 1e-12)


@pytest.mark.parametrize("masking", MASKINGS)
def test_masks_and_lengths_are_the_users(masking: str, any_backend: str) -> None:
    inputs = draw(Case(SPEC, (4, L, D), masking, candidates=3), 0, torch.float64)
    unit = fused_unit(SPEC, D, any_backend).double().eval()
    out = unit(inputs.history, inputs.target, inputs.mask, inputs.lengths)
    assert unit.last_backend == any_backend
    for m in range(3):
        assert_near("", out[:, m], unit(inputs.history, inputs.target[:, m], inputs.mask, inputs.lengths), 1e-13)


def test_an_expanded_history_with_an_expanded_mask_is_shared(backend: str) -> None:
    inputs = draw(Case(SPEC, (1, L, D), "both"), 3, torch.float64)
    assert inputs.mask is not None and inputs.lengths is not None
    target = torch.randn(7, D, dtype=torch.float64)
    unit = fused_unit(SPEC, D, backend).double().eval()
    shared = unit(inputs.history.expand(7, -1, -1), target, inputs.mask.expand(7, -1), lengths=inputs.lengths.expand(7))
    right = unit(inputs.history.repeat(7, 1, 1), target, inputs.mask.repeat(7, 1), lengths=inputs.lengths.repeat(7))
    assert_near("", shared, right, 1e-13)


def test_the_weights_come_out_for_each_candidate(any_backend: str) -> None:
    spec = din_fast.UnitSpec((8,), activation="silu", pooling="none", softmax=True)
    unit = fused_unit(spec, D, any_backend).eval()
    history, target = torch.randn(3, L, D), torch.randn(3, 4, D)
    weights = unit(history, target)
    assert weights.shape == (3, 4, L) and unit.last_backend == any_backend
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))


def test_users_without_a_candidate(any_backend: str) -> None:
    unit = fused_unit(SPEC, D, any_backend).eval()
    history = torch.randn(3, L, D, requires_grad=True)
    target = torch.randn(3, 0, D, requires_grad=True)
    out = unit(history, target)
    assert out.shape == (3, 0, D) and unit.last_backend == any_backend
    d_history, d_target = gradients(out, history, target)
    assert d_history.shape == history.shape and not d_history.any() and d_target.shape == (3, 0, D)


@pytest.mark.parametrize(("batch", "candidates"), [(1, 50), (3, 33), (40, 3)])
def test_same_bits_with_any_number_of_threads(
    batch: int, candidates: int, backend: str, cpu: str, threads: None
) -> None:
    inputs = draw(Case(SPEC, (batch, L, D), "mask", candidates=candidates), 0, torch.float32)
    runs = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        unit = fused_unit(SPEC, D, backend).train()
        history, target = inputs.history.clone().requires_grad_(), inputs.target.clone().requires_grad_()
        out = unit(history, target, inputs.mask)
        out.backward(inputs.upstream)
        assert history.grad is not None and target.grad is not None
        runs.append([out, history.grad, target.grad, *(p.grad for p in unit.parameters())])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_scoring_512_candidates_takes_no_memory_to_speak_of() -> None:
    """At most 5 MB beyond inputs and output, the 2 MB of weights included, where plain PyTorch takes over 1 GB."""
    grown = memory.megabytes(cases.SERVE, CANDIDATES, [OURS], ["native"], threads=2)[OURS]
    if isnan(grown):
        pytest.skip("the peak of a process's memory is told by Linux's /proc only")
    assert grown <= 5

"""bfloat16 and float16 on the CPU: stored as they are, all arithmetic in float32; and autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from din_fast import FusedActivationUnit, HiddenLayer, UnitParameters, UnitSpec, activation_unit, preset
from tests.truth import SPECS, Case, cases, check_parity, draw, fused_unit, step

HALF = [torch.bfloat16, torch.float16]
CASES = cases()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_unit(name: str, dtype: torch.dtype, backend: str) -> None:
    check_parity(CASES[name], backend, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["rechub-two-layers-softmax", "valid-dice", "dropout-dice"])
def test_several_candidates(name: str, training: bool, dtype: torch.dtype, backend: str, cpu: str) -> None:
    check_parity(Case(SPECS[name], (3, 21, 10), "both", training, candidates=9), backend, dtype)


def sum_of_rows(history: Tensor, backend: str) -> Tensor:
    """The plain sum of the histories, through a unit whose every weight is 1."""
    dim = history.shape[-1]
    parameters = UnitParameters((), torch.zeros(1, 4 * dim), torch.ones(1))
    spec = UnitSpec((), activation="identity")
    query = torch.zeros(history.shape[0], dim, dtype=history.dtype)
    return activation_unit(query=query, history=history, parameters=parameters, spec=spec, backend=backend)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number_is_read_and_written_exactly(dtype: torch.dtype, backend: str, cpu: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1, 64)
    found = sum_of_rows(every, backend)
    expected = torch.where(every.isfinite(), every, torch.nan).squeeze(
        1
    )  # the zero weights of the score see it as well
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype, backend: str, cpu: str) -> None:
    bits = torch.randint(-(2**15), 2**15, (2, 2000, 33), dtype=torch.int16).view(dtype)
    bits = torch.where(bits.isfinite(), bits, 0)
    pairs = torch.cat([bits, torch.stack([bits[0], bits[0] * 1e-3])], dim=1).transpose(0, 1)
    exact = pairs[:, 0].float() + pairs[:, 1].float()
    assert torch.equal(sum_of_rows(pairs, backend), exact.to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_float32_parameters_go_with_half_histories(training: bool, dtype: torch.dtype, backend: str) -> None:
    unit = fused_unit(preset("fuxictr", [9, 4]), 6, backend).train(training)
    inputs = draw(Case(unit.spec, (5, 12, 6), "mask"), 0, torch.float32).to(dtype)
    rounded = copy.deepcopy(unit)
    found, right = step(unit, inputs), step(rounded, inputs.to(torch.float32))
    assert found["output"].dtype == dtype and found["grad attention.mlp.0.weight"].dtype == torch.float32
    u = torch.finfo(dtype).eps
    for name, tensor in right.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=u, atol=u * float(tensor.abs().max()))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_autocast_casts_the_inputs_and_nothing_else(training: bool, dtype: torch.dtype, backend: str) -> None:
    """The same as casting query and history by hand; parameters, statistics and their gradients stay float32."""
    unit = fused_unit(preset("deepctr", [9, 4], softmax=True), 6, backend).train(training)
    inputs = draw(Case(unit.spec, (5, 12, 6), "both"), 0, torch.float32)
    by_hand = copy.deepcopy(unit)
    history, target = inputs.history.requires_grad_(), inputs.target.requires_grad_()
    with torch.autocast("cpu", dtype):
        out = unit(history, target, inputs.mask, inputs.lengths)
    out.backward(inputs.upstream.to(dtype))
    right = step(by_hand, inputs.to(dtype))
    assert unit.last_backend == backend and out.dtype == dtype
    assert torch.equal(out, right["output"])
    assert history.grad is not None and history.grad.dtype == torch.float32
    assert torch.equal(history.grad, right["grad history"].float())
    for name, p in unit.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        assert torch.equal(p.grad, right[f"grad {name}"]), name
    for name, b in unit.named_buffers():
        if "running" in name:
            assert b.dtype == torch.float32 and torch.equal(b, right[name])


def test_autocast_leaves_float64_alone(backend: str) -> None:
    unit = FusedActivationUnit(4, [3], backend=backend).double()
    with torch.autocast("cpu", torch.bfloat16):
        out = unit(torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64))
    assert out.dtype == torch.float64 and unit.last_backend == backend


def test_autocast_of_the_reference() -> None:
    unit = fused_unit(preset("fuxictr", [9]), 6, "reference").eval()
    inputs = draw(Case(unit.spec, (5, 12, 6)), 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = unit(inputs.history, inputs.target)
    assert out.dtype == torch.bfloat16 and unit.last_backend == "reference"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_history_is_not_copied(dtype: torch.dtype, backend: str) -> None:
    """A half history behind strides is read where it lies; its gradient has its dtype."""
    hidden = HiddenLayer(torch.randn(3, 16))
    parameters = UnitParameters((hidden,), torch.randn(1, 3))
    everything = torch.randn(4, 2, 9, 4).to(dtype).requires_grad_()
    query = torch.randn(4, 4).to(dtype)
    spec = UnitSpec((3,), activation="silu")
    out = activation_unit(query=query, history=everything[:, 1], parameters=parameters, spec=spec, backend=backend)
    copied = activation_unit(
        query=query, history=everything[:, 1].contiguous(), parameters=parameters, spec=spec, backend=backend
    )
    assert torch.equal(out, copied)
    out.sum().backward()
    assert everything.grad is not None and everything.grad.dtype == dtype and not everything.grad[:, 0].any()

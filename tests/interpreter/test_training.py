"""A whole DIN, torch-rechub's, trained on Triton's kernels, by DIN_FAST_BACKEND alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch_rechub.models.ranking import DIN

from tests import test_model
from tests.interpreter.honest import GUARD
from tests.test_model import ATTENTION, batches, host, swapped, which

STEPS = 20


def losses(model: DIN) -> list[float]:
    """Of 20 steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    dtype = next(model.parameters()).dtype
    found = []
    for x, clicks in batches(STEPS):
        loss = F.binary_cross_entropy(model(x), clicks.to(dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("attention", ATTENTION, ids=str)
def test_twenty_steps_have_the_losses_of_the_reference(
    attention: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host in float64 is the truth: our float32 losses are no further from it than twice the host's own."""
    monkeypatch.setenv("DIN_FAST_BACKEND", "triton")
    monkeypatch.setattr(test_model, "BATCH", 8)
    monkeypatch.setattr(test_model, "LENGTH", 7)
    plain = host(attention, torch.float32)
    truth, fused = copy.deepcopy(plain).double(), swapped(plain, attention, "auto")
    before = GUARD.launches
    right, own, found = losses(truth), losses(plain), losses(fused)
    assert which(fused) == ["triton", "triton"] and GUARD.launches >= before + 2 * 3 * STEPS
    assert right[0] != right[-1]
    error, allowed = (max(abs(a - b) for a, b in zip(x, right, strict=True)) for x in (found, own))
    assert error <= 2 * allowed + 32 * 2.0**-24, (found, own, right)

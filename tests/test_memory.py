"""Peak memory of a training step, each in a process of its own (VmHWM, which only ever grows)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import sys
import torch
from din_fast import FusedActivationUnit, preset

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))

def step(unit, batch, length):
    history = torch.randn(batch, length, 64, requires_grad=True)
    target = torch.randn(batch, 64, requires_grad=True)
    lengths = torch.randint(1, length + 1, (batch,))
    before = peak()
    unit(history, target, lengths=lengths).sum().backward()
    return peak() - before

backend, framework = sys.argv[1:]
torch.set_num_threads(2)
unit = FusedActivationUnit(64, spec=preset(framework, [80, 40]), backend=backend)
step(unit, 4, 4)  # libraries, thread pools
print(unit.last_backend, step(unit, 512, 100))
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")


def growth(backend: str, framework: str) -> float:
    """MB that one step at (512, 100, 64, [80, 40]) adds to the peak of its process."""
    run = subprocess.run([sys.executable, "-c", STEP, backend, framework], capture_output=True, text=True, check=True)
    ran, kilobytes = run.stdout.split()
    assert ran == backend
    return int(kilobytes) / 1024


@pytest.mark.parametrize("framework", ["rechub", "fuxictr"])
def test_a_training_step_keeps_z_of_the_normalised_layers_and_nothing_of_4_d(framework: str, backend: str) -> None:
    """Less than half of what plain PyTorch needs, and little beyond z, the gradient of the history and scratch."""
    positions, kept, gradient = 512 * 100, 80 + 40, 64
    plain, fused = growth("reference", framework), growth(backend, framework)
    assert fused < plain / 2, f"{fused:.0f} MB against {plain:.0f} MB"
    assert fused < 1.5 * positions * (kept + gradient) * 4 / 2**20 + 8, f"{fused:.0f} MB"

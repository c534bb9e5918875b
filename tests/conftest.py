"""Fixtures: which backend, which instruction set.

A backend that cannot run here fails its tests; nothing is skipped for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import din_fast  # noqa: F401  (loads the library that torch.ops.din_fast names)

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processor: one thread each, but where a test asks for more
    torch.set_num_threads(1)


def instruction_sets() -> list[str]:
    """Those of the kernel's instruction sets that this processor has."""
    try:
        return list(torch.ops.din_fast.instruction_sets().split(","))
    except AttributeError:  # the library is not built: let the tests run, and fail
        return ["portable"]


# Triton's interpreter has to be asked for before triton is imported: its tests are a process of their own.
KERNELS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["native"]


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every kernel; a test that uses it must see that this backend ran."""
    return str(request.param)


@pytest.fixture(params=[*KERNELS, "reference"])
def any_backend(request: pytest.FixtureRequest) -> str:
    """Every kernel and the reference, where the behaviour itself is the subject."""
    return str(request.param)


@pytest.fixture(params=instruction_sets())
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that the processor has, forced."""
    monkeypatch.setenv("DIN_FAST_CPU", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the caller's shell decides a test."""
    monkeypatch.delenv("DIN_FAST_BACKEND", raising=False)
    monkeypatch.delenv("DIN_FAST_CPU", raising=False)
    monkeypatch.delenv("DIN_FAST_TUNE_CACHE", raising=False)


@pytest.fixture(autouse=True)
def _seed(_environment: None) -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of torch's threads back as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

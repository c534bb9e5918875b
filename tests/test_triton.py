"""The Triton backend from outside: when it can run, what is told where it cannot, and the fast sigmoid's error.

Its kernels are tested in tests/interpreter, in a process of their own.
"""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from din_fast import FusedActivationUnit, dispatch, info, ops, preset, reference
from din_fast.backends import triton
from din_fast.backends.triton.tiling import Limits
from tests.truth import SEEDS, Case, Comparison, draw, randomise, step

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def history(dtype: torch.dtype = torch.float32, dim: int = 8) -> Any:
    """What dispatch looks at, of a tensor on a GPU that is not there."""
    return SimpleNamespace(device=CUDA, dtype=dtype, shape=(2, 3, dim))


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("version", ["3.7.1", "3.8.0", "3.9.0", "3.10.0", "4.0"])
def test_cuda_takes_it_by_default(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "version", lambda: version)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.choose("auto", history(dtype), (80, 40)) == "triton"
    assert dispatch.choose("triton", history(), (80, 40)) == "triton"


@pytest.mark.parametrize(
    ("version", "told"),
    [(None, "not installed"), ("3.6.0", "3.6.0 is too old: expected 3.7.1"), ("3.7.0", "3.7.0 is too old")],
)
def test_without_a_fit_triton_auto_takes_the_reference_and_says_so_once(
    version: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "version", lambda: version)
    monkeypatch.setattr(dispatch, "_told", set())
    with pytest.warns(RuntimeWarning, match=rf"reference: triton .*{told}"):
        assert dispatch.choose("auto", history()) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("auto", history()) == "reference"
    with pytest.raises(RuntimeError, match=rf"backend 'triton' cannot run: triton .*{told}"):
        dispatch.choose("triton", history())
    lines = [line for line in info.report().splitlines() if "triton on cpu" in line]
    assert len(lines) == 1 and told in lines[0]


def test_on_a_cpu_it_needs_the_interpreter() -> None:
    unit = FusedActivationUnit(4, [3], backend="triton")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run: .*TRITON_INTERPRET=1"):
        unit(torch.randn(2, 3, 4), torch.randn(2, 4))


def test_on_a_cpu_with_the_interpreter_it_is_there_but_not_the_default(interpreting: None) -> None:
    assert triton.why_not(CPU) is None
    assert dispatch.choose("auto", torch.randn(2, 3, 4)) == "native"
    assert dispatch.choose("triton", torch.randn(2, 3, 4)) == "triton"


@pytest.mark.parametrize(
    ("tensor", "hidden", "error", "told"),
    [
        (history(torch.float64), (80,), TypeError, "expected float32, bfloat16 or float16 on the triton backend"),
        (history(dim=513), (80,), ValueError, "dim of at most 512 on the triton backend, got 513"),
        (history(), (2000,), ValueError, "at most 1024 in layer 0 on the triton backend, got 2000"),
    ],
)
def test_inputs_that_it_does_not_have(
    tensor: Any, hidden: tuple[int, ...], error: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named, it raises; by default the reference runs, with a warning."""
    monkeypatch.setattr(dispatch, "_told", set())
    with pytest.raises(error, match=told):
        dispatch.choose("triton", tensor, hidden)
    with pytest.warns(RuntimeWarning, match=told):
        assert dispatch.choose("auto", tensor, hidden) == "reference"


def test_the_schemas_are_the_native_ones() -> None:
    for name in ops.SCHEMAS:
        found, native = (str(ops.op(backend, name)._schema) for backend in ("triton", "native"))
        assert found.partition("(")[2] == native.partition("(")[2], name


# ---- the fast sigmoid, which no interpreter runs: one tanh instruction, its relative error up to 2^-11


class FastSigmoid(torch.autograd.Function):
    """0.5 tanh(x / 2) + 0.5 with the worst error of the instruction, of either sign; the gradient from its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        error = 1 + 2.0**-11 * torch.where(torch.arange(x.numel()).view(x.shape) * 7919 % 13 < 6, 1.0, -1.0)
        p = 0.5 * torch.tanh(0.5 * x) * error.to(x.dtype) + 0.5
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return grads[0] * p * (1 - p)


def rounded(found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) for name, t in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["rechub", "fuxictr", "deepctr"])
def test_the_error_of_the_fast_sigmoid_is_within_the_rule(
    name: str, training: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arithmetic in float32 on inputs and parameters of the half type, as in the kernels."""
    spec = preset(name, [20, 9])
    comparison = Comparison(dtype)
    exact = torch.sigmoid
    for seed in range(SEEDS):
        inputs = draw(Case(spec, (4, 20, 8), "mask"), seed, torch.float32).to(dtype)
        plain = reference.ActivationUnit(8, spec)
        randomise(plain, torch.Generator().manual_seed(seed))
        plain = plain.to(dtype).train(training)
        truth, fast = copy.deepcopy(plain).double(), copy.deepcopy(plain).float()
        right, own = step(truth, inputs.to(torch.float64)), step(plain, inputs)
        monkeypatch.setattr(torch, "sigmoid", FastSigmoid.apply)
        found = step(fast, inputs.to(torch.float32))
        monkeypatch.setattr(torch, "sigmoid", exact)
        comparison.add(right, own, rounded(found, dtype))
    comparison.check()


@pytest.mark.parametrize(
    ("capability", "shared", "hip", "limit", "matrix", "chip"),
    [
        ((7, 5), 65536, None, 65536, False, "sm_75"),
        ((8, 0), 166912, None, 166912, True, "sm_80"),
        ((12, 0), 101376, None, 101376, True, "sm_120"),
        ((9, 4), None, "6.4", 65536, True, "gfx942"),
    ],
)
def test_what_tiling_is_told_of_a_device(
    capability: tuple[int, int],
    shared: int | None,
    hip: str | None,
    limit: int,
    matrix: bool,
    chip: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A T4, an A100, a 5090, an MI300: for the last, torch has no number."""
    from din_fast.backends.triton import operands

    properties = SimpleNamespace(shared_memory_per_block_optin=shared, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert operands.device_limits(CUDA) == Limits(limit, chip)
    assert operands.has_matrix_unit(CUDA) == matrix

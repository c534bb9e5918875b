"""Device functions on their own: dropout's random numbers, bit by bit, tanh relative to itself; and the numberings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from din_fast import reference, spec
from din_fast.backends.triton import arithmetic
from din_fast.backends.triton.arithmetic import dropout_factors, dropout_rows, tanh

jit: Callable[[Callable[..., None]], Any] = triton.jit


@jit
def factors_kernel(  # type: ignore[no-untyped-def]
    seed_ptr, first_ptr, out_ptr, below, factor, LAYER: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    random = (seed_ptr, below, factor, tl.load(first_ptr))
    pos, h = tl.arange(0, ROWS), tl.arange(0, UNITS)
    found = dropout_factors(random, dropout_rows(random, pos, LAYER, True), h)
    tl.store(out_ptr + pos[:, None] * UNITS + h[None, :], found)


@jit
def tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tanh(tl.load(x_ptr + i)))


@pytest.mark.parametrize("p", [2.0**-32, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 5, 2**62 - 1, -1, -(2**63)])
def test_dropout_is_that_of_the_reference(seed: int, p: float) -> None:
    """Rows beyond 2^32 too, and every bit of the seed."""
    for layer, first in ((0, 0), (1, 2**32 - 3), (2, 5 * 2**40)):
        out, at = torch.empty(16, 32), torch.tensor(seed)
        factors_kernel[(1,)](at, torch.tensor(first), out, int(p * 2**32), 1 / (1 - p), LAYER=layer, ROWS=16, UNITS=32)
        assert torch.equal(out, reference.dropout_factors(at, layer, first + torch.arange(16), 32, p).float())


def test_dropout_drops_as_many_as_it_should() -> None:
    out = torch.empty(256, 256)
    factors_kernel[(1,)](torch.tensor(11), torch.tensor(0), out, int(0.3 * 2**32), 2.0, LAYER=0, ROWS=256, UNITS=256)
    dropped = out == 0
    assert abs(dropped.float().mean() - 0.3) < 4 * (0.21 / 2**16) ** 0.5
    for side in (dropped.float().mean(0), dropped.float().mean(1)):
        assert (side - 0.3).abs().max() < 5 * (0.21 / 2**8) ** 0.5


def test_tanh_is_precise_relative_to_itself() -> None:
    """Where it is small, where the polynomial ends, and where exp overflows."""
    x = torch.cat([torch.logspace(-30, 2.5, 1000), torch.linspace(0.62, 0.63, 24)])
    x = torch.cat([x, -x])
    y = torch.empty_like(x)
    tanh_kernel[(1,)](x, y, N=2048)
    right = x.double().tanh()
    assert ((y - right) / right).abs().max() < 4 * 2.0**-24
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38, -3e38])
    found = torch.empty_like(special)
    tanh_kernel[(1,)](special, found, N=8)
    torch.testing.assert_close(found, special.tanh(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("", spec.KERNEL_ACTIVATIONS),
        ("score_", spec.SCORE_ACTIVATIONS),
        ("pool_", spec.POOLINGS),
        ("empty_", spec.EMPTY_RULES),
    ],
)
def test_the_numberings_are_those_of_the_spec(prefix: str, names: tuple[str, ...]) -> None:
    assert [getattr(arithmetic, f"{prefix}{n}".upper()).value for n in names] == list(range(len(names)))

"""The two exact rewritings: the first layer's fold, and BatchNorm and gate as affine maps whose statistics respond."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from din_fast import HiddenLayer, fold, reference
from din_fast.spec import BLOCKS, batch_mode
from tests.truth import assert_near

ORDERS = [
    ("q", "k", "q-k", "q*k"),  # torch-rechub, DeepCTR-Torch, FuxiCTR
    ("k", "q", "k-q", "q*k"),  # the blog's
    ("k-q", "k", "q", "q*k"),  # SparrowRecSys
    ("q", "q", "q*k", "q-k"),  # RecStudio: no raw history
    ("k", "q*k", "q"),  # three blocks
    ("q*k",),
    ("q-k", "k-q"),
]


@pytest.mark.parametrize("blocks", [*ORDERS, *itertools.permutations(BLOCKS, 2)], ids=str)
def test_first_layer_folds_whatever_the_block_order(blocks: tuple[str, ...]) -> None:
    b, length, d, h = 3, 4, 5, 6
    weight = torch.randn(h, len(blocks) * d, dtype=torch.float64, requires_grad=True)
    q = torch.randn(b, d, dtype=torch.float64, requires_grad=True)
    k = torch.randn(b, length, d, dtype=torch.float64, requires_grad=True)
    plain = reference.features(q, k, blocks) @ weight.T
    a_q, a_k, a_p = fold.fold_first_layer(weight, blocks)
    folded = (q @ a_q.T)[:, None] + k @ a_k.T + (q[:, None] * k) @ a_p.T
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-13)
    upstream = torch.randn_like(plain)
    for right, found in zip(
        torch.autograd.grad(plain, (weight, q, k), upstream),
        torch.autograd.grad(folded, (weight, q, k), upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_fold_is_contiguous_and_at_least_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        parts = fold.fold_first_layer(torch.randn(3, 8).to(dtype), ("q", "k", "q-k", "q*k"))
        assert all(p.shape == (3, 2) and p.is_contiguous() for p in parts)
        assert {p.dtype for p in parts} == {torch.promote_types(dtype, torch.float32)}


H, ROWS = 5, 12
KINDS = ["none", "batch", "batch-without-affine", "frozen", "frozen-without-affine", "untracked"]


def norm_of(kind: str) -> nn.BatchNorm1d | None:
    """A BatchNorm over H units with nothing trivial in it; None, or one in batch mode, frozen, or without buffers."""
    if kind == "none":
        return None
    norm = nn.BatchNorm1d(
        H, eps=0.3, affine="without" not in kind, track_running_stats=kind != "untracked", dtype=torch.float64
    )
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(1 + torch.randn_like(p))
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return norm.train(kind.startswith("batch"))


def objective(n: Tensor, x: Tensor | None) -> Tensor:
    """Some function of both, with a different gradient everywhere."""
    g = torch.Generator().manual_seed(1)
    a, b, c = torch.randn(3, ROWS, H, generator=g, dtype=torch.float64)
    value = (a * torch.sin(n)).sum()
    return value if x is None else value + (b * torch.cos(x) + c * n * x).sum()


@pytest.mark.parametrize("gate_kind", KINDS)
@pytest.mark.parametrize("norm_kind", KINDS)
def test_affine_maps_and_their_response_are_those_of_autograd(norm_kind: str, gate_kind: str) -> None:
    norm, gate = norm_of(norm_kind), norm_of(gate_kind)
    parameters = [p for m in (norm, gate) if m is not None for p in m.parameters()]
    z = torch.randn(ROWS, H, dtype=torch.float64, requires_grad=True)

    # plain PyTorch: the norms as modules, autograd through their statistics
    plain_norm, plain_gate = copy.deepcopy(norm), copy.deepcopy(gate)
    n = z if plain_norm is None else plain_norm(z)
    x = None if plain_gate is None else plain_gate(n)
    plain_parameters = [p for m in (plain_norm, plain_gate) if m is not None for p in m.parameters()]
    dz, *right_grads = torch.autograd.grad(objective(n, x), [z, *plain_parameters])

    # the affine maps, with statistics that are constants
    fixed = z.detach()
    batch = batch_mode(norm) or batch_mode(gate)
    mean, variance = (fixed.mean(0), fixed.var(0, unbiased=False)) if batch else (None, None)
    count = torch.tensor(float(ROWS), dtype=torch.float64) if batch else None
    maps = fold.affine(HiddenLayer(torch.zeros(H, 1, dtype=torch.float64), None, norm, gate), mean, variance, count)
    away = fixed if maps.center is None else fixed - maps.center
    n_found, x_found = fixed, None
    if maps.norm_scale is not None:
        n_found = maps.norm_scale * away + (0 if maps.norm_shift is None else maps.norm_shift)
    if maps.gate_scale is not None:
        x_found = maps.gate_scale * away + (0 if maps.gate_shift is None else maps.gate_shift)
    torch.testing.assert_close(n_found, n, rtol=0, atol=1e-12)
    assert (x_found is None) == (x is None)
    if x is not None and x_found is not None:
        torch.testing.assert_close(x_found, x, rtol=0, atol=1e-12)

    # the local gradient, and what the statistics answer
    n_leaf = n.detach().requires_grad_()
    x_leaf = None if x is None else x.detach().requires_grad_()
    leaves = [n_leaf] if x_leaf is None else [n_leaf, x_leaf]
    dn, *rest = torch.autograd.grad(objective(n_leaf, x_leaf), leaves)
    dx = rest[0] if rest else torch.zeros_like(dn)
    found_dz = dn if maps.norm_scale is None else maps.norm_scale * dn
    if maps.gate_scale is not None:
        found_dz = found_dz + maps.gate_scale * dx
    assert (maps.response is not None) == batch
    if maps.response is not None and mean is not None:
        off = fixed - mean
        sums = torch.stack([(dn * off).sum(0), dn.sum(0), (dx * off).sum(0), dx.sum(0)])
        e0, e1 = (maps.response * sums).sum(1)
        found_dz = found_dz - e0 - e1 * off
    torch.testing.assert_close(found_dz, dz, rtol=0, atol=1e-12)

    # scales and shifts carry the gradient to the parameters of the norms
    through = dn.mul(n_found).sum() + (0.0 if x_found is None else dx.mul(x_found).sum())
    if parameters:
        for right, found in zip(right_grads, torch.autograd.grad(through, parameters), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_slope_is_spread_over_the_units_and_its_gradient_summed(shape: tuple[int, ...]) -> None:
    slope = torch.full(shape, 0.3, requires_grad=True)
    maps = fold.affine(HiddenLayer(torch.zeros(H, 1), slope=slope), None, None, None)
    assert maps.slope is not None and torch.equal(maps.slope, torch.full((H,), 0.3))
    assert torch.autograd.grad(maps.slope.sum(), slope)[0] == H


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0, None])
@pytest.mark.parametrize("tracking", ["yes", "frozen", "never", "switched off later"])
def test_running_statistics_move_as_torch_moves_them(momentum: float | None, tracking: str) -> None:
    norm = nn.BatchNorm1d(H, momentum=momentum, track_running_stats=tracking != "never", dtype=torch.float64)
    norm.train(tracking != "frozen")
    if tracking == "switched off later":
        norm.track_running_stats = False
    twin = copy.deepcopy(norm)
    for _ in range(3):
        z = 3 + torch.randn(ROWS, H, dtype=torch.float64)
        twin(z)
        count = torch.tensor(float(ROWS), dtype=torch.float64)
        fold.update_running_statistics(norm, z.mean(0), z.var(0, unbiased=False), count)
    for name, right in twin.named_buffers():
        assert_near(name, norm.get_buffer(name), right, 1e-12)

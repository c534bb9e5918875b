"""Strides: a view gives the very bits that its contiguous copy gives, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.truth import SPECS, fused_unit

B, L, D = 5, 18, 9

# name -> (shape of the leaf, the view of it that the unit gets)
HISTORIES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "one feature of (B, F, L, D)": ((B, 3, L, D), lambda x: x[:, 1]),
    "last feature of (B, F, L, D)": ((B, 3, L, D), lambda x: x[:, -1]),
    "all but the last of (B, L+1, D)": ((B, L + 1, D), lambda x: x[:, :-1]),
    "all but the first of (B, L+1, D)": ((B, L + 1, D), lambda x: x[:, 1:]),
    "transposed (L, B, D)": ((L, B, D), lambda x: x.transpose(0, 1)),
    "transposed (B, D, L)": ((B, D, L), lambda x: x.transpose(1, 2)),
    "columns of (B, L, 2D)": ((B, L, 2 * D), lambda x: x[..., D:]),
    "every second column": ((B, L, 2 * D), lambda x: x[..., ::2]),
    "every second row": ((B, 2 * L, D), lambda x: x[:, ::2]),
    "every second sample": ((2 * B, L, D), lambda x: x[1::2]),
    "flipped": ((B, L, D), lambda x: x.flip(1)),
    "one history for all": ((1, L, D), lambda x: x.expand(B, L, D)),
    "one position for all": ((B, 1, D), lambda x: x.expand(B, L, D)),
    "one number for all": ((1, 1, 1), lambda x: x.expand(B, L, D)),
}
TARGETS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "last of (B, L+1, D)": ((B, L + 1, D), lambda x: x[:, -1]),
    "one target for all": ((1, D), lambda x: x.expand(B, D)),
    "transposed (D, B)": ((D, B), lambda x: x.T),
    "every second column": ((B, 2 * D), lambda x: x[:, ::2]),
    "one number for all": ((1, 1), lambda x: x.expand(B, D)),
}
UPSTREAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda out: out.sum(),  # a gradient of stride 0
    "sum of a row": lambda out: out[1].sum(),
    "transposed": lambda out: (out.T * torch.arange(out.numel()).view(out.shape[1], -1)).sum(),
    "every second column": lambda out: out[:, ::2].square().sum(),
    "sum over samples first": lambda out: (out.sum(0) * torch.arange(D)).sum(),
}


def results(
    name: str, training: bool, backend: str, history: Tensor, target: Tensor, loss: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """The output and every gradient; inputs that are leaves get theirs."""
    unit = fused_unit(SPECS[name], D, backend).train(training)
    mask = torch.rand(B, L, generator=torch.Generator().manual_seed(2)) < 0.8
    out = unit(history, target, mask=mask)
    assert unit.last_backend == backend
    return [out, *torch.autograd.grad(loss(out), [history, target, *unit.parameters()])]


def same(found: list[Tensor], right: list[Tensor]) -> None:
    assert len(found) == len(right)
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert torch.equal(a, b), f"result {i}: {(a - b).abs().max()}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["rechub", "fuxictr-softmax"])
@pytest.mark.parametrize("view", HISTORIES)
def test_histories(view: str, name: str, training: bool, backend: str) -> None:
    shape, of = HISTORIES[view]
    history = of(torch.randn(shape, requires_grad=True))
    target = torch.randn(B, D, requires_grad=True)
    weight = torch.randn(B, D)

    def loss(out: Tensor) -> Tensor:
        return (out * weight).sum()

    copied = history.detach().contiguous().clone(memory_format=torch.contiguous_format).requires_grad_()
    assert copied.is_contiguous()
    same(
        results(name, training, backend, history, target, loss), results(name, training, backend, copied, target, loss)
    )


@pytest.mark.parametrize("view", [v for v in HISTORIES if "for all" in v])
def test_the_gradient_of_an_expanded_history_is_the_sum(view: str, backend: str) -> None:
    shape, of = HISTORIES[view]
    leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    unit = fused_unit(SPECS["rechub"], D, backend).double()
    target = torch.randn(B, D, dtype=torch.float64)
    unit(of(leaf), target).sum().backward()
    full = of(leaf).detach().clone().requires_grad_()
    unit(full, target).sum().backward()
    assert leaf.grad is not None and full.grad is not None
    dims = [d for d in range(3) if shape[d] == 1]
    torch.testing.assert_close(leaf.grad, full.grad.sum(dims, keepdim=True), rtol=0, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("view", TARGETS)
def test_targets(view: str, training: bool, backend: str) -> None:
    shape, of = TARGETS[view]
    target = of(torch.randn(shape, requires_grad=True))
    history = torch.randn(B, L, D, requires_grad=True)
    copied = target.detach().clone(memory_format=torch.contiguous_format).requires_grad_()

    def loss(out: Tensor) -> Tensor:
        return out.square().sum()

    same(
        results("fuxictr", training, backend, history, target, loss),
        results("fuxictr", training, backend, history, copied, loss),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_gradients_that_come_back(upstream: str, training: bool, backend: str) -> None:
    loss = UPSTREAMS[upstream]
    history, target = torch.randn(B, L, D, requires_grad=True), torch.randn(B, D, requires_grad=True)
    probe = torch.zeros(B, D, requires_grad=True)

    def made_contiguous(out: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss(out.detach() + probe), probe)
        return (out * gradient.contiguous().clone()).sum()

    same(
        results("deepctr", training, backend, history, target, loss),
        results("deepctr", training, backend, history, target, made_contiguous),
    )


@pytest.mark.parametrize("training", [True, False])
def test_masks_and_lengths_of_any_stride(training: bool, backend: str) -> None:
    history, target = torch.randn(B, L, D), torch.randn(B, D)
    mask = torch.rand(L, B) < 0.6
    lengths = torch.randint(0, L + 1, (B, 2), dtype=torch.int32)
    outs = []
    for m, n in ((mask.T, lengths[:, 1]), (mask.T.contiguous(), lengths[:, 1].long().contiguous())):
        unit = fused_unit(SPECS["deepctr-softmax"], D, backend).train(training)
        outs.append(unit(history, target, mask=m, lengths=n))
        assert unit.last_backend == backend
    assert torch.equal(*outs)


def test_parameters_of_any_stride(backend: str) -> None:
    """Tied or transposed weights are views, too."""
    history, target = torch.randn(B, L, D), torch.randn(B, D)
    unit, twin = (fused_unit(SPECS["rechub-two-layers-softmax"], D, backend).eval() for _ in range(2))
    for p in unit.parameters():
        if p.dim() == 2:
            p.data = p.data.T.contiguous().T
        else:
            p.data = torch.stack([p.data, p.data], dim=-1)[..., 0]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(unit(history, target), twin(history, target))
    assert unit.last_backend == twin.last_backend == backend


@pytest.mark.parametrize("training", [True, False])
def test_inputs_are_left_as_they_were(training: bool, backend: str) -> None:
    history, target = torch.randn(B, L, D, requires_grad=True), torch.randn(B, D, requires_grad=True)
    mask, lengths = torch.rand(B, L) < 0.5, torch.randint(0, L + 1, (B,))
    given = (history, target, mask, lengths)
    before = [t.detach().clone() for t in given]
    unit = fused_unit(SPECS["fuxictr-norm-and-dice"], D, backend).train(training)
    weights = [p.detach().clone() for p in unit.parameters()]
    unit(history, target, mask=mask, lengths=lengths).sum().backward()
    assert unit.last_backend == backend
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(unit.parameters(), weights, strict=True))

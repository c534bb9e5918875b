"""The definition of right, ``din_fast.reference``, against the installed frameworks themselves, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch_rechub.models.ranking.din import ActivationUnit as RechubUnit

from bench import peers
from din_fast import UnitSpec, preset, reference
from tests.truth import Case, draw, randomise

B, L, D = 6, 9, 7


def gradients(module: nn.Module, out: Tensor, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Of the inputs, then of every parameter in the order of the layers, each flat."""
    parameters = [p for layer in peers.layers(module) for _, p in sorted(layer.named_parameters())]
    return [g.flatten() for g in torch.autograd.grad(out, [*inputs, *parameters], upstream)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["dice", "relu", "prelu", "sigmoid", "identity"])
@pytest.mark.parametrize("hidden", [(36,), (8, 4), (6, 5, 3)], ids=str)
@pytest.mark.parametrize(
    ("framework", "masked"),  # torch-rechub's unit has no mask
    [("rechub", False), ("fuxictr", False), ("fuxictr", True), ("deepctr", False), ("deepctr", True)],
)
def test_output_gradients_and_running_statistics_of_the_installed_framework(
    framework: str, masked: bool, hidden: tuple[int, ...], activation: str, softmax: bool, training: bool
) -> None:
    spec = preset(framework, hidden, activation, softmax)
    host = peers.build(framework, D, hidden, activation, softmax).double().train(training)
    randomise(host, torch.Generator().manual_seed(3))
    ours = reference.ActivationUnit(D, spec).double().train(training)
    peers.copy_weights(host, ours)
    inputs = draw(Case(spec, (B, L, D), "mask" if masked else "none"), 0, torch.float64)
    history, target = inputs.history.requires_grad_(), inputs.target.requires_grad_()

    right = peers.call(framework, host, history, target, inputs.mask)
    found = ours(history, target, inputs.valid)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    for a, b in zip(
        gradients(ours, found, [history, target], inputs.upstream),
        gradients(host, right, [history, target], inputs.upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    for mine, theirs in zip(peers.layers(ours), peers.layers(host), strict=True):
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(mine.get_buffer(name), buffer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["dice", "relu", "prelu", "sigmoid"])
@pytest.mark.parametrize("dims", [[36], [8, 4], []], ids=str)
def test_state_dict_is_torch_rechubs(dims: list[int], activation: str) -> None:
    theirs = RechubUnit(D, dims=dims, activation=activation)
    ours = reference.ActivationUnit(D, preset("rechub", dims, activation))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_fresh_parameters_are_those_of_the_framework() -> None:
    """The same draws from the same generator, so that a seeded model starts where the host's would."""
    torch.manual_seed(5)
    theirs = RechubUnit(D, dims=[8, 4]).state_dict()
    torch.manual_seed(5)
    ours = reference.ActivationUnit(D, preset("rechub", [8, 4])).state_dict()
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())
    fuxictr = reference.ActivationUnit(D, preset("fuxictr")).state_dict()
    assert fuxictr["attention.mlp.1.alpha"].eq(0).all() and fuxictr["attention.mlp.1.alpha"].shape == (64,)


def test_the_blogs_unit() -> None:
    """[h, t, h-t, h*t] -> Linear -> PReLU -> Linear -> sigmoid, the mean over the valid positions."""
    unit = reference.ActivationUnit(D, preset("blog", [5])).double()
    inputs = draw(Case(preset("blog"), (B, L, D), "mask"), 0, torch.float64)
    first, prelu, last = (m for m in unit.attention.mlp)
    assert inputs.valid is not None
    for b in range(B):
        h, t = inputs.history[b][inputs.valid[b]], inputs.target[b]
        t = t.expand_as(h)
        weight = torch.sigmoid(last(prelu(first(torch.cat([h, t, h - t, h * t], dim=1)))))
        right = (weight * h).sum(0) / max(1, len(h))
        torch.testing.assert_close(unit(inputs.history, inputs.target, inputs.valid)[b], right, rtol=0, atol=1e-13)


def test_mean_pooling_counts_every_row() -> None:
    inputs = draw(Case(preset("blog"), (B, L, D), "lengths"), 0, torch.float64)
    total = reference.ActivationUnit(D, UnitSpec((5,), activation="relu")).double()
    mean = reference.ActivationUnit(D, UnitSpec((5,), activation="relu", pooling="mean")).double()
    mean.load_state_dict(total.state_dict())
    torch.testing.assert_close(
        mean(inputs.history, inputs.target, inputs.valid), total(inputs.history, inputs.target, inputs.valid) / L
    )


def test_row_dice_of_one_unit_is_half_open() -> None:
    """The one unit of a row is its own mean, so the gate is sigmoid(0)."""
    z = torch.randn(4, 1)
    alpha = torch.tensor([0.2])
    found = reference.dice(z, reference.row_normalised(z, 1e-3), alpha)
    torch.testing.assert_close(found, 0.5 * z + 0.5 * 0.2 * z)

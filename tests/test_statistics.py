"""BatchNorm and batch Dice in training: the statistics of the batch, and what is left behind in the buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from din_fast import UnitSpec, functional, ops, preset, reference
from tests.truth import Case, assert_near, call, check_parity, draw, fused_unit, randomise

BOTH = preset("fuxictr", [16, 9], batch_norm=True)  # a BatchNorm in front of the activation and one inside Dice
NORMED = {"rechub": preset("rechub", [17, 5]), "deepctr": preset("deepctr", [16, 8]), "both": BOTH}


def norms(unit: nn.Module) -> list[nn.BatchNorm1d]:
    return [m for m in unit.modules() if isinstance(m, nn.BatchNorm1d)]


def untrack(norm: nn.BatchNorm1d) -> None:
    """As if built with track_running_stats=False."""
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def freeze_all(unit: nn.Module) -> None:
    for norm in norms(unit):
        norm.eval()


def freeze_every_second(unit: nn.Module) -> None:
    """With BatchNorm and Dice: the BatchNorms."""
    for norm in norms(unit)[::2]:
        norm.eval()


def freeze_the_others(unit: nn.Module) -> None:
    for norm in norms(unit)[1::2]:
        norm.eval()


def freeze_the_first_layer(unit: nn.Module) -> None:
    for norm in norms(unit)[: len(norms(unit)) // 2]:
        norm.eval()


def cumulative(unit: nn.Module) -> None:
    for norm in norms(unit):
        norm.momentum = None


def momentum_of_their_own(unit: nn.Module) -> None:
    for i, norm in enumerate(norms(unit)):
        norm.momentum = 0.2 + 0.1 * i


def never_tracked(unit: nn.Module) -> None:
    for norm in norms(unit):
        untrack(norm)


def first_never_tracked(unit: nn.Module) -> None:
    untrack(norms(unit)[0])


def tracking_switched_off(unit: nn.Module) -> None:
    for norm in norms(unit):
        norm.track_running_stats = False


ADJUSTMENTS: list[Callable[[nn.Module], None]] = [
    freeze_all,
    freeze_every_second,
    freeze_the_others,
    freeze_the_first_layer,
    cumulative,
    momentum_of_their_own,
    never_tracked,
    first_never_tracked,
    tracking_switched_off,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("adjust", ADJUSTMENTS, ids=lambda f: f.__name__)
def test_every_norm_follows_its_own_settings(
    adjust: Callable[[nn.Module], None], name: str, training: bool, dtype: torch.dtype, backend: str
) -> None:
    """A frozen BatchNorm in a training model, momentum=None, track_running_stats=False, and their mixtures."""
    check_parity(Case(NORMED[name], (6, 21, 9), "mask", training), backend, dtype, adjust)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", [(13,), (16, 9)], ids=str)
@pytest.mark.parametrize("framework", ["rechub", "fuxictr", "deepctr"])
def test_parity_where_z_is_computed_again_in_each_pass(
    framework: str,
    hidden: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    cpu: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As beyond the limit on what is kept for the backward."""
    monkeypatch.setattr(functional, "KEEP_LIMIT_BYTES", 0)
    asked: list[int] = []

    def call_and_note(backend: str, name: str, *arguments: Any) -> list[Tensor]:
        result = ops_call(backend, name, *arguments)
        if name == "moments":
            asked.append(result[-1].numel())
        elif name == "train":
            asked.extend(t.numel() for t in result[4:])
        return result

    ops_call = ops.call
    monkeypatch.setattr(ops, "call", call_and_note)
    check_parity(Case(preset(framework, hidden), (6, 37, 9), "mask"), backend, dtype)
    assert asked and not any(asked)


@pytest.mark.parametrize("adjust", [None, *ADJUSTMENTS], ids=lambda f: "as built" if f is None else f.__name__)
@pytest.mark.parametrize("name", NORMED)
def test_buffers_over_several_steps_and_evaluation_after_them(
    name: str, adjust: Callable[[nn.Module], None] | None, backend: str
) -> None:
    case = Case(NORMED[name], (6, 21, 9), "lengths")
    plain = reference.ActivationUnit(9, case.spec).double()
    randomise(plain, torch.Generator().manual_seed(0))
    fused = fused_unit(case.spec, 9, backend, like=plain)
    if adjust is not None:
        adjust(plain)
        adjust(fused)
    for seed in range(4):
        inputs = draw(case, seed, torch.float64)
        with torch.set_grad_enabled(seed % 2 == 0):  # training mode updates them with and without gradient
            torch.testing.assert_close(call(fused, inputs), call(plain, inputs), rtol=0, atol=1e-11)
    expected = dict(plain.named_buffers())
    assert dict(fused.named_buffers()).keys() == expected.keys()
    for key, right in expected.items():
        assert_near(key, fused.get_buffer(key), right, 1e-11)
    plain.eval()
    fused.eval()
    torch.testing.assert_close(call(fused, inputs), call(plain, inputs), rtol=0, atol=1e-11)


def test_running_statistics_are_those_of_a_batch_norm_on_the_first_layer(backend: str) -> None:
    """By hand: z of all B L rows, pads included, through torch's own BatchNorm1d."""
    unit = fused_unit(preset("deepctr", [7]), 5, backend).double().train()
    inputs = draw(Case(unit.spec, (4, 6, 5), "lengths"), 0, torch.float64)
    norm = copy.deepcopy(norms(unit)[0])
    linear: nn.Module = unit.attention.mlp[0]
    norm(linear(reference.features(inputs.target, inputs.history, unit.spec.blocks).flatten(0, 1)))
    call(unit, inputs)
    for name, right in norm.named_buffers():
        torch.testing.assert_close(norms(unit)[0].get_buffer(name), right, rtol=0, atol=1e-12)
    assert norms(unit)[0].num_batches_tracked == 1


@contextmanager
def unchanged(unit: nn.Module) -> Iterator[None]:
    """Parameters, buffers and gradients are after the block what they were before it."""
    state = {k: v.clone() for k, v in unit.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in unit.parameters()]
    yield
    for key, value in unit.state_dict().items():
        assert torch.equal(value, state[key]), key
    for p, grad in zip(unit.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert p.grad is None or grad is None or torch.equal(p.grad, grad)


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("grad", [True, False])
def test_one_row_raises_before_anything_changes(name: str, grad: bool, any_backend: str) -> None:
    """torch's own BatchNorm counts num_batches_tracked first."""
    unit = fused_unit(NORMED[name], 5, any_backend).train()
    history, target = torch.randn(1, 1, 5), torch.randn(1, 5)
    with unchanged(unit), torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"history: expected more than"):
        unit(history, target)
    assert unit.eval()(history, target).shape == (1, 5)
    unit.train()
    freeze_all(unit)
    assert unit(history, target).shape == (1, 5)


VALID = UnitSpec((6, 4), activation="dice_batch", batch_norm=True, dice_affine=True, batch_stats="valid")


def test_one_valid_row_raises_before_anything_changes(any_backend: str) -> None:
    unit = fused_unit(VALID, 5, any_backend).train()
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4] = True
    with unchanged(unit), pytest.raises(ValueError, match=r"history: expected more than 1 valid row .* got 1 of shape"):
        unit(torch.randn(3, 7, 5), torch.randn(3, 5), mask)
    unit(torch.randn(3, 7, 5), torch.randn(3, 2, 5), mask)  # two candidates make two rows of it
    assert unit.last_backend == any_backend


def test_no_valid_row_leaves_mean_and_variance_alone(any_backend: str) -> None:
    unit = fused_unit(VALID, 5, any_backend).train()
    with unchanged(unit):
        out = unit(torch.randn(3, 7, 5), torch.randn(3, 5), lengths=torch.zeros(3, dtype=torch.int64))
    assert unit.last_backend == any_backend and not out.any()


def test_valid_rows_alone_are_the_unpadded_histories(any_backend: str) -> None:
    """The statistics of a padded batch are those of its histories laid end to end."""
    unit, packed = (fused_unit(VALID, 5, any_backend).double().train() for _ in range(2))
    lengths = torch.tensor([3, 0, 6])
    history, target = torch.randn(3, 6, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    unit(history, target, lengths=lengths)
    rows = [(b, n) for b, length in enumerate(lengths.tolist()) for n in range(length)]
    one_each = torch.stack([history[b, n : n + 1] for b, n in rows])
    packed(one_each, torch.stack([target[b] for b, _ in rows]))
    for key, right in packed.named_buffers():
        assert_near(key, unit.get_buffer(key).double(), right.double(), 1e-12)


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 5)], ids=str)
def test_no_row_leaves_mean_and_variance_alone(name: str, shape: tuple[int, ...], any_backend: str) -> None:
    unit = fused_unit(NORMED[name], 5, any_backend).train()
    with unchanged(unit):
        out = unit(torch.randn(shape), torch.randn(shape[0], 5))
    assert unit.last_backend == any_backend and not out.any()


@torch.no_grad()
def deepctr_initialise(unit: nn.Module, g: torch.Generator) -> None:
    """DeepCTR-Torch's: hidden weights from N(0, 1e-4), biases uniform in +-1/sqrt(inputs), alpha 0."""
    *hidden, last = (m for m in unit.modules() if isinstance(m, nn.Linear))
    for linear in (*hidden, last):
        bound = linear.in_features**-0.5
        linear.bias.uniform_(-bound, bound, generator=g)
        if linear is last:
            linear.weight.uniform_(-bound, bound, generator=g)
        else:
            linear.weight.normal_(0, 1e-4, generator=g)


def keep_only_this_batch(unit: nn.Module) -> None:
    """Momentum 1: the buffers become the batch's own mean and variance, and are held to the rule as such."""
    for norm in norms(unit):
        norm.momentum = 1.0


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("shape", [(16, 50, 16), (3, 400, 12)], ids=str)
def test_deepctr_torchs_initialisation(shape: tuple[int, int, int], softmax: bool, backend: str, cpu: str) -> None:
    """Embeddings and weights of 1e-4 beside a bias of 0.1: a variance far below the rounding of the mean's square."""
    spec = preset("deepctr", [64, 16], softmax=softmax)
    check_parity(
        Case(spec, shape, "lengths", scale=1e-4), backend, adjust=keep_only_this_batch, initialise=deepctr_initialise
    )


@pytest.mark.parametrize(("offset", "dtype"), [(10.0, torch.float32), (1000.0, torch.float64)], ids=str)
def test_a_mean_far_from_zero(offset: float, dtype: torch.dtype, backend: str, cpu: str) -> None:
    """A variance does not change when a constant is added; E[z^2] - E[z]^2 would lose six digits here."""

    def initialise(unit: nn.Module, g: torch.Generator) -> None:
        randomise(unit, g)
        for m in unit.modules():
            if isinstance(m, nn.Linear):
                m.bias.data += offset

    check_parity(Case(BOTH, (8, 30, 9)), backend, dtype, adjust=keep_only_this_batch, initialise=initialise)


def test_every_row_the_same(backend: str) -> None:
    """A variance of zero: only eps stands below the square root, and the output stays finite."""
    unit = fused_unit(preset("rechub", [8]), 5, backend).double().train()
    plain = reference.ActivationUnit(5, unit.spec).double()
    plain.load_state_dict(unit.state_dict())
    history = torch.randn(1, 1, 5, dtype=torch.float64).expand(4, 6, 5)
    target = torch.randn(1, 5, dtype=torch.float64).expand(4, 5)
    found: Tensor = unit(history, target)
    torch.testing.assert_close(found, plain(history, target), rtol=0, atol=1e-11)
    assert unit.last_backend == backend

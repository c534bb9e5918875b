"""FusedActivationUnit as a module: the drop-in's signature, its state, and which backend runs."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch_rechub.models.ranking.din import ActivationUnit as RechubUnit

import din_fast
from din_fast import FusedActivationUnit, UnitSpec, dispatch, preset
from din_fast.backends import native
from din_fast.reference import BatchDice
from tests.truth import SPECS, Case, call, draw, fused_unit

D = 6
INPUTS = draw(Case(preset("rechub"), (4, 7, D), "mask"), 0, torch.float32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dims": [8, 4]},
        {"dims": []},
        {"activation": "relu"},
        {"activation": "prelu", "use_softmax": True},
        {"dims": [5], "activation": "sigmoid"},
    ],
    ids=str,
)
def test_by_default_it_is_torch_rechubs_unit(arguments: dict[str, object], training: bool, backend: str) -> None:
    """The same arguments, the same initial weights from a seed, the same result, and checkpoints both ways."""
    torch.manual_seed(7)
    theirs = RechubUnit(D, **arguments).double().train(training)
    torch.manual_seed(7)
    ours = FusedActivationUnit(D, **arguments, backend=backend).double().train(training)  # type: ignore[arg-type]
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())
    history, target = torch.randn(4, 7, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    torch.testing.assert_close(ours(history, target), theirs(history, target), rtol=0, atol=1e-12)
    assert ours.last_backend == backend
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_positional_arguments_are_those_of_torch_rechub() -> None:
    unit = FusedActivationUnit(D, [8], "relu", True)
    assert unit.spec == preset("rechub", [8], "relu", softmax=True)
    assert FusedActivationUnit(D).spec == preset("rechub", [36])


def test_dims_are_copied() -> None:
    dims = [8, 4]
    unit = FusedActivationUnit(D, dims)
    dims.append(2)
    assert unit.spec.hidden_units == (8, 4)
    assert dims == [8, 4, 2]


@pytest.mark.parametrize(
    "other",
    [{"dims": [36]}, {"activation": "dice"}, {"use_softmax": False}, {"dims": [8], "use_softmax": True}],
    ids=str,
)
def test_a_spec_together_with_what_it_holds_raises(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^spec: "):
        FusedActivationUnit(D, spec=preset("fuxictr"), **other)  # type: ignore[arg-type]


def test_children_are_real_linears_and_batch_norms() -> None:
    """So that initialisers, weight decay groups and SyncBatchNorm conversion of the host find them."""
    unit = FusedActivationUnit(D, spec=preset("fuxictr", [8, 4], batch_norm=True))
    kinds = [type(m) for m in unit.modules()]
    assert kinds.count(nn.Linear) == 3 and kinds.count(nn.BatchNorm1d) == 4
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(unit))
    assert [type(m) for m in converted.modules()].count(nn.SyncBatchNorm) == 4


@pytest.mark.parametrize("name", ["rechub", "fuxictr-norm-and-dice", "blog"])
def test_deepcopy_pickle_and_state_dict_keep_the_function(name: str, any_backend: str) -> None:
    unit = fused_unit(SPECS[name], D, any_backend).eval()
    right = call(unit, INPUTS)
    loaded = FusedActivationUnit(D, spec=SPECS[name], backend=any_backend).eval()
    loaded.load_state_dict(unit.state_dict(), strict=True)
    for twin in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit)), loaded):
        assert torch.equal(call(twin, INPUTS), right)
    copied = copy.deepcopy(unit)
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1.0)
    assert torch.equal(call(unit, INPUTS), right)


def test_weights_are_never_cached(backend: str) -> None:
    """load_state_dict, an optimizer's step, edits of .data and train/eval switches all count at the next call."""
    unit = fused_unit(preset("rechub", [8]), D, backend).eval()
    seen = [call(unit, INPUTS).detach()]
    for p in unit.parameters():
        p.data.mul_(1.5)
    seen.append(call(unit, INPUTS).detach())
    call(unit, INPUTS).sum().backward()
    torch.optim.SGD(unit.parameters(), lr=0.1).step()
    seen.append(call(unit, INPUTS).detach())
    unit.train()
    seen.append(call(unit, INPUTS).detach())
    unit.eval()  # the running statistics moved
    seen.append(call(unit, INPUTS).detach())
    with torch.no_grad():
        for i, out in enumerate(seen):
            assert not any(torch.allclose(out, other) for other in seen[:i]), i
        unit.load_state_dict(fused_unit(preset("rechub", [8]), D, backend).state_dict())
        torch.testing.assert_close(call(unit, INPUTS), seen[0])


def test_layers_are_read_at_each_call(backend: str) -> None:
    """Children and parameters that are put in the place of others count at the next call."""
    unit = fused_unit(preset("deepctr", [8]), D, backend).eval()
    right = fused_unit(preset("deepctr", [8]), D, backend).eval()
    with torch.no_grad():
        for p in right.parameters():
            p.mul_(1.5)
        for b in right.buffers():
            b.mul_(2)
        call(unit, INPUTS)
        for mine, other in zip(list(unit.modules()), list(right.modules()), strict=True):
            if isinstance(mine, nn.Linear):
                assert isinstance(other, nn.Linear)
                mine.weight, mine.bias = other.weight, other.bias
            elif isinstance(mine, BatchDice):
                assert isinstance(other, BatchDice)
                mine.alpha, mine.bn = other.alpha, other.bn
        assert torch.equal(call(unit, INPUTS), call(right, INPUTS))
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(unit))
        assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
        assert torch.equal(call(converted, INPUTS), call(right, INPUTS))


def test_repr_says_what_it_computes() -> None:
    text = repr(FusedActivationUnit(D, [8, 4], "prelu", True, backend="reference"))
    for part in ("emb_dim=6", "hidden_units=[8, 4]", "activation=prelu", "softmax=True", "pooling=sum", "reference"):
        assert part in text


def test_repr_says_what_changes_training() -> None:
    text = repr(FusedActivationUnit(D, spec=UnitSpec((8,), batch_norm=True, dropout=0.2, batch_stats="valid")))
    assert "dropout=0.2" in text and "batch_stats=valid" in text


def test_the_functional_form_is_keyword_only_and_the_same(any_backend: str) -> None:
    unit = fused_unit(preset("deepctr", [8]), D, any_backend).eval()
    arguments: dict[str, Any] = {
        "query": INPUTS.target,
        "history": INPUTS.history,
        "parameters": unit.attention.unit_parameters(),
        "spec": unit.spec,
        "mask": INPUTS.mask,
        "backend": any_backend,
    }
    assert torch.equal(din_fast.activation_unit(**arguments), call(unit, INPUTS))
    with pytest.raises(TypeError, match="positional"):
        din_fast.activation_unit(*arguments.values())  # type: ignore[call-arg]


# ---- which backend


def ran(unit: FusedActivationUnit) -> str | None:
    unit(INPUTS.history, INPUTS.target)
    return unit.last_backend


def test_nothing_ran_before_the_first_call() -> None:
    assert FusedActivationUnit(D).last_backend is None


def test_auto_means_the_kernel_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran(FusedActivationUnit(D)) == "native"


def test_auto_means_the_environment_variable_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = FusedActivationUnit(D)
    for name in ("reference", "native", "reference"):
        monkeypatch.setenv("DIN_FAST_BACKEND", name)
        assert ran(unit) == name
    for name in ("auto", ""):
        monkeypatch.setenv("DIN_FAST_BACKEND", name)
        assert ran(unit) == "native"


def test_an_explicit_backend_wins_over_the_environment_variable(
    any_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reference", "native", "triton", "no such thing"):
        monkeypatch.setenv("DIN_FAST_BACKEND", name)
        assert ran(FusedActivationUnit(D, backend=any_backend)) == any_backend


def test_what_is_named_and_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: "):
        ran(FusedActivationUnit(D, backend="triton"))
    monkeypatch.setenv("DIN_FAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: "):
        ran(FusedActivationUnit(D))
    monkeypatch.setattr(native, "why_not", lambda: "the moon is in the wrong phase")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: the moon"):
        ran(FusedActivationUnit(D, backend="native"))


def test_an_unknown_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^backend: expected one of auto, native, .* got 'cuda'"):
        FusedActivationUnit(D, backend="cuda")
    monkeypatch.setenv("DIN_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"^DIN_FAST_BACKEND: expected one of auto, native, .* got 'cuda'"):
        ran(FusedActivationUnit(D))


def test_auto_falls_back_with_one_warning_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(native, "why_not", lambda: "the moon is in the wrong phase")
    with pytest.warns(RuntimeWarning, match="reference: the moon is in the wrong phase"):
        assert ran(FusedActivationUnit(D)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran(FusedActivationUnit(D)) == "reference"


def test_auto_falls_back_on_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    unit = FusedActivationUnit(D).to("meta")
    with pytest.warns(RuntimeWarning, match="meta"):
        out = unit(INPUTS.history.to("meta"), INPUTS.target.to("meta"))
    assert out.shape == (4, D) and out.device.type == "meta" and unit.last_backend == "reference"
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run: .*meta"):
        FusedActivationUnit(D, backend="native").to("meta")(INPUTS.history.to("meta"), INPUTS.target.to("meta"))

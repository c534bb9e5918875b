"""The benchmark: the frameworks' units load right, the contenders compute one function, the timer counts right."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from bench import contenders, hosts, parity, peers, timing
from bench.contenders import Case, Contender
from din_fast import preset, reference

DIM = 6
HIDDEN = (7, 5)
ACTIVATIONS = ("dice", "relu", "prelu", "sigmoid", "identity")
MASKS = [(name, False) for name in peers.PACKAGES] + [("fuxictr", True), ("deepctr", True)]
SMALL = {name: Case(name, 5, 9, DIM, HIDDEN) for name in peers.PACKAGES}


def host_unit(name: str, activation: str = "dice", softmax: bool = False) -> nn.Module:
    """A framework's unit in float64 with weights and statistics that test something."""
    unit = peers.build(name, DIM, HIDDEN, activation, softmax, length=9).double()
    contenders.randomise(unit, torch.Generator().manual_seed(1))
    return unit


def same(first: nn.Module, second: nn.Module, run: Mapping[nn.Module, Callable[..., Tensor]], train: bool) -> None:
    """Outputs, gradients and running statistics of two units with the same layers agree to 1e-10."""
    results = []
    generator = torch.Generator().manual_seed(2)
    history = torch.randn(5, 9, DIM, generator=generator, dtype=torch.float64)
    target = torch.randn(5, DIM, generator=generator, dtype=torch.float64)
    gradient = torch.randn(5, DIM, generator=generator, dtype=torch.float64)
    for unit in (first, second):
        unit.train(train)
        leaves = history.clone().requires_grad_(), target.clone().requires_grad_()
        out = run[unit](*leaves)
        out.backward(gradient)
        parameters = [p for layer in peers.layers(unit) for p in layer.parameters()]
        found = [out.detach(), *(t.grad for t in (*leaves, *parameters))]
        assert all(t is not None and t.abs().sum() > 0 for t in found[:3])
        statistics = [b for layer in peers.layers(unit) for b in layer.buffers()]
        results.append([t.reshape(-1).double() for t in (*found, *statistics) if t is not None])
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def ragged() -> Tensor:
    """(5, 9): full, short, padded in front, with holes, empty."""
    valid = torch.ones(5, 9, dtype=torch.bool)
    valid[1, 4:] = False
    valid[2, :3] = False
    valid[3, [0, 4, 5, 8]] = False
    valid[4] = False
    return valid


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("name", "masked"), MASKS)
def test_a_framework_s_unit_is_the_reference(
    name: str, masked: bool, activation: str, softmax: bool, train: bool
) -> None:
    valid = ragged() if masked else None
    host = host_unit(name, activation, softmax)
    ours = reference.ActivationUnit(DIM, preset(name, HIDDEN, activation, softmax)).double()
    peers.copy_weights(host, ours)
    run = {host: partial(peers.call, name, host, valid=valid), ours: partial(ours, valid=valid)}
    same(host, ours, run, train)


def test_recbole_s_unit_takes_lengths() -> None:
    lengths = torch.tensor([9, 4, 1, 9, 0])
    valid = torch.arange(9) < lengths[:, None]
    host = host_unit("recbole", "sigmoid")
    ours = reference.ActivationUnit(DIM, preset("recbole", HIDDEN)).double()
    peers.copy_weights(host, ours)
    run = {host: partial(peers.call, "recbole", host, valid=valid), ours: partial(ours, valid=valid)}
    same(host, ours, run, train=True)
    with pytest.raises(ValueError, match="valid: RecBole's unit takes lengths"):
        peers.call("recbole", host, torch.randn(5, 9, DIM), torch.randn(5, DIM), ragged())


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_the_activation_that_is_timed_is_the_preset_s(name: str) -> None:
    assert preset(name, HIDDEN) == preset(name, HIDDEN, peers.ACTIVATIONS[name])


@pytest.mark.parametrize("name", ["fuxictr", "deepctr"])
def test_an_empty_history_under_softmax_is_the_uniform_mean(name: str) -> None:
    history = torch.randn(5, 9, DIM, dtype=torch.float64)
    target = torch.randn(5, DIM, dtype=torch.float64)
    out = peers.call(name, host_unit(name, softmax=True).eval(), history, target, ragged())
    torch.testing.assert_close(out[4], history[4].mean(dim=0), rtol=1e-10, atol=1e-10)


def test_torch_rechub_takes_no_mask() -> None:
    with pytest.raises(ValueError, match="valid: torch-rechub's unit has no mask"):
        peers.call("rechub", host_unit("rechub"), torch.randn(5, 9, DIM), torch.randn(5, DIM), ragged())


def test_an_unknown_framework_is_named() -> None:
    with pytest.raises(ValueError, match="name: expected one of rechub, fuxictr, deepctr, recbole; got 'tensorflow'"):
        peers.build("tensorflow", DIM, HIDDEN)


def test_stand_ins_are_gone_after_the_import() -> None:
    for name in peers.PACKAGES:
        peers.build(name, DIM, HIDDEN)
    for package in (name for stubs, _ in hosts.STANDING_IN.values() for name in stubs):
        assert package not in sys.modules or sys.modules[package].__spec__ is not None, f"{package} is still a stand-in"


def test_a_stand_in_gives_the_real_module_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleType("loaded_before")
    monkeypatch.setitem(sys.modules, "loaded_before", real)
    with hosts.standing_in({"loaded_before": {"x": 1}, "never_there": {}}, always=True):
        assert sys.modules["loaded_before"].x == 1
        assert "never_there" in sys.modules
    assert sys.modules["loaded_before"] is real
    assert "never_there" not in sys.modules
    with hosts.standing_in({"loaded_before": {"x": 1}}):
        assert sys.modules["loaded_before"] is real


def test_recbole_s_import_leaves_anomaly_detection_off() -> None:
    hosts.load("recbole.model.sequential_recommender.sine")
    assert not torch.is_anomaly_enabled()
    with pytest.raises(ZeroDivisionError), hosts.importing("recbole"):
        torch.autograd.set_detect_anomaly(True)
        raise ZeroDivisionError
    assert not torch.is_anomaly_enabled()


def test_weights_of_other_layers_are_not_copied() -> None:
    host = peers.build("fuxictr", DIM, HIDDEN)
    with pytest.raises(ValueError, match="target: expected 5 layers with weights as the source has, got 3"):
        peers.copy_weights(host, reference.ActivationUnit(DIM, preset("fuxictr", (7,))))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        peers.copy_weights(host, reference.ActivationUnit(DIM, preset("fuxictr", (5, 7))))
    with pytest.raises(RuntimeError, match="bn"):
        peers.copy_weights(host, reference.ActivationUnit(DIM, preset("fuxictr", HIDDEN, "prelu")))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("name", peers.PACKAGES)
def test_the_folded_form_is_the_unit(name: str, softmax: bool, train: bool) -> None:
    host = host_unit(name, peers.ACTIVATIONS[name], softmax)
    other = copy.deepcopy(host)
    same(host, other, {host: contenders.Plain(name, host), other: contenders.Folded(name, other)}, train)


def test_a_contender_on_another_backend_raises() -> None:
    unit = contenders.build(SMALL["rechub"], "reference")[-1].unit
    history, target, _ = contenders.inputs(SMALL["rechub"], torch.Generator())
    contender = Contender("din_fast", unit, unit, "native")
    contenders.forward(contender, history, target)
    with pytest.raises(RuntimeError, match="expected the backend native, but reference ran"):
        contender.check_backend()


class FakeTime:
    """A clock that only calls move: each takes its own ticks of 1/1024 s, of which others take ``taken`` in ``use``."""

    def __init__(self, taken: Callable[[int], float] = lambda call: 0.0) -> None:
        self.now = self.waited = 0.0
        self.calls: list[str] = []
        self.taken = taken

    def call(self, name: str, ticks: Callable[[int], int]) -> Callable[[], None]:
        def run() -> None:
            step = ticks(self.calls.count(name)) / 1024
            self.waited += step * self.taken(len(self.calls))
            self.now += step
            self.calls.append(name)

        return run

    @property
    def clock(self) -> timing.Clock:
        return timing.Clock(wall=lambda: self.now, use=lambda: (self.now - self.waited, self.waited))


def test_contenders_take_turns() -> None:
    fake = FakeTime()
    calls = {"slow": fake.call("slow", lambda i: 512), "quick": fake.call("quick", lambda i: 32)}
    told: list[str] = []
    found = timing.alternate(calls, rounds=2, seconds=0.25, clock=fake.clock, tick=told.append)
    # One call before each turn; a turn of the slow one is three calls, of the quick one 256 / 32 = 8.
    assert fake.calls == (["slow"] * 4 + ["quick"] * 9) * 2
    assert told == ["slow", "quick"] * 2
    assert found["slow"].milliseconds == [500.0] * 6
    assert found["quick"].milliseconds == [31.25] * 16
    assert (found["slow"].rounds, found["slow"].disturbed) == (2, 0)


def test_percentiles() -> None:
    fake = FakeTime()
    ticks = [99, 7, 1, 10, 4, 2, 9, 3, 8, 11, 5, 6]  # the first is the call before the turn
    found = timing.alternate({"x": fake.call("x", lambda i: ticks[i])}, 1, seconds=66 / 1024, clock=fake.clock)["x"]
    tick = 1000 / 1024
    assert found.percentile(20) == pytest.approx(3 * tick)
    assert found.median == pytest.approx(6 * tick)
    assert found.percentile(80) == pytest.approx(9 * tick)


def test_a_disturbed_turn_is_repeated() -> None:
    fake = FakeTime(taken=lambda call: 0.5 if call < 5 else 0.0)  # the first attempt is calls 0 to 4
    found = timing.alternate({"x": fake.call("x", lambda i: 64 + i)}, 1, seconds=0.25, clock=fake.clock)["x"]
    assert len(fake.calls) == 10
    assert found.milliseconds == [1000 * (64 + i) / 1024 for i in (6, 7, 8, 9)]
    assert found.disturbed == 0


def test_a_turn_that_stays_disturbed_is_flagged_and_not_repeated_for_ever() -> None:
    share = {0: 0.5, 1: 0.1, 2: 0.3}  # by attempt, four calls each
    fake = FakeTime(taken=lambda call: share[call // 4])
    found = timing.alternate({"x": fake.call("x", lambda i: 128 + i)}, 1, seconds=0.25, clock=fake.clock)["x"]
    assert len(fake.calls) == 12
    assert found.milliseconds == [1000 * (128 + i) / 1024 for i in (5, 6, 7)]  # the least disturbed
    assert (found.rounds, found.disturbed) == (1, 1)


def test_the_real_clock_counts_work() -> None:
    ran, waited = timing.processor_use()
    x = torch.ones(400, 400)
    for _ in range(20):
        x = (x @ x).clamp(max=1.0)
    later, waited_later = timing.processor_use()
    assert later > ran >= 0
    assert waited_later >= waited >= 0


class Broken(nn.Module):
    """A unit with one thing wrong."""

    def __init__(self, unit: nn.Module, what: str) -> None:
        super().__init__()
        self.unit = unit
        self.what = what

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        if self.what == "gradient":
            history = 1.01 * history - 0.01 * history.detach()
        out = self.unit(history, target)
        if self.what == "output":
            return out * 1.001
        return out * torch.nan if self.what == "nan" else out


def broken_group(what: str, case: Case, *backends: str) -> list[Contender]:
    *others, ours = contenders_build(case, *backends)
    if what == "statistics":
        for module in ours.unit.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.02
    return [*others, Contender(ours.provider, ours.unit, Broken(ours.unit, what), ours.backend)]


contenders_build = contenders.build


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_the_contenders_agree_with_float64(name: str, any_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    group = contenders.build(SMALL[name], any_backend)
    assert [c.provider for c in group] == [
        *(f"{peers.PACKAGES[name]}, {how}" for how in ("eager", "torch.compile")),
        *("folded, eager", "folded, torch.compile", "din_fast"),
    ]
    assert all(c.green for c in parity.check(SMALL[name], group))
    assert group[-1].unit.last_backend == any_backend
    assert all(c.green for c in parity.check_candidates(SMALL[name], group))


@pytest.mark.parametrize("what", ["output", "nan"])
def test_broken_candidates_are_red(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    case = SMALL["rechub"]
    checks = parity.check_candidates(case, broken_group(what, case, "reference"))
    assert {c.provider for c in checks if not c.green} == {"din_fast"}


@pytest.mark.parametrize("what", ["output", "nan", "gradient", "statistics"])
def test_parity_names_what_is_wrong(what: str, any_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    case = SMALL["fuxictr"]
    red = {c.tensor for c in parity.check(case, broken_group(what, case, any_backend)) if not c.green}
    expected = {
        "output": {"evaluation output", "training output"},
        "nan": {"evaluation output", "training output"},
        "gradient": {"gradient history"},
        "statistics": {f"statistics {i}.bn.running_{which}" for i in (1, 3) for which in ("mean", "var")},
    }
    assert expected[what] <= red
    assert what != "gradient" or red == expected[what]


def test_several_backends_are_told_apart(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    group = contenders.build(SMALL["recbole"], backend, "reference")
    assert [(c.provider, c.backend) for c in group[-2:]] == [
        ("din_fast", backend),
        ("din_fast, reference", "reference"),
    ]
    assert all(c.green for c in parity.check(SMALL["recbole"], group, seeds=2))

"""``fuse``: what it reports, what it leaves and why, and that a fused model goes on where the original was."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import din_fast
from din_fast import FusedActivationUnit, frameworks, preset
from din_fast.backends import native
from din_fast.frameworks.common import Fused, check_children, live, read, run
from tests import hosts
from tests.host_models import MODELS, Clicks, Model, clicks
from tests.test_frameworks import HOSTS, B, D, Drawn, L, deepctr, draw, easyrec, fused, fuxictr, recbole, rechub
from tests.truth import Comparison, assert_near, randomise

EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
ONE_OF_EACH = ("rechub", "deepctr dice", "fuxictr dice", "fuxictr dien dice", "recbole dice", "easyrec dice")
X = draw("ragged", 0).to(torch.float64)


def fused_units(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Fused)]


def rechub_model() -> nn.Module:
    return MODELS["torch-rechub"].build()


def unit_of(model: nn.Module) -> Any:
    return model.get_submodule("attention_layers.0")


# The report


def test_the_report_is_a_table() -> None:
    model = nn.Sequential(rechub(dims=[8, 4]).build(), rechub(activation="softmax").build(), nn.Linear(2, 2))
    report = din_fast.fuse(model)
    assert str(report).splitlines() == [
        "din_fast.fuse: 1 of 2 units fused",
        "module  framework     class           became",
        "0       torch-rechub  ActivationUnit  native: D 5, hidden [8, 4], dice_row, batch norm",
        "1       torch-rechub  ActivationUnit  left" + 46 * " " + "unsupported activation Softmax",
    ]
    assert [row.path for row in report.fused] == ["0"] and [row.path for row in report.left] == ["1"]
    assert isinstance(model[0], Fused) and not isinstance(model[1], Fused)


def test_nothing_to_fuse() -> None:
    report = din_fast.fuse(nn.Linear(2, 2))
    assert report.rows == () and "no activation unit" in str(report)


def test_dry_run_changes_nothing() -> None:
    model = rechub_model()
    kinds, before = [type(m) for m in model.modules()], vars(unit_of(model)).copy()
    report = din_fast.fuse(model, dry_run=True)
    assert len(report.fused) == 2 and "would be fused" in str(report)
    assert [type(m) for m in model.modules()] == kinds and vars(unit_of(model)) == before


@pytest.mark.parametrize("left", [True, False], ids=["one left", "none known"])
def test_strict_raises_and_changes_nothing(left: bool) -> None:
    model = nn.Sequential(rechub().build(), rechub(activation="softmax").build()) if left else nn.Sequential()
    with pytest.raises(RuntimeError, match=r"(?s)^strict: .*(unsupported activation Softmax|no activation unit)"):
        din_fast.fuse(model, strict=True)
    assert not fused_units(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"model": nn.Linear(1, 1), "backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        din_fast.fuse(**arguments)
    if "backend" not in arguments:
        with pytest.raises(error, match=message):
            din_fast.unfuse(arguments["model"])


def test_a_shared_unit_is_one_and_fusing_again_sets_the_backend() -> None:
    unit = rechub().build()
    model = nn.Sequential(unit, unit)
    assert len(din_fast.fuse(model).rows) == 1
    fused_class = type(unit)
    report = din_fast.fuse(model, backend="native")
    assert len(report.fused) == 1 and report.rows[0].unit == "ActivationUnit"
    assert type(unit) is fused_class and fused_units(model)[0].din_fast_backend == "native"
    assert din_fast.unfuse(model) == 1 and din_fast.unfuse(model) == 0


# What is left


def changed(build: Callable[[], nn.Module], change: Callable[[Any], object]) -> nn.Module:
    unit = build()
    change(unit)
    return unit


def of_a_subclass() -> nn.Module:
    base: Any = type(rechub().build())
    unit: nn.Module = type("Mine", (base,), {})(D)
    return unit


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax": (rechub(activation="softmax").build, "unsupported activation Softmax"),
    "gelu": (rechub(activation=nn.GELU).build, "unsupported activation GELU"),
    "four layers": (rechub(dims=[4, 4, 4, 4]).build, "4 hidden layers, the kernels take up to 3"),
    "layer norm": (
        easyrec(attn_mlp={"hidden_units": [8], "use_ln": True}).build,
        "LayerNorm in front of ReLU",
    ),
    "layer norm in windows": (
        easyrec(windows_len=[2], attn_mlp={"hidden_units": [8], "use_ln": True, "activation": nn.Identity}).build,
        "LayerNorm",
    ),
    "other outer product": (lambda: changed(rechub().build, lambda u: setattr(u, "emb_dim", 4)), "of 20 inputs"),
    "different activations": (
        fuxictr(attention_units=[4, 4], hidden_activations=["ReLU", "Tanh"]).build,
        "hidden layers that differ in activation: relu, tanh",
    ),
    "sigmoid and softmax": (fuxictr(output_activation="Sigmoid", use_softmax=True).build, "Sigmoid on the score"),
    "tanh score": (fuxictr(output_activation="Tanh").build, "unsupported activation of the score Tanh"),
    "different dropout": (
        fuxictr(attention_units=[4, 4], dropout_rate=[0.1, 0.2]).build,
        "hidden layers that differ in dropout: 0.1, 0.2",
    ),
    "norm along positions": (
        lambda: changed(recbole("relu").build, lambda u: u.att_mlp_layers.mlp_layers.insert(2, nn.BatchNorm1d(7))),
        "a BatchNorm along the positions",
    ),
    "dropout in front": (
        lambda: changed(recbole("relu").build, lambda u: setattr(u.att_mlp_layers.mlp_layers[0], "p", 0.1)),
        "a dropout in front of a Linear",
    ),
    "a Dice that is no SiLU": (
        lambda: changed(recbole("dice").build, lambda u: u.att_mlp_layers.mlp_layers[2].alpha.fill_(0.5)),
        "a Dice whose alpha is not 0",
    ),
    "slopes along positions": (
        lambda: changed(
            deepctr(att_activation="prelu").build,
            lambda u: u.local_att.dnn.activation_layers.__setitem__(0, nn.PReLU(L)),
        ),
        "a PReLU with a slope for each position",
    ),
    "weight norm": (
        lambda: changed(rechub().build, lambda u: nn.utils.spectral_norm(u.attention.mlp[0])),
        r"attention\.mlp\.0 has hooks, which would not be called",
    ),
    "parametrised": (
        lambda: changed(rechub().build, lambda u: nn.utils.parametrizations.weight_norm(u.attention.mlp[0])),
        "Parametrized",
    ),
    "own forward": (
        lambda: changed(rechub().build, lambda u: setattr(u, "forward", u.forward)),
        "a forward of its own",
    ),
    "child's own forward": (
        lambda: changed(rechub().build, lambda u: setattr(u.attention, "forward", u.attention.forward)),
        "attention has a forward of its own",
    ),
    "subclass": (of_a_subclass, "a subclass of ActivationUnit"),
    "on no device": (lambda: rechub().build().to("meta"), "meta"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_the_reason(name: str) -> None:
    build, reason = LEFT[name]
    unit = build()
    kind = type(unit)
    report = din_fast.fuse(unit)
    assert len(report.left) == 1 and report.rows[0].became is None
    assert type(unit) is kind and "last_backend" not in vars(unit)
    assert re.search(reason, report.rows[0].reason), report.rows[0].reason


@pytest.mark.parametrize("how", ["argument", "environment", "not built"])
def test_a_unit_that_would_end_on_the_reference_is_left(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        monkeypatch.setenv("DIN_FAST_BACKEND", "reference")
    if how == "not built":
        monkeypatch.setattr(native, "_why_not", "the C++ kernel was not built")
    report = din_fast.fuse(rechub().build(), backend="reference" if how == "argument" else "auto")
    reason = "the C\\+\\+ kernel was not built" if how == "not built" else "the reference backend is no faster"
    assert len(report.left) == 1 and re.search(reason, report.rows[0].reason)


def test_a_backend_that_cannot_run_here_leaves_the_unit() -> None:
    report = din_fast.fuse(rechub().build(), backend="triton")
    assert len(report.left) == 1 and "TRITON_INTERPRET" in report.rows[0].reason


def test_another_attention_of_fuxictrs_dien_is_not_ours() -> None:
    layer = hosts.load("model_zoo.LongCTR.DIEN.DIEN").AttentionLayer
    assert din_fast.fuse(layer(D, attention_type="bilinear_attention")).rows == ()


def test_no_framework_is_imported_that_the_user_has_not_imported() -> None:
    names = sorted({name.partition(".")[0] for name in frameworks.HOSTS})
    code = f"""
import sys, torch, din_fast
for name in {names}:
    sys.modules[name] = None  # an import of it would raise
assert din_fast.fuse(torch.nn.Linear(1, 1)).rows == ()
print(sorted(m for m in sys.modules if m.startswith("din_fast.frameworks.")))
"""
    root = Path(din_fast.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['din_fast.frameworks.common']", done.stderr


# The same module as before


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_objects_keys_and_classes_stay_and_unfuse_leaves_nothing(name: str) -> None:
    unit = HOSTS[name].build()
    kind, attributes, state = type(unit), dict(vars(unit)), unit.state_dict()
    tensors = {n: id(t) for n, t in (*unit.named_parameters(), *unit.named_buffers())}
    modules = [id(m) for m in unit.modules()]
    din_fast.fuse(unit, strict=True)
    HOSTS[name].call(unit, X)
    assert isinstance(unit, kind) and isinstance(unit, Fused) and unit.last_backend == "native"
    assert list(unit.state_dict()) == list(state)
    assert {n: id(t) for n, t in (*unit.named_parameters(), *unit.named_buffers())} == tensors
    assert [id(m) for m in unit.modules()] == modules
    assert din_fast.unfuse(unit) == 1
    assert type(unit) is kind and list(vars(unit)) == list(attributes)


@EVERY_MODEL
def test_a_copy_a_pickle_and_a_saved_model_compute_the_same(name: str, tmp_path: Path) -> None:
    model = double(MODELS[name]).eval()
    x = batch(name, 0)
    din_fast.fuse(model, strict=True)
    right = output(name, model, x)
    torch.save(model, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved):
        assert torch.equal(output(name, twin, x), right)
        assert [u.last_backend for u in fused_units(twin)] == ["native"] * len(fused_units(model))
        assert din_fast.unfuse(twin) == len(fused_units(model)) and not fused_units(twin)


@EVERY_MODEL
def test_checkpoints_both_ways(name: str) -> None:
    model, x = MODELS[name], batch(name, 0)
    plain, ours = double(model, 1).eval(), double(model, 2).eval()
    din_fast.fuse(ours, strict=True)
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert_near(name, output(name, ours, x), output(name, plain, x), 1e-12)
    other = double(model, 3).eval()
    plain.load_state_dict(other.state_dict(), strict=True)
    ours.load_state_dict(other.state_dict(), strict=True)
    assert_near(name, output(name, ours, x), output(name, plain, x), 1e-12)
    plain.load_state_dict(ours.state_dict(), strict=True)


def test_hooks_of_the_unit_run() -> None:
    unit, seen = rechub().build(), []
    unit.register_forward_hook(lambda module, args, out: seen.append("before the swap"))
    din_fast.fuse(unit)
    unit.register_forward_pre_hook(lambda module, args: seen.append("after it"))
    unit(X.history, X.target)
    assert seen == ["after it", "before the swap"] and unit.last_backend == "native"


# Training


def double(model: Model, seed: int = 0) -> nn.Module:
    """A model in float64 with parameters that none of its initialisers gives."""
    torch.set_default_dtype(torch.float32)
    built = model.build().double()
    torch.set_default_dtype(torch.float64)
    randomise(built, torch.Generator().manual_seed(seed))
    return built


@pytest.fixture(autouse=True)
def _float64_by_default() -> Iterator[None]:
    """Some hosts create tensors of the default dtype in their forward."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(name: str, seed: int) -> Clicks:
    return clicks(seed, 1 if name == "FuxiCTR DIEN" else 0)  # which packs its sequences


def output(name: str, model: nn.Module, x: Clicks) -> Tensor:
    return MODELS[name].probability(model(*MODELS[name].arguments(x)))


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[Tensor]:
    """A step on each seed's batch; the losses."""
    losses = []
    for seed in seeds:
        x = batch(name, seed)
        probability = output(name, model, x)
        loss = nn.functional.binary_cross_entropy(probability, x.label.to(probability.dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@EVERY_MODEL
def test_an_optimizer_goes_on_over_the_swap_and_back(name: str) -> None:
    """Adam, float64: 5 steps as it was, 10 fused, 5 unfused, against 20 as it was."""
    plain = double(MODELS[name])
    ours = copy.deepcopy(plain)
    adam, ours_adam = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (plain, ours))
    right = train(name, plain, adam, range(20))
    found = train(name, ours, ours_adam, range(5))
    din_fast.fuse(ours, strict=True)
    found += train(name, ours, ours_adam, range(5, 15))
    assert {u.last_backend for u in fused_units(ours)} == {"native"}
    din_fast.unfuse(ours)
    found += train(name, ours, ours_adam, range(15, 20))
    assert_near("losses", torch.stack(found), torch.stack(right), 1e-9)
    for (key, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_near(key, a, b, 1e-8)


@pytest.mark.parametrize("name", [name for name in MODELS if "DIEN" not in name])
def test_twenty_training_steps_by_the_rule(name: str) -> None:
    """float32 with momentum: losses, parameters and running statistics after it, pooled over three starts."""
    comparison = Comparison(torch.float32)
    for seed in range(3):
        truth = double(MODELS[name], seed)
        plain = copy.deepcopy(truth).float()
        truth.load_state_dict(plain.state_dict())
        ours = copy.deepcopy(plain)
        din_fast.fuse(ours, strict=True)
        found = []
        for model in (truth, plain, ours):
            dtype = next(model.parameters()).dtype
            torch.set_default_dtype(dtype)
            sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            losses = train(name, model, sgd, range(20 * seed, 20 * seed + 20))
            tensors = {k: t for k, t in model.state_dict().items() if t.is_floating_point()}
            found.append({"losses": torch.stack(losses), **tensors})
        torch.set_default_dtype(torch.float64)
        assert {u.last_backend for u in fused_units(ours)} == {"native"}
        comparison.add(*found)
    comparison.check()


def test_fuxictrs_initialiser_finds_the_linears() -> None:
    models = [MODELS["FuxiCTR"].build() for _ in range(2)]
    din_fast.fuse(models[1], strict=True)
    for model in models:
        torch.manual_seed(3)
        model.reset_parameters()  # type: ignore[operator]
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)


def test_recboles_initialiser_finds_the_linears() -> None:
    models = [MODELS["RecBole"].build() for _ in range(2)]
    din_fast.fuse(models[1], strict=True)
    for model in models:
        torch.manual_seed(3)
        model.apply(model._init_weights)  # type: ignore[arg-type]
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("first", ["fuse", "convert"])
@pytest.mark.parametrize("name", ["rechub", "deepctr dice", "fuxictr dice norm float", "easyrec norm dice"])
def test_synchronised_batch_norms_before_and_after(name: str, first: str) -> None:
    host, x = HOSTS[name], X
    plain = host.build()
    ours = copy.deepcopy(plain)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if first == "fuse":
        din_fast.fuse(ours, strict=True)
        ours = convert(ours)
    else:
        ours = convert(ours)
        din_fast.fuse(ours, strict=True)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in ours.modules())
    assert_near(name, host.call(ours, x), host.call(plain, x), 1e-10)  # one process: as a BatchNorm
    assert ours.last_backend == "native"


# A unit that changes after it was fused


def test_what_is_changed_in_place_counts_at_the_next_call() -> None:
    host, x = rechub(dims=[8]), X
    plain: Any = host.build().double().eval()
    ours = fused(plain, "native")
    changes: list[Callable[[Any], object]] = [
        lambda u: u.attention.mlp[0].weight.data.mul_(1.5),
        lambda u: setattr(u, "use_softmax", True),
        lambda u: setattr(u.attention.mlp[2], "epsilon", 0.1),
        lambda u: u.attention.mlp.__setitem__(2, nn.Sigmoid()),
        lambda u: u.train(),
        lambda u: u.attention.mlp[1].eval(),
        lambda u: u.attention.mlp.__delitem__(1),
    ]
    before = host.call(plain, x)
    for i, change in enumerate(changes):
        change(plain)
        change(ours)
        right = host.call(plain, x)
        assert_near(str(i), host.call(ours, x), right, 1e-12)
        assert ours.last_backend == "native" and not torch.allclose(right, before)
        before = right


@pytest.mark.parametrize("how", ["activation", "hook"])
def test_what_only_the_host_can_do_runs_in_its_code_with_a_warning(how: str) -> None:
    host, x = rechub(dims=[8]), X
    plain: Any = host.build()
    auto, named = fused(plain, "auto"), fused(plain, "native")
    for unit in (plain, auto, named):
        if how == "activation":
            unit.attention.mlp[2] = nn.GELU()
        else:
            unit.attention.mlp[2].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(RuntimeWarning, match="leaves it to the framework's own code: FusedActivationUnit"):
        found = host.call(auto, x)
    assert torch.equal(found, host.call(plain, x)) and auto.last_backend == "host"
    with pytest.raises(
        RuntimeError, match="backend 'native' cannot run: FusedActivationUnit cannot run on the kernels"
    ):
        host.call(named, x)


# Inputs that only some hosts take


def test_deepctrs_query_for_each_position_runs_in_its_code() -> None:
    unit = deepctr().build()
    ours = fused(unit, "auto")
    arguments = torch.randn(B, L, D), torch.randn(B, L, D), torch.full((B, 1), L)
    with pytest.warns(RuntimeWarning, match="a query for each position"):
        found = ours(*arguments)
    assert torch.equal(found, unit(*arguments)) and ours.last_backend == "host"


@pytest.mark.parametrize("name", ["deepctr dice softmax", "recbole sigmoid", "easyrec norm relu, short"])
@pytest.mark.parametrize(
    "lengths",
    [
        torch.tensor([-1, 0, 3, L, L + 4, 1]),
        torch.tensor([0, 2, 1, 9, 3, 4], dtype=torch.int32),
        torch.tensor([0.0, 1.5, 2.0, 9.5, 3.0, 1.0]),
    ],
    ids=["beyond", "int32", "float"],
)
def test_lengths_of_any_kind(name: str, lengths: Tensor, backend: str) -> None:
    host = HOSTS[name]
    unit = host.build().eval()
    x = replace(X, lengths=lengths)
    ours = fused(unit, backend)
    assert_near(name, host.call(ours, x), host.call(unit, x), 1e-12)
    assert ours.last_backend == backend


def test_deepctr_with_masking_wants_a_mask() -> None:
    ours = fused(deepctr(masking=True).build(), "native")
    with pytest.raises(ValueError, match="input must support masking"):
        ours(torch.randn(B, 1, D), torch.randn(B, L, D), torch.full((B, 1), L))


AUTOCAST = {
    "rechub": ("ragged", False),
    "deepctr dice softmax": ("ragged", True),
    "deepctr sigmoid scores softmax": ("ragged", True),
    "fuxictr relu float softmax": ("ragged", False),
    "fuxictr relu": ("ragged", False),
    "easyrec relu": ("ragged", True),
    "recbole sigmoid": ("ragged", False),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_the_hosts_dtype_and_its_nan(name: str, dtype: torch.dtype, backend: str) -> None:
    """A fill of -2**31 is -inf in float16: a softmax over nothing is NaN there."""
    host = HOSTS[name]
    unit = host.build().float().eval()
    ours = fused(unit, backend)
    x = draw(AUTOCAST[name][0], 1, garbage=False).to(torch.float32)
    torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype), torch.no_grad():
        right, found = host.call(unit, x), host.call(ours, x)
    assert found.dtype == right.dtype and ours.last_backend == backend
    assert torch.equal(found.isnan(), right.isnan())
    assert right.isnan().any() == (AUTOCAST[name][1] and dtype == torch.float16)
    torch.testing.assert_close(found, right, rtol=0, atol=16 * torch.finfo(dtype).eps, equal_nan=True)


def test_deepctrs_own_initial_weights(backend: str) -> None:
    """N(0, 1e-4), and embeddings as small: the variance is far below the squared mean."""
    comparison = Comparison(torch.float32)
    torch.set_default_dtype(torch.float32)
    host = HOSTS["deepctr dice"]
    for seed in range(8):
        plain = host.build()
        x = draw("ragged", seed)
        x = replace(x, history=1e-4 * x.history, target=1e-4 * x.target)
        ours, truth = fused(plain, backend), copy.deepcopy(plain).double()
        found = [host.call(u, d).detach() for u, d in ((truth, x.to(torch.float64)), (plain, x), (ours, x))]
        comparison.add(*({"output": t} for t in found))
        assert ours.last_backend == backend
    comparison.check()


def test_dropout_is_told_and_drops(backend: str) -> None:
    host = fuxictr(attention_units=[64], dropout_rate=0.5)
    unit = host.build()
    report = din_fast.fuse(copy.deepcopy(unit))
    assert "random numbers of its own" in report.rows[0].reason
    ours, x = fused(unit, backend), X
    drawn = [torch.stack([host.call(u, x).detach() for _ in range(400)]) for u in (unit, ours)]
    assert ours.last_backend == backend
    spread, error = drawn[0].std(0), (drawn[0].mean(0) - drawn[1].mean(0)).abs()
    assert (error <= 6 * spread * (2 / 400) ** 0.5).all()
    torch.testing.assert_close(drawn[1].std(0), spread, rtol=0.3, atol=1e-9)
    assert_near("eval", host.call(ours.eval(), x), host.call(unit.eval(), x), 1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "fuxictr relu float softmax", "easyrec windows"])
def test_compiles_in_one_graph(name: str, training: bool, backend: str) -> None:
    host, x = HOSTS[name], X
    unit = fused(host.build().train(training), backend)
    twin = copy.deepcopy(unit)
    torch._dynamo.reset()
    compiled: Any = torch.compile(
        lambda *arguments: host.call(twin, Drawn(*arguments)), fullgraph=True, backend="eager"
    )
    found = compiled(x.history, x.target, x.valid, x.lengths, x.seed)
    assert_near(name, found, host.call(unit, x), 1e-12)
    assert unit.last_backend == backend
    for (key, a), b in zip(twin.state_dict().items(), unit.state_dict().values(), strict=True):
        assert_near(key, a, b, 1e-12)


# verify, benchmark


def test_verify_prints_the_errors_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    model = rechub_model()
    randomise(model, torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    report = din_fast.fuse(model, verify=MODELS["torch-rechub"].arguments(clicks(0)))
    assert capsys.readouterr().out.strip() == report.verification
    rows = [line.split("  ") for line in report.verification.splitlines()[2:]]
    errors = {row[0]: [float(x) for x in row[1:] if x.strip()] for row in rows}
    expected = {"output 0", *(f"grad {n}" for n, _ in model.named_parameters())}
    assert set(errors) == expected | {n for n, _ in model.named_buffers() if "running" in n}
    size = max(e[0] for e in errors.values())
    assert all(was <= 1e-5 * size and now <= 1e-5 * size for _, was, now in errors.values())
    assert any(now != was for _, was, now in errors.values())  # it is not the same code twice
    assert all(torch.equal(a, before[k]) for k, a in model.state_dict().items())
    assert fused_units(model)[0].last_backend is None  # it ran on copies


def test_verify_takes_a_single_argument_and_shows_a_wrong_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["DeepCTR-Torch"].build()
    module = sys.modules["din_fast.frameworks.deepctr_torch"]
    monkeypatch.setattr(module, "run", lambda *a, **k: 1.5 * run(*a, **k))
    randomise(model, torch.Generator().manual_seed(0))
    (x,) = MODELS["DeepCTR-Torch"].arguments(clicks(0))
    report = din_fast.fuse(model, verify=x, dry_run=True)
    line = next(row for row in report.verification.splitlines() if row.startswith("output 0"))
    before, now = (float(n) for n in line.split()[-2:])
    assert before <= 1e-12 and now > 1e-3
    assert not fused_units(model)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_benchmark_tells_the_step_and_the_share(
    training: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("din_fast.step_times.SECONDS", 0.02)
    monkeypatch.setattr(torch, "compile", lambda module: torch._dynamo.optimize("eager")(module))
    torch.set_default_dtype(torch.float32)
    model = rechub_model().train(training)
    before = copy.deepcopy(model.state_dict())
    found = din_fast.benchmark(model, MODELS["torch-rechub"].arguments(clicks(0)))
    printed = capsys.readouterr().out
    assert [t.form for t in found] == ["eager", "compiled", "fused"] and all(t.form in printed for t in found)
    assert all(t.units > 0 and t.step > 0 for t in found) and "2 units" in printed
    assert ("backward" in printed) == training
    assert not fused_units(model) and all(torch.equal(a, before[k]) for k, a in model.state_dict().items())


def test_benchmark_wants_a_unit() -> None:
    with pytest.raises(ValueError, match="model: expected a unit that can be fused, found none"):
        din_fast.benchmark(rechub(activation="softmax").build(), (X.history, X.target))


# Units of one's own


class MyAttention(nn.Module):
    """An in-house unit: masked softmax over [k, q, q*k], no host of ours."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 * D, 8), activation(), nn.Linear(8, 1))

    def forward(self, target: Tensor, clicks: Tensor, mask: Tensor) -> Tensor:
        q = target.unsqueeze(1).expand_as(clicks)
        score = self.net(torch.cat([clicks, q, q * clicks], dim=-1)).squeeze(2)
        return torch.einsum("bl,bld->bd", score.masked_fill(~mask, -1e9).softmax(dim=1), clicks)


class FusedMyAttention(Fused, MyAttention):
    framework = "in-house"
    host = MyAttention

    @staticmethod
    def plan(unit: Any) -> Any:
        check_children(unit)
        return read(unit.net, D, blocks=("k", "q", "q*k"), softmax=True, empty="uniform")

    def forward(self, target: Tensor, clicks: Tensor, mask: Tensor) -> Tensor:
        plan = live(self)
        if plan is None:
            return super().forward(target, clicks, mask)
        return run(self, plan, target, clicks, mask)


def test_a_registered_unit(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(frameworks, "_registered", [])
    unit, x = MyAttention(), X
    assert din_fast.fuse(unit).rows == ()

    @din_fast.register
    def recognise(module: nn.Module) -> type[Fused] | str | None:
        if isinstance(module, MyAttention) and len(module.net) > 4:
            return "too deep for us"
        return FusedMyAttention if type(module) is MyAttention else None

    right = unit(x.target, x.history, x.valid)
    report = din_fast.fuse(unit, backend=backend)
    assert [(row.framework, row.unit) for row in report.fused] == [("in-house", "MyAttention")]
    assert_near("in-house", unit(x.target, x.history, x.valid), right, 1e-12)
    assert unit.last_backend == backend
    twin = pickle.loads(pickle.dumps(unit))
    assert din_fast.unfuse(twin) == 1 and type(twin) is MyAttention
    deep = MyAttention()
    deep.net.extend([nn.ReLU(), nn.ReLU()])
    assert [(row.framework, row.reason) for row in din_fast.fuse(deep).left] == [("tests", "too deep for us")]
    assert "unsupported activation GELU" in din_fast.fuse(MyAttention(nn.GELU)).rows[0].reason


def test_register_wants_a_callable() -> None:
    with pytest.raises(TypeError, match="recogniser: expected a callable, got int"):
        din_fast.register(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "rechub prelu", "fuxictr prelu", "fuxictr norm relu", "recbole none"])
def test_one_unit_from_a_module(name: str, training: bool, backend: str) -> None:
    """A unit of our class with a copy of the weights; masks and shapes are our own."""
    host, x = HOSTS[name], X
    module = host.build().train(training)
    randomise(module, torch.Generator().manual_seed(0))
    unit = FusedActivationUnit.from_module(module, backend=backend)
    valid = None if name.startswith("rechub") else x.valid
    found = unit(x.history, x.target, valid)
    assert unit.last_backend == backend and unit.training == training
    assert_near(name, found, host.call(module, x).reshape(found.shape), 1e-11)
    theirs = {p.data_ptr() for p in (*module.parameters(), *module.buffers())}
    assert not theirs & {p.data_ptr() for p in (*unit.parameters(), *unit.buffers())}
    plain = unit.attention(torch.randn(3, len(unit.spec.blocks) * D))  # the MLP alone is an ordinary module
    assert plain.shape == (3, 1)


@pytest.mark.parametrize(
    ("module", "reason"),
    [(nn.Linear(1, 1), "Linear is not known"), (lambda: rechub(activation="softmax").build(), "activation Softmax")],
    ids=["unknown", "unsupported"],
)
def test_from_a_module_that_cannot_be(module: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"module: expected a unit that din_fast.fuse can fuse: .*{reason}"):
        FusedActivationUnit.from_module(module if isinstance(module, nn.Module) else module())


def test_from_torch_rechubs_unit_is_the_preset() -> None:
    spec = FusedActivationUnit.from_module(rechub(dims=[8]).build()).spec
    assert replace(spec, dropout=0.0) == preset("rechub", [8])

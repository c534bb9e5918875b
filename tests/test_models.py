"""DIN as a whole model: the fused unit in it against the reference, its heads, its pads, its baselines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from din_fast import FusedActivationUnit, UnitSpec, preset
from din_fast.models import (
    DIN,
    Dense,
    Feature,
    History,
    Sparse,
    click_loss,
    click_probability,
    dot_attention,
    sum_pooling,
)
from tests.truth import Comparison, assert_near, randomise

BATCH, LENGTH = 32, 12
# Candidates' embeddings of different sizes; "items" is also the name of a method of torch's ModuleDict.
FEATURES: list[Feature] = [
    Dense("age"),
    Sparse("user", 30, 5),
    Sparse("items", 60, 8),
    History("clicked", "items"),
    Dense("statistics", 3),
    Sparse("cate", 12, 6),
    History("clicked_cate", "cate"),
]
SPECS = {
    "rechub": preset("rechub", [16, 8]),
    "fuxictr": preset("fuxictr", [16, 8], softmax=True),
    "deepctr": preset("deepctr", [12, 6]),
}
EVERY_UNIT = pytest.mark.parametrize("concatenate", [False, True], ids=["unit-per-history", "one-unit"])
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def model(attention: str = "reference", dtype: torch.dtype = torch.float64, **options: Any) -> DIN:
    backend = "native" if attention == "fused" else "auto"
    din = DIN(FEATURES, attention=attention, backend=backend, hidden_units=(24, 12), **options).to(dtype)
    randomise(din, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("items", "cate"):
            din.get_parameter(f"embeddings.of_{name}.weight")[0] = 0.0  # the pad, as it is first
    return din


def fused(plain: DIN, **options: Any) -> DIN:
    """The same model with fused units, by a strict load."""
    dtype = next(plain.parameters()).dtype
    din = model("fused", dtype, **options).train(plain.training)
    din.load_state_dict(plain.state_dict(), strict=True)
    return din


def batches(count: int, shortest: int = 0) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Histories of different lengths, padded at the end; random clicks."""
    g = torch.Generator().manual_seed(2)

    def ids(size: int, *shape: int) -> Tensor:
        return torch.randint(1, size, shape, generator=g)

    for _ in range(count):
        pads = torch.arange(LENGTH) >= torch.randint(shortest, LENGTH + 1, (BATCH, 1), generator=g)
        x = {
            "age": torch.randn(BATCH, generator=g),
            "statistics": torch.randn(BATCH, 3, generator=g),
            "user": ids(30, BATCH),
            "items": ids(60, BATCH),
            "cate": ids(12, BATCH).int(),
            "clicked": ids(60, BATCH, LENGTH).masked_fill(pads, 0),
            "clicked_cate": ids(12, BATCH, LENGTH).masked_fill(pads, 0).int(),
        }
        yield x, torch.randint(0, 2, (BATCH,), generator=g)


def batch(shortest: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    return next(batches(1, shortest))


def results(din: DIN, x: dict[str, Tensor], clicks: Tensor) -> dict[str, Tensor]:
    """Logits, every gradient and the running statistics after one step."""
    din.zero_grad()
    logits = din(x)
    click_loss(logits, clicks).backward()
    grads = {f"grad {name}": p.grad for name, p in din.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(din.parameters()))
    return {"output": logits.detach(), **grads, **{n: b.clone() for n, b in din.named_buffers() if "running" in n}}


def assert_native(din: DIN, count: int) -> None:
    assert len(din.units) == count
    for unit in din.units:
        assert isinstance(unit, FusedActivationUnit) and unit.last_backend == "native"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@EVERY_UNIT
@EVERY_SPEC
def test_logits_and_every_gradient(spec: UnitSpec, concatenate: bool, training: bool) -> None:
    """In float32, by the rule of tests/truth.py, the reference in float64 being the truth."""
    comparison = Comparison(torch.float32)
    options: dict[str, Any] = {"spec": spec, "concatenate": concatenate}
    for x, clicks in batches(8):
        plain = model(dtype=torch.float32, **options).train(training)
        ours = fused(plain, **options)
        truth = copy.deepcopy(plain).double()
        comparison.add(*(results(din, x, clicks) for din in (truth, plain, ours)))
        assert_native(ours, 1 if concatenate else 2)
    comparison.check()


@EVERY_UNIT
@EVERY_SPEC
def test_twenty_adam_steps(spec: UnitSpec, concatenate: bool) -> None:
    """In float64 the losses of both stay together."""
    options: dict[str, Any] = {"spec": spec, "concatenate": concatenate}
    plain = model(**options)
    both = (plain, fused(plain, **options))
    optimizers = [torch.optim.Adam(din.parameters(), lr=1e-3, weight_decay=1e-5) for din in both]
    for x, clicks in batches(20):
        losses = []
        for din, optimizer in zip(both, optimizers, strict=True):
            loss = click_loss(din(x), clicks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert_near("loss", losses[1], losses[0], 1e-10)
    assert_native(both[1], 1 if concatenate else 2)


@EVERY_UNIT
@EVERY_SPEC
def test_checkpoints_load_strictly_in_both_directions(spec: UnitSpec, concatenate: bool) -> None:
    options: dict[str, Any] = {"spec": spec, "concatenate": concatenate}
    plain = model(**options)
    ours = fused(plain, **options)
    x, clicks = batch()
    click_loss(ours(x), clicks).backward()
    torch.optim.Adam(ours.parameters()).step()
    back = model(**options)
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_near("logits", back.eval()(x), ours.eval()(x), 1e-10)
    assert_native(ours, 1 if concatenate else 2)


@EVERY_UNIT
def test_the_forward_written_out(concatenate: bool) -> None:
    din = model(concatenate=concatenate).eval()
    x, _ = batch()

    def embedded(table: str, name: str) -> Tensor:
        return din.get_parameter(f"embeddings.of_{table}.weight")[x[name].long()]

    histories = [embedded("items", "clicked"), embedded("cate", "clicked_cate")]
    candidates = [embedded("items", "items"), embedded("cate", "cate")]
    valid = x["clicked"] != 0
    if concatenate:
        interests = [din.units[0](torch.cat(histories, dim=2), torch.cat(candidates, dim=1), valid)]
    else:
        interests = [unit(k, q, valid) for unit, k, q in zip(din.units, histories, candidates, strict=True)]
    dense = [x["age"].double().unsqueeze(1), x["statistics"].double()]
    inputs = torch.cat([*dense, embedded("user", "user"), *candidates, *interests], dim=1)
    assert_near("logits", din(x), din.top(inputs).squeeze(1), 1e-12)


@pytest.mark.parametrize("attention", ["fused", "dot", "none"])
def test_heads(attention: str) -> None:
    """Two logits are one logit, their difference: the same probabilities and the same loss."""
    x, clicks = batch()
    din = model(attention, outputs=2)
    two = din(x)
    one = two[:, 1] - two[:, 0]
    assert two.shape == (BATCH, 2) and model(attention)(x).shape == (BATCH,)
    assert_near("probability", click_probability(two), one.sigmoid(), 1e-12)
    assert_near("probability", click_probability(one), one.sigmoid(), 0)
    assert_near("loss", click_loss(two, clicks.float()), click_loss(one, clicks), 1e-12)
    if attention == "fused":
        assert_native(din, 2)


@EVERY_UNIT
@pytest.mark.parametrize("attention", ["fused", "reference", "dot", "none"])
def test_a_pad_reaches_nothing_in_evaluation(attention: str, concatenate: bool) -> None:
    """Neither the pads' embedding nor their number."""
    din = model(attention, concatenate=concatenate).eval()
    x, _ = batch()
    before = din(x)
    with torch.no_grad():
        for name in ("items", "cate"):
            din.get_parameter(f"embeddings.of_{name}.weight")[0] = 1e3
    pads = {name: torch.nn.functional.pad(x[name], (0, 5)) for name in ("clicked", "clicked_cate")}
    assert torch.equal(din(x), before)
    assert_near("more pads", din({**x, **pads}), before, 1e-10)
    if attention == "fused":
        assert_native(din, 1 if concatenate else 2)


def test_the_pad_stays_zero_in_training() -> None:
    din = DIN(FEATURES, backend="native")
    optimizer = torch.optim.Adam(din.parameters(), lr=0.1)
    for x, clicks in batches(3):
        optimizer.zero_grad()
        click_loss(din(x), clicks).backward()
        optimizer.step()
    assert_native(din, 2)
    for name in ("items", "cate"):
        weight = din.get_parameter(f"embeddings.of_{name}.weight")
        assert (weight[0] == 0).all() and (weight[1:] != 0).all()
    assert (din.get_parameter("embeddings.of_user.weight")[0] != 0).all()  # no history, no pad


def test_pads_may_stand_anywhere() -> None:
    """The weights know no order: positions shuffled together give the same logits."""
    din = model("fused").eval()
    x, _ = batch()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    shuffled = {name: x[name][:, order] for name in ("clicked", "clicked_cate")}
    assert_near("logits", din({**x, **shuffled}), din(x), 1e-10)
    assert_native(din, 2)


def test_dot_attention_is_its_formula() -> None:
    history, target = torch.randn(4, 7, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    valid = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    valid[3] = False
    history.requires_grad_()
    out = dot_attention(history, target, valid)
    for b in range(3):
        keys = history[b, valid[b]]
        weights = (keys @ target[b] / 6**0.5).softmax(dim=0)
        assert_near("pooled", out[b], weights @ keys, 1e-12)
    assert (out[3] == 0).all()
    out.sum().backward()
    assert history.grad is not None and (history.grad[~valid] == 0).all()


def test_sum_pooling_is_its_formula() -> None:
    history, valid = torch.randn(3, 5, 2), torch.tensor([[1, 1, 0, 0, 1], [1] * 5, [0] * 5]).bool()
    assert_near("sum", sum_pooling(history, valid)[0], history[0, [0, 1, 4]].sum(0), 1e-6)
    assert_near("sum", sum_pooling(history, valid)[1], history[1].sum(0), 1e-6)
    assert (sum_pooling(history, valid)[2] == 0).all()


def test_the_base_model_sees_no_candidate_in_its_history() -> None:
    """Its pooled history depends on the history alone; DIN's does not."""
    x, _ = batch(shortest=2)
    other = {**x, "items": x["items"].roll(1), "cate": x["cate"].roll(1)}
    for attention, same in (("none", True), ("dot", False), ("fused", False)):
        din = model(attention).eval()
        inputs: list[Tensor] = []
        din.top.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0][:, -14:]))
        din(x), din(other)
        assert torch.equal(*inputs) is same


def test_two_histories_of_one_candidate() -> None:
    features = [Sparse("item", 20, 4), History("clicked", "item"), History("bought", "item")]
    x = {"item": torch.randint(1, 20, (6,)), "clicked": torch.randint(0, 20, (6, 9)), "bought": torch.zeros(6, 3).int()}
    din = DIN(features, backend="native")
    assert din(x).shape == (6,)
    assert_native(din, 2)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([Sparse("item", 9, 4)], ValueError, "features: expected at least one History, got none"),
        ([*FEATURES, Sparse("age", 9, 4)], ValueError, "features: expected different names"),
        (
            [*FEATURES, History("h", "shop")],
            ValueError,
            "expected a Sparse feature as the candidate of 'h', got 'shop'",
        ),
        ([*FEATURES, History("h", "age")], ValueError, "expected a Sparse feature as the candidate of 'h', got 'age'"),
        ([*FEATURES, Dense("a.b")], ValueError, "features: expected a name without dots, got 'a.b'"),
        ([*FEATURES, "item"], TypeError, "features: expected Dense, Sparse or History, got str"),
    ],
)
def test_bad_features(features: list[Feature], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DIN(features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "softmax"}, "attention: expected one of fused, reference, dot, none; got 'softmax'"),
        ({"attention": "dot", "spec": preset("rechub")}, "spec: expected None with attention 'dot'"),
        ({"spec": UnitSpec(pooling="none")}, "spec: expected one that pools"),
        ({"attention": "none", "backend": "native"}, "backend: expected 'auto' with attention 'none'"),
        ({"backend": "cuda"}, "backend: expected one of .*; got 'cuda'"),
        ({"hidden_units": (8, 0)}, "hidden_units: expected a positive int, got 0"),
        ({"outputs": 3}, "outputs: expected 1 or 2, got 3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIN(FEATURES, **options)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="vocabulary: expected a positive int, got 0"):
        Sparse("item", 0, 4)
    with pytest.raises(ValueError, match=r"dim: expected a positive int, got 2\.0"):
        Sparse("item", 9, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width: expected a positive int, got -1"):
        Dense("age", -1)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "age",
            torch.zeros(BATCH, 2),
            ValueError,
            r"x\['age'\]: expected the shape \(32, 1\) or \(32,\), got \(32, 2\)",
        ),
        ("statistics", torch.zeros(BATCH), ValueError, r"expected the shape \(32, 3\), got \(32,\)"),
        ("user", torch.zeros(BATCH - 1).int(), ValueError, r"x\['user'\]: expected the shape \(32,\), got \(31,\)"),
        ("user", torch.zeros(BATCH), TypeError, r"x\['user'\]: expected int32 or int64 ids, got torch.float32"),
        ("items", torch.full((BATCH,), 60), ValueError, r"x\['items'\]: expected ids from 0 to 59, got 60 to 60"),
        ("clicked", torch.full((BATCH, 3), -1), ValueError, r"x\['clicked'\]: expected ids from 0 to 59, got -1 to -1"),
        ("clicked", torch.zeros(BATCH).int(), ValueError, r"x\['clicked'\]: expected the shape"),
    ],
)
def test_bad_input_changes_nothing(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    din = model("fused")
    before = copy.deepcopy(din.state_dict())
    x, _ = batch()
    with pytest.raises(error, match=message):
        din({**x, name: value})
    del x[name]
    with pytest.raises(ValueError, match=f"x: expected a tensor for each feature, got none for {name!r}"):
        din(x)
    assert all(torch.equal(before[key], value) for key, value in din.state_dict().items())


def test_concatenated_histories_must_have_one_length() -> None:
    x, _ = batch()
    x["clicked_cate"] = x["clicked_cate"][:, :5]
    with pytest.raises(ValueError, match=r"x\['clicked_cate'\]: expected the shape \(32, 12\), got \(32, 5\)"):
        model("fused", concatenate=True)(x)
    assert model("fused")(x).shape == (BATCH,)

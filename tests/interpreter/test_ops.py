"""Triton's ops below the unit: ragged histories, candidate groups, the gradient of the weights, layouts, odd sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from din_fast import FusedActivationUnit, UnitSpec, functional, preset, reference
from tests.interpreter.honest import GUARD
from tests.test_op_family import (
    DENSE,
    LENGTHS,
    RESERVED,
    WEIGHTED,
    D,
    N,
    arguments_of,
    ragged_and_padded,
    rows_of,
    run,
    starts_and_lengths,
)
from tests.test_ops import Model, batch
from tests.test_padding import pads_reach_nothing
from tests.truth import SPECS, Case, assert_near, draw, fused_unit, randomise, step

RAGGED = {name: SPECS[name] for name in ("rechub-two-layers-softmax", "fuxictr-three-layers", "deepctr", "blog")}
RAGGED["no-hidden-layer"] = preset("rechub", [])
DOUBLE = ("response", "sums")  # float64 whatever the dtype


def single(value: Any) -> Any:
    if isinstance(value, list):
        return [single(v) for v in value]
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def single_arguments(spec: UnitSpec, history: Tensor, query: Tensor, **changes: Any) -> dict[str, Any]:
    """The arguments of the ops, float32."""
    found = arguments_of(spec, history, query, **changes)
    return {name: value if name in DOUBLE else single(value) for name, value in found.items()}


# ---- ragged histories


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_inference_is_the_padded_one(name: str) -> None:
    ragged, padded = ragged_and_padded(fill=torch.nan)
    starts, lengths = starts_and_lengths()
    query = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    before = GUARD.launches
    right = run("triton", "infer", single_arguments(RAGGED[name], padded, query, lengths=lengths))
    found = run("triton", "infer", single_arguments(RAGGED[name], ragged, query, starts=starts, lengths=lengths))
    assert GUARD.launches == before + 2
    assert_near("pooled", found[0], right[0], 1e-5)
    for b, scores in enumerate(rows_of(found[1])):
        assert_near(f"scores {b}", scores, right[1][b, : LENGTHS[b]], 1e-5)


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_forward_and_backward_are_the_padded_ones(name: str) -> None:
    """The rows that belong to nobody hold NaN and get a gradient of zero."""
    starts, lengths = starts_and_lengths()
    upstream = torch.randn(len(LENGTHS), D)
    first_query = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    results = []
    for history, start in zip(ragged_and_padded(fill=torch.nan), (starts, None), strict=True):
        arguments = single_arguments(RAGGED[name], history, first_query, starts=start, lengths=lengths)
        for key in ("history", "query"):
            arguments[key] = arguments[key].requires_grad_()
        for key in ("weights", "affine"):
            arguments[key] = [t.detach().requires_grad_() for t in arguments[key]]
        pooled, scores, _ = run("triton", "forward", arguments)
        leaves = [arguments["history"], arguments["query"], *arguments["weights"]]
        leaves += [a for a in arguments["affine"] if a.numel()]
        loss = (pooled * upstream).sum()
        for b, n in enumerate(LENGTHS):
            loss = loss + (rows_of(scores)[b] if start is not None else scores[b, :n]).square().sum()
        results.append((pooled, torch.autograd.grad(loss, leaves, allow_unused=True)))
    (pooled, (d_history, *grads)), (right_pooled, (right_d_history, *right_grads)) = results
    assert_near("pooled", pooled, right_pooled, 1e-5)
    for b, n in enumerate(LENGTHS):
        assert_near(f"d history {b}", rows_of(d_history)[b], right_d_history[b, :n], 1e-4)
        rows_of(d_history)[b].zero_()
    assert not d_history.any()
    for i, (gradient, right) in enumerate(zip(grads, right_grads, strict=True)):
        if right is None:  # the center is a constant
            assert gradient is None
        else:
            assert_near(f"gradient {i}", gradient, right, 1e-4 * max(1.0, float(right.abs().max())))


def test_ragged_moments_count_the_valid_rows_only() -> None:
    ragged, padded = ragged_and_padded(fill=torch.nan)
    starts, lengths = starts_and_lengths()
    query = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    spec = RAGGED["fuxictr-three-layers"]
    changes = {"starts": starts, "lengths": lengths, "pads_are_input": True, "keep": False}
    mask = torch.arange(DENSE) < lengths[:, None]
    z = reference.features(query, padded, spec.blocks)[mask]
    parameters = fused_unit(spec, D, "native").double().eval().attention.unit_parameters()
    for layer, hidden in enumerate(parameters.hidden):
        z = nn.functional.linear(z, hidden.weight, hidden.bias)
        found = run("triton", "moments", single_arguments(spec, ragged, query, layer=layer, **changes))
        assert found[0] == sum(LENGTHS)
        assert_near("mean", found[1].double(), z.mean(0), 1e-6)
        assert_near("variance", found[2].double() / found[0], z.var(0, unbiased=False), 1e-6)
        z = reference.activate(z, hidden, spec)


@pytest.mark.parametrize(
    ("start", "length"), [(-D, 2), (1, 2), (0, -1), (0, N + 1), ((N - 1) * D, 2), (N * D, 1)], ids=str
)
def test_a_segment_outside_the_rows_is_refused(start: int, length: int) -> None:
    query = torch.randn(2, D, dtype=torch.float64)
    segment = {"starts": torch.tensor([0, start]), "lengths": torch.tensor([3, length])}
    arguments = single_arguments(SPECS["deepctr"], torch.randn(N, D, dtype=torch.float64), query, **segment)
    with pytest.raises(ValueError, match=rf"lengths: expected segments within {N} rows, got start {start} "):
        run("triton", "infer", arguments)


@pytest.mark.parametrize(("start", "length"), [(-D, 2), (70 * D, N + 5), ((N - 1) * D, 4), (N * D + D, 1)], ids=str)
def test_without_the_check_a_kernel_reads_nothing_outside(
    start: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where reading the values first would wait for the device: the guard sees every address."""
    from din_fast.backends.triton import operands

    monkeypatch.setattr(operands, "check_values_wanted", lambda device: False)
    query = torch.randn(2, D, dtype=torch.float64)
    segment = {"starts": torch.tensor([20 * D, start]), "lengths": torch.tensor([3, length])}
    arguments = single_arguments(SPECS["deepctr"], torch.randn(N, D, dtype=torch.float64), query, **segment)
    assert run("triton", "infer", arguments)[0][0].isfinite().all()
    history = torch.randn(2, 5, D, dtype=torch.float64)
    dense = single_arguments(SPECS["blog"], history, query, lengths=torch.tensor([-3, 5 + length * length]))
    assert run("triton", "infer", dense)[0].isfinite().all()
    groups = single_arguments(SPECS["blog"], history, query, candidate_offsets=torch.tensor([-7, 1, 99]))
    assert run("triton", "infer", groups)[0].isfinite().all()
    d = run("triton", "backward", groups | {"kept": groups["response"]})
    assert d[0].isfinite().all()


# ---- candidate groups


@pytest.mark.parametrize("offsets", [[0, 2, 2], [0, 1], [0, 2, 1, 3], [1, 2, 3], [0, 2, 4]], ids=str)
def test_candidate_offsets_that_are_none(offsets: list[int]) -> None:
    history, query = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    arguments = single_arguments(SPECS["blog"], history, query, candidate_offsets=torch.tensor(offsets))
    with pytest.raises(ValueError, match=r"candidate_offsets: expected .* got"):
        run("triton", "infer", arguments)


@pytest.mark.parametrize(("name", "argument"), [r for r in RESERVED if r[1] != "candidate_offsets"])
def test_what_is_not_built_yet_raises_with_its_name(name: str, argument: str) -> None:
    history, query = torch.randn(3, 5, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    arguments = single_arguments(SPECS["deepctr"], history, query)
    with pytest.raises(RuntimeError, match=rf"{argument}: .*not built yet; expected None"):
        run("triton", name, arguments | {argument: torch.randn(3, D)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dropout": 0.5}, "seed: expected int64 of shape .* got None"),
        ({"dropout": 0.5, "seed": torch.tensor(3, dtype=torch.int32)}, "seed: expected int64 .* got torch.int32"),
        ({"dropout": 0.5, "seed": torch.tensor([3])}, r"seed: expected int64 .* shape \(1,\)"),
        ({"dropout": 1.0, "seed": torch.tensor(3)}, "dropout: expected a probability from 0 to below 1, got 1.0"),
        ({"softmax": True, "score_activation": 2}, "score_activation: expected none together with softmax, got prelu"),
        ({"score_activation": 2}, "weights: expected 2 elements in the last, got 1"),
    ],
)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_what_no_kernel_computes_raises(name: str, changes: dict[str, Any], told: str) -> None:
    history, query = torch.randn(3, 5, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=told):
        run("triton", name, single_arguments(SPECS["deepctr"], history, query) | changes)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("counts", [(3, 0, 1), (2, 0), (0, 0, 4)], ids=str)
def test_groups_of_any_size_are_expanded_histories(counts: tuple[int, ...], dropout: float) -> None:
    """As many candidates as users, too; and the dropout is that of the candidates' rows, wherever their history is."""
    spec = SPECS["fuxictr-three-layers"]
    users, candidates = len(counts), sum(counts)
    history = torch.randn(users, 7, D, dtype=torch.float64)
    query = torch.randn(candidates, D, dtype=torch.float64)
    each = torch.tensor(counts)
    lengths = torch.tensor([7, 0, 4])[:users]
    upstream = torch.randn(candidates, D)
    random = {"dropout": dropout, "seed": torch.tensor(3)}
    results = []
    for grouped in (True, False):
        layout: dict[str, Any] = {"lengths": lengths, "candidate_offsets": nn.functional.pad(each.cumsum(0), (1, 0))}
        if not grouped:
            layout = {"lengths": lengths.repeat_interleave(each)}
        rows = history if grouped else history.repeat_interleave(each, 0)
        arguments = single_arguments(spec, rows, query, **layout, **random)
        moments = run("triton", "moments", arguments | {"layer": 2, "keep": False})
        for key in ("history", "query"):
            arguments[key] = arguments[key].requires_grad_()
        arguments["weights"] = [t.detach().requires_grad_() for t in arguments["weights"]]
        pooled, scores, _ = run("triton", "forward", arguments)
        leaves = [arguments["history"], arguments["query"], *arguments["weights"]]
        d_history, *grads = torch.autograd.grad((pooled * upstream).sum(), leaves)
        if not grouped:
            d_history = torch.zeros(users, 7, D).index_add(0, torch.arange(users).repeat_interleave(each), d_history)
        results.append([t.detach() for t in (*moments[:3], pooled, scores, d_history, *grads)])
    for i, (found, right) in enumerate(zip(*results, strict=True)):
        assert_near(f"result {i}", found, right, 1e-4 * max(1.0, float(right.abs().max())))


# ---- dropout


def test_ragged_dropout_counts_the_rows_of_the_flat_history() -> None:
    """Of equal lengths, one behind the other, they are the dense rows."""
    history = torch.randn(4, 21, D, dtype=torch.float64)
    query = torch.randn(4, D, dtype=torch.float64)
    random = {"dropout": 0.4, "seed": torch.tensor(2**40 + 17)}
    dense = single_arguments(SPECS["deepctr"], history, query, **random)
    flat = {"starts": torch.arange(4) * 21 * D, "lengths": torch.full((4,), 21)}
    ragged = single_arguments(SPECS["deepctr"], history.flatten(0, 1), query, **flat, **random)
    right, found = (run("triton", "forward", a) for a in (dense, ragged))
    assert_near("pooled", found[0], right[0], 1e-4)
    assert_near("scores", found[1].view(4, 21), right[1], 1e-5)
    without = run("triton", "forward", dense | {"dropout": 0.0, "seed": None})
    assert not torch.allclose(right[1], without[1])


# ---- the weights of the positions


MORE_WEIGHTED: dict[str, UnitSpec] = {
    "prelu": UnitSpec((7,), activation="tanh", score_activation="prelu", scale_scores=True, dropout=0.3),
    "valid, uniform": SPECS["valid-norm-row-dice-softmax"],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*WEIGHTED, *MORE_WEIGHTED])
def test_the_weights_have_a_gradient(name: str, training: bool) -> None:
    """Of a loss on pooled vectors and weights, whose gradient is a view."""
    spec = (WEIGHTED | MORE_WEIGHTED)[name]
    inputs = draw(Case(spec, (5, 21, D), "both"), 0, torch.float32)
    g_weights = torch.randn(21, 5, dtype=torch.float64).T
    results = []
    for which, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(7)  # of the dropout
        unit = fused_unit(spec, D, which).to(dtype).train(training)
        history, query = (t.to(dtype).requires_grad_() for t in (inputs.history.clone(), inputs.target.clone()))
        found = functional.run(
            query, history, unit.attention.unit_parameters(), unit.spec, inputs.mask, inputs.lengths, which
        )
        assert found.backend == which
        loss = (found.weights * g_weights.to(dtype)).sum() + (found.pooled * inputs.upstream.to(dtype)).sum()
        named = {"history": history, "query": query, **dict(unit.named_parameters())}
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        results.append({"weights": found.weights, **dict(zip(named, grads, strict=True))})
    for key, right in results[1].items():
        assert_near(key, results[0][key].double(), right, 2e-5 * max(1.0, float(right.abs().max())))


# ---- layouts


@pytest.mark.parametrize("layout", ["sliced", "every other row", "transposed", "expanded"])
def test_any_strides(layout: str) -> None:
    """The same bits as contiguous inputs and gradients, and no copy but where the last stride is not 1."""
    spec = preset("fuxictr", [9, 5])
    contiguous = draw(Case(spec, (3, 21, 8), "lengths"), 0, torch.float32)
    history, upstream = contiguous.history, contiguous.upstream
    if layout == "sliced":
        history = torch.cat([torch.full((3, 21, 3), torch.nan), history], dim=2)[..., 3:]
    elif layout == "every other row":
        history = torch.stack([history, torch.full_like(history, torch.nan)], dim=2).flatten(1, 2)[:, ::2]
    elif layout == "transposed":
        history = history.transpose(0, 2).contiguous().transpose(0, 2)
        upstream = upstream.T.contiguous().T
    else:
        upstream = upstream[:1].expand(3, 8)
        contiguous = replace(contiguous, upstream=upstream.contiguous())
    right = step(fused_unit(spec, 8, "triton"), contiguous)
    found = step(fused_unit(spec, 8, "triton"), replace(contiguous, history=history, upstream=upstream))
    for name, tensor in right.items():
        assert torch.equal(found[name], tensor), name


# ---- pads


@pytest.mark.parametrize("pad", [float("nan"), float("inf")])
@pytest.mark.parametrize("masking", ["mask", "lengths"])
@pytest.mark.parametrize(
    "name", ["rechub-two-layers-softmax", "fuxictr-softmax", "fuxictr-three-layers", "blog", "score-prelu-dice-mean"]
)
def test_in_evaluation_pads_reach_neither_output_nor_gradient(name: str, masking: str, pad: float) -> None:
    pads_reach_nothing(SPECS[name], masking, False, "triton", pad)


@pytest.mark.parametrize("name", ["row-dice-without-norm", "mean-over-valid"])
def test_in_training_without_batch_statistics_neither(name: str) -> None:
    pads_reach_nothing(SPECS[name], "both", True, "triton", float("nan"))


@pytest.mark.parametrize("pad", [float("nan"), float("inf")])
@pytest.mark.parametrize("masking", ["mask", "lengths", "both"])
@pytest.mark.parametrize("name", ["valid-dice", "valid-norm-row-dice-softmax", "dropout-prelu-valid"])
def test_pads_reach_no_statistics_over_valid_positions(name: str, masking: str, pad: float) -> None:
    pads_reach_nothing(SPECS[name], masking, True, "triton", pad)


def test_a_history_whose_weights_are_nan_spoils_no_gradient_of_the_parameters() -> None:
    """RecBole's softmax over nothing; with statistics over valid positions its rows take no part."""
    spec = UnitSpec((5, 4), activation="dice_batch", softmax=True, empty="nan", batch_stats="valid")
    inputs = replace(draw(Case(spec, (3, 6, 4)), 0, torch.float32), lengths=torch.tensor([6, 2, 0]))
    found, right = (step(fused_unit(spec, 4, which).train(), inputs) for which in ("triton", "reference"))
    assert found["output"][2].isnan().all() and found["grad history"][2].isnan().all()
    for name, tensor in right.items():
        assert name in ("output", "output without grad", "grad history") or found[name].isfinite().all(), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["valid-dice", "valid-norm-row-dice-softmax"])
def test_statistics_over_no_valid_position(name: str) -> None:
    """Nothing to take them of: what the running ones were stays, and nothing becomes NaN."""
    unit = fused_unit(SPECS[name], 4, "triton").train()
    inputs = replace(draw(Case(unit.spec, (3, 40, 4)), 0, torch.float32), lengths=torch.zeros(3, dtype=torch.int64))
    before = {key: b.clone() for key, b in unit.named_buffers() if "running" in key}
    found = step(unit, inputs)
    for key, tensor in found.items():
        assert torch.equal(tensor, before[key]) if key in before else tensor.isfinite().all(), key
        assert not tensor.any() or not key.startswith("grad attention"), key


# ---- odd sizes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (0, 0, 4)], ids=str)
@pytest.mark.parametrize("name", ["rechub", "fuxictr-three-layers", "blog", "fuxictr-softmax"])
def test_no_sample_or_no_position(name: str, shape: tuple[int, int, int], training: bool) -> None:
    unit = fused_unit(SPECS[name], shape[2], "triton").train(training)
    inputs = draw(Case(SPECS[name], shape), 0, torch.float32)
    before = {key: b.clone() for key, b in unit.named_buffers() if "running" in key}
    found = step(unit, inputs)
    assert found["output"].shape == (shape[0], shape[2]) and not found["output"].any()
    for key, tensor in found.items():
        assert torch.equal(tensor, before[key]) if key in before else not tensor.any(), key


def test_all_histories_empty() -> None:
    unit = fused_unit(preset("deepctr", [6], softmax=True), 4, "triton").train()
    inputs = replace(draw(Case(unit.spec, (3, 40, 4)), 0, torch.float32), lengths=torch.zeros(3, dtype=torch.int64))
    out = unit(inputs.history, inputs.target, lengths=inputs.lengths)
    assert_near("uniform over all rows", out, inputs.history.mean(1), 1e-6)


def test_more_samples_than_a_grid_axis_but_the_first_holds() -> None:
    unit = fused_unit(preset("rechub", [4], "relu"), 4, "triton").eval()
    inputs = draw(Case(unit.spec, (70_001, 1, 4)), 0, torch.float32)
    with torch.no_grad():
        found = unit(inputs.history, inputs.target)
        right = fused_unit(unit.spec, 4, "reference", like=unit)(inputs.history, inputs.target)
    assert unit.last_backend == "triton"
    assert_near("output", found, right, 1e-4)


@pytest.mark.parametrize(
    ("dim", "hidden", "named"),
    [(513, (4,), "history: expected dim of at most 512"), (4, (1025,), "at most 1024 in layer 0"),
     (4, (8, 257), "at most 256 in layer 1"), (4, (8, 8, 300), "at most 256 in layer 2")],
)  # fmt: skip
def test_a_size_beyond_the_kernels_raises(dim: int, hidden: tuple[int, ...], named: str) -> None:
    unit = FusedActivationUnit(dim, spec=UnitSpec(hidden, activation="relu"), backend="triton")
    with pytest.raises(ValueError, match=named):
        unit(torch.randn(2, 3, dim), torch.randn(2, dim))


def test_the_largest_sizes() -> None:
    spec = UnitSpec((1024, 256), activation="relu")
    unit = fused_unit(spec, 512, "triton")
    inputs = draw(Case(spec, (1, 3, 512)), 0, torch.float32)
    with torch.no_grad():
        found = unit(inputs.history, inputs.target)
    right = fused_unit(spec, 512, "reference", like=unit)(inputs.history, inputs.target)
    assert unit.last_backend == "triton"
    assert_near("output", found, right.detach(), 1e-4)


# ---- repeatable, and compiled


@pytest.mark.parametrize("name", ["rechub-two-layers-softmax", "fuxictr-three-layers"])
def test_two_backwards_have_equal_bits(name: str) -> None:
    inputs = draw(Case(SPECS[name], (5, 70, 8), "both"), 0, torch.float32)
    first, second = (step(fused_unit(SPECS[name], 8, "triton").train(), inputs) for _ in range(2))
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_equals_the_eager_one(training: bool) -> None:
    """fullgraph: the unit is in the graph whole; shapes are traced by the fake kernels."""
    torch._dynamo.reset()

    def model() -> Model:
        torch.manual_seed(0)
        unit = fused_unit(preset("fuxictr", [5, 3], softmax=True), 8, "triton")
        return Model(unit, 8).train(training)

    eager, original = model(), model()
    compiled = torch.compile(original, fullgraph=True, backend="aot_eager")
    for size, length in ((4, 9), (3, 7)):
        arguments = batch(size, length)
        right, found = eager(*arguments), compiled(*arguments)
        torch.testing.assert_close(found, right)
        for module, out in ((eager, right), (original, found)):
            module.zero_grad()
            out.square().sum().backward()
        for (key, p), q in zip(eager.named_parameters(), original.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert_near(key, q.grad, p.grad, 1e-5)


def test_bfloat16_in_an_interpreter_that_is_not_mended_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from din_fast.backends.triton import operands

    monkeypatch.setattr(operands, "_bfloat16_is_right", lambda: False)
    unit = FusedActivationUnit(4, [3], backend="triton").bfloat16()
    with pytest.raises(TypeError, match="interpreter, whose bfloat16 is wrong"):
        unit(torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 4).bfloat16())


def test_parameters_are_read_at_each_call() -> None:
    """Nothing folded is kept: edits that bump no version count."""
    unit = fused_unit(preset("rechub", [5]), 4, "triton").eval()
    inputs = draw(Case(unit.spec, (2, 6, 4)), 0, torch.float32)
    with torch.no_grad():
        before = unit(inputs.history, inputs.target)
        randomise(unit, torch.Generator().manual_seed(5))
        after = unit(inputs.history, inputs.target)
        right = fused_unit(unit.spec, 4, "reference", like=unit)(inputs.history, inputs.target)
    assert not torch.equal(before, after)
    assert_near("output", after, right, 1e-5)


@pytest.mark.parametrize("strides", [(2**30 + 8, 4, 1), (8, 2**30 + 8, 1)], ids=["of users", "of rows"])
def test_offsets_beyond_two_to_the_31(strides: tuple[int, int, int], tmp_path: Path) -> None:
    """Three users or rows 2^30 elements apart, each stride within 32 bits: a file with holes, of which only a few pages
    are ever touched."""
    dim = 4
    big = torch.from_file(str(tmp_path / "holes"), shared=True, size=2 * sum(strides) + dim, dtype=torch.float16)
    history = big.as_strided((3, 3, dim), strides)
    spec = preset("rechub", [4], "relu")
    small = draw(Case(spec, (3, 3, dim)), 0, torch.float32).to(torch.float16)
    history.copy_(small.history)
    unit = fused_unit(spec, dim, "triton").half().eval()
    with torch.no_grad():
        found, right = unit(history, small.target), unit(small.history, small.target)
    assert unit.last_backend == "triton" and torch.equal(found, right) and found[2].any()

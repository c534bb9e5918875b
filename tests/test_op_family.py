"""The ops below the functional form: ragged histories, the gradient of the weights, and arguments kept for later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from din_fast import UnitSpec, fold, functional, ops, preset, reference, segments
from din_fast.spec import UnitParameters
from tests.truth import Case, assert_near, draw, fused_unit

D = 6
LENGTHS = (5, 0, 17, 1, 33, 16)
N = sum(LENGTHS) + 4  # rows that belong to nobody in between
DENSE = 40  # rows of a padded history
SPECS: dict[str, UnitSpec] = {
    "rechub-softmax": preset("rechub", [9, 5], softmax=True),
    "fuxictr": preset("fuxictr", [18, 7]),
    "deepctr": preset("deepctr", [8]),
    "blog": preset("blog", [11]),
    "no-hidden-layer": preset("rechub", []),
}


def starts_and_lengths() -> tuple[Tensor, Tensor]:
    """Users in an order that is not that of their rows, with gaps between them; starts are in elements."""
    starts, row = [0] * len(LENGTHS), 0
    for user in (3, 0, 4, 1, 5, 2):
        starts[user] = row * D
        row += LENGTHS[user] + (1 if user % 2 else 0)
    assert row <= N
    return torch.tensor(starts), torch.tensor(LENGTHS)


def ragged_and_padded(fill: float) -> tuple[Tensor, Tensor]:
    """The same histories as (N, D) and as (B, DENSE, D); rows that do not count hold ``fill``."""
    starts, lengths = starts_and_lengths()
    ragged = torch.full((N, D), fill, dtype=torch.float64)
    padded = torch.full((len(LENGTHS), DENSE, D), fill, dtype=torch.float64)
    for b, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        padded[b, :n] = torch.randn(n, D, dtype=torch.float64)
        ragged[start // D : start // D + n] = padded[b, :n]
    return ragged, padded


def rows_of(ragged: Tensor) -> list[Tensor]:
    """The rows of each user."""
    starts, lengths = starts_and_lengths()
    return [ragged[s // D : s // D + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


def parameters_of(spec: UnitSpec) -> UnitParameters:
    return fused_unit(spec, D, "native").double().eval().attention.unit_parameters()


def folded(parameters: UnitParameters, spec: UnitSpec) -> dict[str, Any]:
    """The arguments of moments, forward and backward that come from the parameters, in evaluation."""
    hidden, weights = functional._folded(parameters, spec, D)
    affines = [fold.affine(layer, None, None, None) for layer in hidden]
    absent = weights[0].new_empty(0)
    known = spec if parameters.hidden else UnitSpec((), activation="identity")
    score_activation, softmax, empty, pooling = functional._score(spec)
    return {
        "weights": weights,
        "affine": functional._flat(affines, len(hidden), absent),
        "response": [absent] * len(hidden),
        "activation": known.kernel_activation,
        "dice_eps": known.dice_eps,
        "score_activation": score_activation,
        "softmax": softmax,
        "empty": empty,
        "pooling": pooling,
    }


def arguments_of(spec: UnitSpec, history: Tensor, query: Tensor, **changes: Any) -> dict[str, Any]:
    """Every argument that an op may have, by its name in the schema."""
    parameters = parameters_of(spec)
    absent = dict.fromkeys(
        ["starts", "lengths", "candidate_offsets", "mask", "values", "candidate_matrix", "window_offsets"]
    )
    layers = max(len(parameters.hidden), 1)
    return {
        **absent,
        **folded(parameters, spec),
        "history": history,
        "query": query,
        "parameters": segments.check_parameters(parameters, spec, history),
        "blocks": fold.block_table(spec.blocks),
        "eps": [0.0 if n is None else n.eps for layer in parameters.hidden for n in (layer.norm, layer.gate_norm)],
        "kept": [],
        "layer": 0,
        "keep": True,
        "pads_are_input": False,
        "dropout": 0.0,
        "seed": None,
        "score_factor": 1.0,
        "grad_pooled": torch.ones_like(query),
        "grad_scores": None,
        "scores": history.new_zeros(history.shape[:-1]),
        "sums": [history.new_empty(0)] * layers,
        "local": [],
        "from_layer": layers - 1,
        "need_history": True,
        "need_query": True,
        "need_weights": True,
        **changes,
    }


def run(backend: str, name: str, arguments: dict[str, Any]) -> list[Tensor]:
    schema = ops.op(backend, name)._schema
    values = [arguments[a.name] for a in schema.arguments]
    return ops.forward(backend, (), *values) if name == "forward" else ops.call(backend, name, *values)


# ---- ragged histories


@pytest.mark.parametrize("name", SPECS)
def test_ragged_inference_is_the_padded_one(name: str, backend: str, cpu: str) -> None:
    ragged, padded = ragged_and_padded(fill=torch.nan)
    starts, lengths = starts_and_lengths()
    query = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    right = run(backend, "infer", arguments_of(SPECS[name], padded, query, lengths=lengths))
    found = run(backend, "infer", arguments_of(SPECS[name], ragged, query, starts=starts, lengths=lengths))
    assert_near("pooled", found[0], right[0], 1e-12)
    for b, scores in enumerate(rows_of(found[1])):
        assert_near(f"scores {b}", scores, right[1][b, : LENGTHS[b]], 1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_ragged_forward_and_backward_are_the_padded_ones(name: str, backend: str, cpu: str) -> None:
    """The rows that belong to nobody hold NaN and get a gradient of zero."""
    ragged, padded = (t.requires_grad_() for t in ragged_and_padded(fill=torch.nan))
    starts, lengths = starts_and_lengths()
    upstream = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    first_query = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    results = []
    for history, start in ((ragged, starts), (padded, None)):
        query = first_query.clone().requires_grad_()
        arguments = arguments_of(SPECS[name], history, query, starts=start, lengths=lengths)
        arguments["weights"] = weights = [w.detach().requires_grad_() for w in arguments["weights"]]
        arguments["affine"] = affine = [a.detach().requires_grad_() for a in arguments["affine"]]
        pooled, scores, _ = run(backend, "forward", arguments)
        leaves = [history, query, *weights, *(a for a in affine if a.numel())]
        results.append((pooled, scores, torch.autograd.grad(pooled, leaves, upstream)))
    (pooled, scores, (d_history, *grads)), (right_pooled, right_scores, (right_d_history, *right_grads)) = results
    assert_near("pooled", pooled, right_pooled, 1e-12)
    for b, n in enumerate(LENGTHS):
        assert_near(f"scores {b}", rows_of(scores)[b], right_scores[b, :n], 1e-12)
        assert_near(f"d history {b}", rows_of(d_history)[b], right_d_history[b, :n], 1e-11)
        rows_of(d_history)[b].zero_()
    assert not d_history.any()
    for i, (gradient, right) in enumerate(zip(grads, right_grads, strict=True)):
        assert_near(f"gradient {i}", gradient, right, 1e-11)


def test_ragged_histories_have_no_gradient_of_the_weights_yet(backend: str) -> None:
    starts, lengths = starts_and_lengths()
    ragged = ragged_and_padded(fill=0.0)[0].requires_grad_()
    query = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    arguments = arguments_of(SPECS["deepctr"], ragged, query, starts=starts, lengths=lengths)
    with pytest.raises(RuntimeError, match="grad_scores: not built for ragged histories"):
        run(backend, "forward", arguments)[1].sum().backward()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["rechub-softmax", "fuxictr"])
def test_ragged_moments_count_the_valid_rows_only(name: str, layer: int, backend: str, cpu: str) -> None:
    ragged, padded = ragged_and_padded(fill=torch.nan)
    starts, lengths = starts_and_lengths()
    spec, parameters = SPECS[name], parameters_of(SPECS[name])
    query = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    changes = {"starts": starts, "lengths": lengths, "layer": layer, "pads_are_input": True}
    count, mean, m2, panels = run(backend, "moments", arguments_of(spec, ragged, query, **changes))
    with torch.no_grad():
        z = reference.features(query, padded, spec.blocks)
        z = torch.cat([z[b, :n] for b, n in enumerate(LENGTHS)])
        for i, hidden in enumerate(parameters.hidden[: layer + 1]):
            if i:
                before = parameters.hidden[i - 1]
                z = reference.activate(z if before.norm is None else before.norm(z), before, spec)
            z = torch.nn.functional.linear(z, hidden.weight, hidden.bias)
    assert (
        count == sum(LENGTHS) and panels.numel() == ops.panel_rows(len(LENGTHS), ragged, starts, lengths) * z.shape[1]
    )
    assert_near("mean", mean, z.mean(0), 1e-12)
    assert_near("variance", m2 / count, z.var(0, unbiased=False), 1e-12)


def test_ragged_moments_of_equal_lengths_are_the_dense_ones(backend: str, cpu: str) -> None:
    history = torch.randn(4, 21, D, dtype=torch.float64)
    query = torch.randn(4, D, dtype=torch.float64)
    starts, lengths = torch.arange(4) * 21 * D, torch.full((4,), 21)
    dense = run(backend, "moments", arguments_of(SPECS["fuxictr"], history, query, pads_are_input=True))
    arguments = arguments_of(SPECS["fuxictr"], history.flatten(0, 1), query, pads_are_input=True)
    ragged = run(backend, "moments", arguments | {"starts": starts, "lengths": lengths})
    assert all(torch.equal(a, b) for a, b in zip(ragged, dense, strict=True))


@pytest.mark.parametrize(
    ("start", "length"), [(-D, 2), (1, 2), (0, -1), (0, N + 1), ((N - 1) * D, 2), (N * D, 1)], ids=str
)
def test_a_segment_outside_the_rows_is_refused(start: int, length: int, backend: str) -> None:
    query = torch.randn(2, D, dtype=torch.float64)
    segment = {"starts": torch.tensor([0, start]), "lengths": torch.tensor([3, length])}
    arguments = arguments_of(SPECS["deepctr"], torch.randn(N, D, dtype=torch.float64), query, **segment)
    with pytest.raises(ValueError, match=rf"lengths: expected segments within {N} rows, got start {start}"):
        run(backend, "infer", arguments)


# ---- the gradient of the weights of the positions

WEIGHTED: dict[str, UnitSpec] = SPECS | {
    "fuxictr-softmax": preset("fuxictr", [10, 4], softmax=True),  # uniform where nothing is valid
    "norm-and-dice": preset("fuxictr", [10], batch_norm=True),
    "mean": UnitSpec((7,), activation="prelu", pooling="mean"),
}


@pytest.mark.parametrize("masking", ["none", "both"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("only_weights", [True, False])
@pytest.mark.parametrize("name", WEIGHTED)
def test_the_weights_have_a_gradient(
    name: str, only_weights: bool, training: bool, masking: str, backend: str, cpu: str
) -> None:
    """Of a loss on the weights alone, whose gradient may be a view, and of one on pooled vectors and weights."""
    inputs = draw(Case(WEIGHTED[name], (5, 21, D), masking), 0, torch.float64)
    g_weights = torch.randn(21, 5, dtype=torch.float64).T
    results = []
    for which in (backend, "reference"):
        unit = fused_unit(WEIGHTED[name], D, which).double().train(training)
        history, query = inputs.history.clone().requires_grad_(), inputs.target.clone().requires_grad_()
        parameters = unit.attention.unit_parameters()
        found = functional.run(query, history, parameters, unit.spec, inputs.mask, inputs.lengths, which)
        assert found.backend == which
        loss = (found.weights * g_weights).sum() + found.weights[:, 0].sum()
        if not only_weights:
            loss = loss + (found.pooled * inputs.upstream).sum()
        named = {"history": history, "query": query, **dict(unit.named_parameters())}
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        results.append({"weights": found.weights, **dict(zip(named, grads, strict=True))})
    for key, right in results[1].items():
        assert_near(key, results[0][key], right, 1e-10)


# ---- arguments kept for later

RESERVED = [
    (op, argument)
    for op, arguments in {
        "moments": ("candidate_matrix",),
        "forward": ("values", "candidate_matrix", "window_offsets"),
        "backward_moments": ("values", "candidate_matrix", "window_offsets"),
        "backward": ("values", "candidate_matrix", "window_offsets"),
    }.items()
    for argument in arguments
]


@pytest.mark.parametrize(("name", "argument"), RESERVED)
def test_what_is_not_built_yet_raises_with_its_name(name: str, argument: str, backend: str) -> None:
    history, query = torch.randn(3, 5, D), torch.randn(3, D)
    value = {
        "values": torch.randn(3, 5, D),
        "candidate_matrix": torch.randn(3, 8, D),
        "window_offsets": torch.arange(4),
    }[argument]
    arguments = arguments_of(SPECS["deepctr"], history.double(), query.double())
    run(backend, name, arguments)
    with pytest.raises(RuntimeError, match=rf"{argument}: .*not built yet; expected None"):
        run(backend, name, arguments | {argument: value})

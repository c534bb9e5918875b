"""The Triton kernels against the float64 reference, by the rule of tests/truth.py: output, every gradient, statistics.

Options meet in pairs, not in their product: :func:`pairwise` draws cases until every value of every option has met
every value of every other.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from din_fast import UnitSpec, reference
from tests import truth
from tests.interpreter.honest import GUARD
from tests.truth import Case, Comparison, cases, check_parity, draw, fused_unit, randomise, step

OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "dim": (4, 8, 10, 36, 64, 128),
    "hidden": ((), (4,), (36,), (80,), (80, 40), (144, 72), (16, 8, 4)),
    "length": (1, 7, 33, 70),
    "candidates": (None, 3),  # None: a query of two dimensions
    "masking": ("none", "mask", "lengths", "both"),
    "activation": ("dice_row", "dice_batch", "prelu", "leaky_relu", "relu", "sigmoid", "silu", "tanh", "identity"),
    "batch_norm": (False, True),
    "scale_scores": (False, True),
    "score": ("plain", "sigmoid", "prelu", "softmax", "softmax, uniform"),
    "pooling": ("sum", "mean", "mean_valid", "none"),
    # evaluation; or training, where statistics are over all rows or the valid ones, and dropout
    "mode": ("eval", "train", "dropout", "valid", "valid, dropout"),
}
USERS = 2
PAIR_SEEDS = 3  # of the rule, for each case
SPEC_SEEDS = 2


def possible(options: Mapping[str, Any]) -> bool:
    """A variance needs two rows, and the last of the two histories is empty where there is a mask."""
    one_row = options.get("length") == 1 and options.get("candidates", 0) is None
    return not (one_row and options.get("mode", "").startswith("valid"))


def pairwise(options: Mapping[str, tuple[Any, ...]], seed: int = 0) -> list[dict[str, Any]]:
    """Cases, greedily, until every pair of values of two options has occurred."""
    g = random.Random(seed)
    wanted = {((a, x), (b, y)) for a, b in combinations(options, 2) for x in options[a] for y in options[b]}
    found = []
    while wanted:
        # Begin with a pair that is missing, and give each other option the value that meets most of the missing ones.
        (a, x), (b, y) = min(wanted, key=repr)
        case = {a: x, b: y}
        for name in g.sample(list(options), len(options)):
            if name not in case:
                values = [v for v in options[name] if possible(case | {name: v})]
                # Of equals the first: the smaller sizes.
                case[name] = max(values, key=lambda v: sum(p in wanted for p in pairs_with(case, name, v, options)))
        found.append({name: case[name] for name in options})
        wanted -= pairs_of(found[-1])
    return found


def pairs_with(case: Mapping[str, Any], name: str, value: Any, options: Iterable[str]) -> list[Any]:
    order = list(options)
    return [
        ((other, v), (name, value)) if order.index(other) < order.index(name) else ((name, value), (other, v))
        for other, v in case.items()
    ]


def pairs_of(case: Mapping[str, Any]) -> set[Any]:
    return {((a, case[a]), (b, case[b])) for a, b in combinations(case, 2)}


def spec_of(options: Mapping[str, Any]) -> UnitSpec:
    score = options["score"]
    return UnitSpec(
        options["hidden"],
        activation=options["activation"],
        batch_norm=options["batch_norm"],
        batch_stats="valid" if options["mode"].startswith("valid") else "all",
        dice_affine=options["pooling"] == "mean",
        per_channel_slope=options["masking"] in ("mask", "lengths"),
        negative_slope=0.2,
        scale_scores=options["scale_scores"],
        score_activation=score if score in ("sigmoid", "prelu") else "none",
        softmax=score.startswith("softmax"),
        empty="uniform" if score == "softmax, uniform" else "zeros",
        pooling=options["pooling"],
        dropout=0.3 if options["mode"].endswith("dropout") else None,
    )


@torch.no_grad()
def move_from_kinks(unit: reference.ActivationUnit) -> None:
    """At zero the gradient of relu and prelu jumps. In half types so many z are within their rounding of it that the
    largest error says which unit fell on which side, in either form: shift z, so that few are near it."""
    hidden = unit.spec.activation in ("relu", "prelu", "leaky_relu")
    score = unit.spec.score_activation == "prelu"
    for module in unit.modules():
        if isinstance(module, nn.Linear | nn.BatchNorm1d):
            last = isinstance(module, nn.Linear) and module.out_features == 1
            if score if last else hidden:
                module.bias.copy_(torch.where(module.bias < 0, -4.0, 4.0))


def check(options: Mapping[str, Any]) -> None:
    """Hold Triton to the rule, pooled over the seeds."""
    spec, dtype = spec_of(options), options["dtype"]
    shape = (USERS, options["length"], options["dim"])
    case = Case(spec, shape, options["masking"], options["mode"] != "eval", candidates=options["candidates"])
    comparison = Comparison(dtype)
    for seed in range(PAIR_SEEDS):
        # A bfloat16 number is one in any wider dtype: all three compute from the same numbers.
        inputs = draw(case, seed, torch.float32).to(dtype)
        plain = reference.ActivationUnit(shape[2], spec)
        randomise(plain, torch.Generator().manual_seed(seed))
        if dtype != torch.float32:
            move_from_kinks(plain)
        plain = plain.to(dtype).train(case.training)
        fused = fused_unit(spec, shape[2], "triton", like=plain)
        right = copy.deepcopy(plain).double()
        before = GUARD.launches
        found = step(fused, inputs)
        assert GUARD.launches > before
        comparison.add(step(right, inputs.to(torch.float64)), step(plain, inputs), found)
    comparison.check()


PAIRS = pairwise(OPTIONS, seed=184)  # of 200 seeds the one whose cases are cheapest


def name_of(options: Mapping[str, Any]) -> str:
    return "-".join(str(v).removeprefix("torch.").replace(" ", "") for v in options.values())


def test_every_pair_occurs(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{len(PAIRS)} cases: {', '.join(OPTIONS)}\n" + "\n".join(name_of(o) for o in PAIRS))
    met = set().union(*(pairs_of(o) for o in PAIRS))
    for a, b in combinations(OPTIONS, 2):
        for x in OPTIONS[a]:
            for y in OPTIONS[b]:
                assert ((a, x), (b, y)) in met, (a, x, b, y)


@pytest.mark.parametrize("options", PAIRS, ids=name_of)
def test_pairs_of_options(options: dict[str, Any]) -> None:
    check(options)


@pytest.mark.parametrize("case", cases().values(), ids=cases())
def test_every_spec(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specs and shapes that the native kernel is held to."""
    monkeypatch.setattr(truth, "SEEDS", SPEC_SEEDS)
    before = GUARD.launches
    check_parity(case, "triton")
    assert GUARD.launches > before

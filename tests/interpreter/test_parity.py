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
from torch import Tensor, nn

from din_fast import FusedActivationUnit, UnitSpec, functional, reference, segments
from tests.interpreter.honest import GUARD
from tests.truth import SEEDS, Case, Comparison, cases, check_parity, draw, fused_unit, randomise, step

OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "dim": (4, 8, 10, 36, 64, 128),
    "hidden": ((), (4,), (36,), (80,), (80, 40), (256, 128), (16, 8, 4)),
    "length": (1, 7, 33, 100),
    "candidates": (1, 5),
    "masking": ("none", "mask", "lengths", "both"),
    "activation": ("dice_row", "dice_batch", "prelu", "relu", "sigmoid", "identity"),
    "batch_norm": (False, True),
    "score": ("plain", "sigmoid", "softmax", "softmax, uniform"),
    "pooling": ("sum", "mean", "mean_valid"),
    "training": (True, False),
}
USERS = 2


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
                # Of equals the first: the smaller sizes.
                case[name] = max(
                    options[name], key=lambda v: sum(p in wanted for p in pairs_with(case, name, v, options))
                )
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
    return UnitSpec(
        options["hidden"],
        activation=options["activation"],
        batch_norm=options["batch_norm"],
        dice_affine=options["pooling"] == "mean",
        per_channel_slope=options["masking"] in ("mask", "lengths"),
        score_activation="sigmoid" if options["score"] == "sigmoid" else "none",
        softmax=options["score"].startswith("softmax"),
        empty="uniform" if options["score"] == "softmax, uniform" else "zeros",
        pooling=options["pooling"],
    )


class ManyCandidates(nn.Module):
    """A unit on histories (users, L, D) and queries (C, D), the first user with C - users + 1 of them, the others with
    one: the reference on expanded histories, the fused unit on candidate groups."""

    def __init__(self, unit: nn.Module, candidates: int, masking: str) -> None:
        super().__init__()
        self.unit = unit
        self.candidates, self.masking = candidates, masking

    def forward(self, history: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
        unit = self.unit
        counts = torch.tensor([self.candidates, *[1] * (history.shape[0] - 1)])
        if not isinstance(unit, FusedActivationUnit):
            valid = None if valid is None else valid.repeat_interleave(counts, 0)
            out: Tensor = unit(history.repeat_interleave(counts, 0), target, valid)
            return out
        lengths = None
        if self.masking == "lengths" and valid is not None:
            lengths, valid = valid.sum(1), None
        offsets = nn.functional.pad(counts.cumsum(0), (1, 0))
        segs = segments.Segments(history, None, lengths, offsets, valid)
        parameters = unit.attention.unit_parameters()
        flat = segments.check_parameters(parameters, unit.spec, history)
        if torch.is_grad_enabled() or reference.uses_batch_statistics(parameters):
            batch = reference.uses_batch_statistics(parameters)
            return functional._with_gradient("triton", target, segs, parameters, unit.spec, batch)[0]
        return functional._infer("triton", target, segs, parameters.hidden, flat, unit.spec)[0]


@torch.no_grad()
def move_from_kinks(unit: nn.Module) -> None:
    """At zero the gradient of relu and prelu jumps. In half types so many z are within their rounding of it that the
    largest error says which unit fell on which side, in either form: shift z, so that few are near it."""
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm1d) or (isinstance(module, nn.Linear) and module.out_features > 1):
            module.bias.copy_(torch.where(module.bias < 0, -4.0, 4.0))


def check(options: Mapping[str, Any]) -> None:
    """Hold Triton to the rule, pooled over the seeds."""
    spec, dtype, m = spec_of(options), options["dtype"], options["candidates"]
    shape = (USERS, options["length"], options["dim"])
    comparison = Comparison(dtype)
    for seed in range(SEEDS):
        # A bfloat16 number is one in any wider dtype: all three compute from the same numbers.
        inputs = draw(Case(spec, shape, options["masking"]), seed, torch.float32).to(dtype)
        plain = reference.ActivationUnit(shape[2], spec)
        randomise(plain, torch.Generator().manual_seed(seed))
        if options["activation"] in ("relu", "prelu") and dtype != torch.float32:
            move_from_kinks(plain)
        plain = plain.to(dtype).train(options["training"])
        fused: nn.Module = fused_unit(spec, shape[2], "triton", like=plain)
        truth: nn.Module = copy.deepcopy(plain).double()
        right: nn.Module = plain
        if m > 1:
            g = torch.Generator().manual_seed(seed)
            target, upstream = (torch.randn(m + USERS - 1, shape[2], generator=g).to(dtype) for _ in range(2))
            inputs = type(inputs)(inputs.history, target, inputs.mask, inputs.lengths, upstream)
            truth, right, fused = (ManyCandidates(u, m, options["masking"]) for u in (truth, plain, fused))
        before = GUARD.launches
        found = step(fused, inputs)
        assert GUARD.launches > before
        comparison.add(step(truth, inputs.to(torch.float64)), step(right, inputs), found)
    comparison.check()


def possible(options: Mapping[str, Any]) -> bool:
    """A variance needs two rows."""
    return options["length"] * options["candidates"] * USERS > 1


PAIRS = [o for o in pairwise(OPTIONS, seed=256) if possible(o)]  # of 400 seeds the one whose cases are cheapest


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
def test_every_spec(case: Case) -> None:
    """The specs and shapes that the native kernel is held to."""
    before = GUARD.launches
    check_parity(case, "triton")
    assert GUARD.launches > before

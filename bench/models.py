"""Whole models: torch-rechub's DIN and FuxiCTR's, as they are and after ``din_fast.fuse``.

A training step is forward, loss, backward and Adam's update; scoring is the forward without gradients. Batches are
random, as large as the examples' (examples/fuse_training.py), all positions valid. The share of the units in the time
is taken in calls of their own, after the timing: hooks of the units tell when their forward and their backward begin
and end.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import din_fast
from bench import parity, report, timing
from bench.contenders import OURS
from examples import fuse_fuxictr, fuse_torch_rechub
from examples.fuse_training import BATCH, DIM, LENGTH

TRAINING, SCORING = MODES = ("model training", "model scoring")
ORIGINAL = "original"
VOCABULARY = {"user": 944, "age": 62, "gender": 3, "occupation": 22, "item": 1683, "cate": 20}  # as ml-100k's
ITEM = ("item", "cate")
SHARE_CALLS = 5
Score = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Model:
    """A framework's whole model.

    Attributes:
        preset: the name of its unit in :mod:`bench.peers`.
        name: in tables.
        hidden_units: of its units.
        unit_dim: the size of what its units get.
        build: the model, float32, freshly initialised.
        score: a batch's ids -> (model -> scores (B,)).
    """

    preset: str
    name: str
    hidden_units: tuple[int, ...]
    unit_dim: int
    build: Callable[[], nn.Module]
    score: Callable[[Mapping[str, Tensor]], Score]


def _score_rechub(ids: Mapping[str, Tensor]) -> Score:
    return lambda model: model(dict(ids))


def _score_fuxictr(ids: Mapping[str, Tensor]) -> Score:
    """The target stands behind its history."""
    user = {name: ids[name] for name in VOCABULARY if name not in ITEM}
    items = {name: torch.cat([ids[f"hist_{name}"], ids[name][:, None]], dim=1).flatten() for name in ITEM}
    mask = torch.ones(ids["hist_item"].shape)
    return lambda model: model((dict(user), dict(items), mask))["y_pred"].squeeze(1)


def _build_fuxictr() -> nn.Module:
    model: nn.Module = fuse_fuxictr.build(VOCABULARY, epochs=1, folder=".")
    return model


MODELS = (
    Model("rechub", "torch-rechub DIN", (36,), DIM, lambda: fuse_torch_rechub.build(VOCABULARY), _score_rechub),
    Model("fuxictr", "FuxiCTR DIN", (64,), 2 * DIM, _build_fuxictr, _score_fuxictr),
)


def batch(size: int, length: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random ids, without the pad's 0, of a profile, an item and its history; labels (B,) of 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    ids = {name: torch.randint(1, rows, (size,), generator=g) for name, rows in VOCABULARY.items()}
    ids |= {f"hist_{name}": torch.randint(1, VOCABULARY[name], (size, length), generator=g) for name in ITEM}
    return ids, torch.randint(0, 2, (size,), generator=g).float()


def fused(model: nn.Module, backend: str) -> nn.Module:
    """A copy of a model on din_fast."""
    other = copy.deepcopy(model)
    din_fast.fuse(other, backend=backend, strict=True)
    return other


def units(model: nn.Module) -> list[nn.Module]:
    """The activation units of a model, fused or not."""
    plain = copy.deepcopy(model)
    din_fast.unfuse(plain)
    return [model.get_submodule(row.path) for row in din_fast.fuse(plain, dry_run=True).fused]


def check_backend(model: nn.Module, backend: str) -> None:
    """Raise a RuntimeError unless the last call of every unit of a fused model ran on a backend."""
    ran = {getattr(unit, "last_backend", None) for unit in units(model)}
    if ran != {backend}:
        raise RuntimeError(f"a fused model: expected the backend {backend}, but {ran} ran")


def scoring(model: nn.Module, score: Score) -> Tensor:
    with torch.no_grad():
        return score(model)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, score: Score, label: Tensor) -> Tensor:
    """Returns the scores before the update."""
    optimizer.zero_grad()
    scores = score(model)
    nn.functional.binary_cross_entropy(scores, label).backward()
    optimizer.step()
    return scores.detach()


def everything(model: nn.Module, score: Score, label: Tensor) -> parity.Results:
    """All that the models must agree on: scores, gradients of a training step, running statistics."""
    result = {"evaluation output": scoring(model.eval(), score).clone()}
    model.train().zero_grad()
    scores = score(model)
    nn.functional.binary_cross_entropy(scores, label.to(scores.dtype)).backward()
    result["training output"] = scores.detach()
    result |= {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    result |= {f"statistics {n}": b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    return result


def check(
    model: Model, backend: str, seeds: int, tick: Callable[[str], object], size: int = BATCH, length: int = LENGTH
) -> list[parity.Check]:
    """The original and the fused model against the original in float64."""

    def rounds() -> Iterator[tuple[parity.Results, dict[str, parity.Results]]]:
        for seed in range(seeds):
            torch.manual_seed(seed)
            start = model.build()
            ids, label = batch(size, length, seed)
            score = model.score(ids)
            found = {}
            for name, one in ((ORIGINAL, copy.deepcopy(start)), (OURS, fused(start, backend))):
                tick(name)
                found[name] = everything(one, score, label)
            check_backend(one, backend)
            yield everything(start.double(), score, label), found

    return parity.compare(rounds())


@contextmanager
def watched(modules: Sequence[nn.Module]) -> Iterator[list[float]]:
    """A list that gets the seconds of each forward and each backward of some modules."""
    seconds: list[float] = []
    begun: dict[nn.Module, float] = {}

    def begin(module: nn.Module, *_: Any) -> None:
        begun[module] = time.perf_counter()

    def end(module: nn.Module, *_: Any) -> None:
        seconds.append(time.perf_counter() - begun[module])

    handles = []
    for module in modules:
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        handles += [module.register_full_backward_pre_hook(begin), module.register_full_backward_hook(end)]
    yield seconds
    for handle in handles:
        handle.remove()


def unit_share(model: nn.Module, call: Callable[[], object]) -> float:
    """The share of the units' forward and backward in the time of a call; the median of some calls."""
    shares = []
    with watched(units(model)) as seconds:
        for _ in range(SHARE_CALLS):
            seconds.clear()
            begin = time.perf_counter()
            call()
            shares.append(sum(seconds) / (time.perf_counter() - begin))
    return sorted(shares)[len(shares) // 2]


def measure(
    model: Model, backend: str, rounds: int, tick: Callable[[str], object], size: int = BATCH, length: int = LENGTH
) -> report.Found:
    """Time training steps and scoring, in turns; then the share of the units."""
    torch.manual_seed(0)
    start = model.build()
    ids, label = batch(size, length, 0)
    score = model.score(ids)
    pair = {ORIGINAL: start, OURS: fused(start, backend)}
    timings: dict[str, dict[str, timing.Timing]] = {}
    shares: dict[str, dict[str, float]] = {}
    for mode in MODES:
        calls: dict[str, Callable[[], object]] = {}
        for name, one in pair.items():
            one.train(mode == TRAINING)
            optimizer = torch.optim.Adam(one.parameters())
            step, scores = partial(training_step, one, optimizer, score, label), partial(scoring, one, score)
            calls[name] = step if mode == TRAINING else scores
        timings[mode] = timing.alternate(calls, rounds, tick=tick)
        shares[mode] = {name: unit_share(one, calls[name]) for name, one in pair.items()}
    check_backend(pair[OURS], backend)
    shape = f"({size}, {length}, {model.unit_dim}, {list(model.hidden_units)})"
    backends = {ORIGINAL: "", OURS: backend}
    return report.Found(model.preset, shape, "model", model.name, size, timings, backends, unit_share=shares)

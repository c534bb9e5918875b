"""Whether the contenders of a case compute the same function: no speed is told before this is green.

Truth is the framework's own unit (or whole model) in float64. For the output in evaluation, and for the output, every
gradient and the running statistics of a training step, on the maximum and on the root mean square over all seeds:

    error(contender) <= 2 * error(the framework's own, float32) + 32 * u * S

with u the unit roundoff of float32 and S the largest value of the tensor, at least a tenth of that of its group (the
outputs, the gradients, the statistics). Right regrouping of sums passes this; the rule does not bend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import contenders, peers
from bench.contenders import Case, Contender

SEEDS = 8
Results = dict[str, Tensor]  # what must agree, by name: "training output", "gradient history", "statistics ..."
UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Check:
    """One tensor of one contender: its error and what the rule allows, as maximum and root mean square over the seeds.

    Attributes:
        provider: the contender.
        tensor: ``evaluation output``, ``training output``, ``gradient history``, ``statistics 1.running_mean``, ...
        kind: ``max`` or ``rms``.
        error: distance from float64.
        plain: the same distance of the framework's own float32 unit.
        allowed: what the rule allows.
    """

    provider: str
    tensor: str
    kind: str
    error: float
    plain: float
    allowed: float

    @property
    def green(self) -> bool:
        return self.error <= self.allowed  # False for NaN


class _Errors:
    """Errors of one contender, pooled over the seeds."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        self.squares: dict[str, float] = {}
        self.count: dict[str, int] = {}

    def add(self, got: Results, truth: Results) -> None:
        for name, t in truth.items():
            error = (got[name].double().reshape(t.shape) - t).abs()
            largest = torch.tensor([self.largest.get(name, 0.0), float(error.max())]).max()  # keeps a NaN
            self.largest[name] = float(largest)
            self.squares[name] = self.squares.get(name, 0.0) + float(error.square().sum())
            self.count[name] = self.count.get(name, 0) + t.numel()

    def of(self, name: str, kind: str) -> float:
        return self.largest[name] if kind == "max" else float((self.squares[name] / self.count[name]) ** 0.5)


def everything(contender: Contender, history: Tensor, target: Tensor, gradient: Tensor) -> Results:
    """All that a case's contenders must agree on, by name."""
    contender.run.eval()
    result = {"evaluation output": contenders.forward(contender, history, target).clone()}
    contender.check_backend()
    history, target = history.detach().requires_grad_(), target.detach().requires_grad_()
    contender.run.train()
    result["training output"] = contenders.training_step(contender, history, target, gradient)
    contender.check_backend()
    gradients = {"history": history.grad, "target": target.grad}
    gradients |= {name: p.grad for name, p in contender.parameters().items()}
    for name, g in gradients.items():
        if g is None:
            raise RuntimeError(f"{contender.provider}: no gradient of {name}")
        result[f"gradient {name}"] = g
    result |= {f"statistics {name}": s.clone() for name, s in contender.statistics().items()}
    return result


def check(
    case: Case,
    group: Sequence[Contender],
    seeds: int = SEEDS,
    tick: Callable[[str], object] = lambda provider: None,
) -> list[Check]:
    """Compare all contenders with float64; ``tick`` is called with a provider before each of its runs.

    The first contender must be the framework's own eager unit: it is what "plain" means.
    """
    truth_unit = contenders.plain(case, torch.float64)

    def rounds() -> Iterator[tuple[Results, dict[str, Results]]]:
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            history, target, gradient = contenders.inputs(case, generator)
            start = contenders.host(case)
            contenders.randomise(start, generator)
            peers.copy_weights(start, truth_unit.unit)
            truth = everything(truth_unit, history.double(), target.double(), gradient.double())
            found = {}
            for c in group:
                tick(c.provider)
                peers.copy_weights(start, c.unit)
                found[c.provider] = everything(c, history, target, gradient)
            yield truth, found

    return compare(rounds())


def check_candidates(
    case: Case, group: Sequence[Contender], tick: Callable[[str], object] = lambda provider: None
) -> list[Check]:
    """The same for the output in evaluation of many candidates over one history; one seed."""
    history, target = contenders.shared_inputs(case)
    start = contenders.host(case)
    contenders.randomise(start, torch.Generator().manual_seed(1))
    found = {}
    for c in group:
        tick(c.provider)
        peers.copy_weights(start, c.unit)
        c.run.eval()
        found[c.provider] = {"evaluation output": contenders.forward(c, history, target).clone()}
        c.check_backend()
    truth = contenders.plain(case, torch.float64)
    peers.copy_weights(start, truth.unit)
    truth.run.eval()
    # In slices: in float64 all at once it would take gigabytes.
    parts = zip(history.double().split(64), target.double().split(64), strict=True)
    right = torch.cat([contenders.forward(truth, h, t) for h, t in parts])
    return compare([({"evaluation output": right}, found)])


def compare(rounds: Iterable[tuple[Results, Mapping[str, Results]]]) -> list[Check]:
    """Hold results to the rule.

    Args:
        rounds: for each seed the truth, and what each contender gave, by provider; the first one is what "plain" means.
    """
    errors: dict[str, _Errors] = {}
    size: dict[str, float] = {}
    for truth, found in rounds:
        for name, t in truth.items():
            size[name] = max(size.get(name, 0.0), float(t.abs().max()))
        for provider, got in found.items():
            errors.setdefault(provider, _Errors()).add(got, truth)
    largest: dict[str, float] = {}
    for name, s in size.items():
        largest[_group(name)] = max(largest.get(_group(name), 0.0), s)
    plain = next(iter(errors.values()))
    checks = []
    for provider, of_it in errors.items():
        for name, reach in size.items():
            scale = max(reach, 0.1 * largest[_group(name)])
            for kind in ("max", "rms"):
                error, theirs = of_it.of(name, kind), plain.of(name, kind)
                allowed = 2 * theirs + 32 * UNIT_ROUNDOFF * scale
                checks.append(Check(provider, name, kind, error, theirs, allowed))
    return checks


def _group(name: str) -> str:
    return "output" if name.endswith("output") else name.partition(" ")[0]

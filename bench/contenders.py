"""The contenders of one case: a framework's unit, its folded form, both compiled, and din_fast.

All of them hold the same weights, take the same inputs and compute the same function; so a ratio of their times means
something. Every contender has its own copy of the weights, so that each keeps its own running statistics.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import peers
from din_fast import FusedActivationUnit, preset

OURS = "din_fast"
FOLDED = "folded, torch.compile"  # the honest bar
# What is measured of a case. Forward: in evaluation, without gradients; training: forward and backward with statistics
# of the batch; candidates: forward of B candidates over one history.
FORWARD, TRAINING, CANDIDATES = MODES = ("forward", "training", "candidates")


@dataclass(frozen=True)
class Case:
    """One preset at one shape: B, L, D and the hidden layers; the activation of the preset, all positions valid."""

    preset: str
    batch: int
    length: int
    dim: int
    hidden_units: tuple[int, ...]

    @classmethod
    def of(cls, preset: str, shape: str) -> Case:
        """The case of a preset that has this :attr:`shape`."""
        batch, length, dim, hidden_units = ast.literal_eval(shape)
        return cls(preset, batch, length, dim, tuple(hidden_units))

    @property
    def shape(self) -> str:
        return f"({self.batch}, {self.length}, {self.dim}, {list(self.hidden_units)})"


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Attributes:
        provider: its name in tables and rows.
        unit: holds the weights; one of the units that :func:`bench.peers.layers` knows.
        run: (history, target) -> (B, D), with the weights of ``unit``.
        backend: the din_fast backend that must run, or None for the others.
    """

    provider: str
    unit: nn.Module
    run: nn.Module
    backend: str | None = None

    def check_backend(self) -> None:
        """Raise a RuntimeError unless the last call ran on ``backend``."""
        ran = getattr(self.unit, "last_backend", None)
        if ran != self.backend:
            raise RuntimeError(f"{self.provider}: expected the backend {self.backend}, but {ran} ran")

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by layer and name, the same keys for every contender of a case."""
        return {f"{i}.{n}": p for i, m in enumerate(peers.layers(self.unit)) for n, p in m.named_parameters()}

    def statistics(self) -> dict[str, Tensor]:
        """Running means and variances by layer and name, the same keys for every contender of a case."""
        buffers = {f"{i}.{n}": b for i, m in enumerate(peers.layers(self.unit)) for n, b in m.named_buffers()}
        return {n: b for n, b in buffers.items() if b.is_floating_point()}


class Plain(nn.Module):
    """A framework's unit as it is, behind (history, target)."""

    def __init__(self, name: str, unit: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.unit = unit

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        return peers.call(self.name, self.unit, history, target)


class Folded(nn.Module):
    """A framework's unit with its first Linear folded, in plain torch: nothing of size (positions x 4D) is written.

    ``z = A_q q + b + (A_k + A_p diag(q)) k`` with A_q = W0 + W2, A_k = W1 - W2, A_p = W3 for the blocks W0..W3 of the
    columns [q, k, q-k, q*k]; then the unit's own modules, but for its dropouts (of 0). All positions valid.
    """

    def __init__(self, name: str, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit
        self.softmax = peers.has_softmax(unit)
        self.flat = name != "deepctr"  # DeepCTR-Torch's Dice takes (B, L, H), the others' (B L, H)
        self.scaled = name == "recbole"  # by 1/sqrt(D)

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        first, *rest = (m for m in peers.chain(self.unit) if not isinstance(m, nn.Dropout))
        assert isinstance(first, nn.Linear)
        w_q, w_k, w_d, w_p = first.weight.chunk(4, dim=1)
        matrix = (w_k - w_d) + target.unsqueeze(1) * w_p  # (B, H, D)
        constant = torch.addmm(first.bias, target, (w_q + w_d).t())  # (B, H)
        x = torch.baddbmm(constant.unsqueeze(1), history, matrix.transpose(1, 2))
        if self.flat:
            x = x.flatten(0, 1)
        for module in rest:
            x = module(x)
        weight = x.view(history.shape[:2])
        if self.scaled:
            weight = weight / history.shape[2] ** 0.5
        if self.softmax:
            weight = weight.softmax(dim=-1)
        return torch.bmm(weight.unsqueeze(1), history).squeeze(1)


def host(case: Case) -> nn.Module:
    """The framework's own unit of a case, with its own initial weights."""
    return peers.build(case.preset, case.dim, case.hidden_units, length=case.length)


def ours(backend: str, first: bool = True) -> str:
    """The name of din_fast on a backend; the first one that is asked for is just :data:`OURS`."""
    return OURS if first else f"{OURS}, {backend}"


def build(case: Case, *backends: str) -> list[Contender]:
    """The contenders of a case, float32, with the same weights; the framework's eager unit first, din_fast last.

    Args:
        case: preset and shape.
        backends: the backends of din_fast, by name: ``native``, ``triton`` or ``reference``. The first is
            :data:`OURS`, which the others are compared with.
    """
    unit = host(case)
    package = peers.PACKAGES[case.preset]
    found = []
    for provider, form in ((package, Plain), ("folded", Folded)):
        eager, compiled = copy.deepcopy(unit), copy.deepcopy(unit)
        found.append(Contender(f"{provider}, eager", eager, form(case.preset, eager)))
        run: Any = torch.compile(form(case.preset, compiled), dynamic=False)
        found.append(Contender(f"{provider}, torch.compile", compiled, run))
    for backend in backends:
        fused = FusedActivationUnit(case.dim, spec=preset(case.preset, case.hidden_units), backend=backend)
        peers.copy_weights(unit, fused)
        found.append(Contender(ours(backend, backend == backends[0]), fused, fused, backend))
    return found


def plain(case: Case, dtype: torch.dtype) -> Contender:
    """The framework's own unit, eager, in another dtype: float64 is what the others are compared with."""
    unit = host(case).to(dtype)
    return Contender(f"{peers.PACKAGES[case.preset]} {dtype}", unit, Plain(case.preset, unit))


@torch.no_grad()
def randomise(unit: nn.Module, generator: torch.Generator) -> None:
    """Weights and running statistics that test something: some units start at zero slopes, or at N(0, 1e-4) weights."""

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    for layer in peers.layers(unit):
        for name, p in layer.named_parameters():
            if isinstance(layer, nn.Linear) and name == "weight":
                p.copy_(normal(p) / p.shape[1] ** 0.5)
            elif name.endswith("weight") and not isinstance(layer, nn.PReLU):  # of a BatchNorm
                p.copy_(1 + 0.2 * normal(p))
            else:
                p.copy_(0.3 * normal(p))
        for name, b in layer.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.2 * normal(b))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=b.dtype))


def inputs(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """history (B, L, D), target (B, D) and the gradient of the output (B, D), float32, from N(0, 1)."""
    b, length, d = case.batch, case.length, case.dim
    shapes = ((b, length, d), (b, d), (b, d))
    history, target, gradient = (torch.randn(s, generator=generator) for s in shapes)
    return history, target, gradient


def shared_inputs(case: Case) -> tuple[Tensor, Tensor]:
    """One history for all candidates (B, L, D), as a view of stride 0, and the candidates (B, D)."""
    g = torch.Generator().manual_seed(0)
    history = torch.randn(1, case.length, case.dim, generator=g)
    return history.expand(case.batch, -1, -1), torch.randn(case.batch, case.dim, generator=g)


def mode_inputs(case: Case, mode: str) -> tuple[Tensor, ...]:
    """What :func:`ready` hands over in one of :data:`MODES`."""
    if mode == CANDIDATES:
        return shared_inputs(case)
    history, target, gradient = inputs(case, torch.Generator().manual_seed(0))
    return (history, target) if mode == FORWARD else (history.requires_grad_(), target.requires_grad_(), gradient)


def ready(contender: Contender, mode: str, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Set a contender to training or evaluation, and give the call that is timed, ``with torch.set_grad_enabled(mode ==
    TRAINING)`` around all calls."""
    contender.run.train(mode == TRAINING)
    return partial(training_step, contender, *given) if mode == TRAINING else partial(contender.run, *given)


def forward(contender: Contender, history: Tensor, target: Tensor) -> Tensor:
    """The output, without gradients. Set the mode before: ``contender.run.eval()``."""
    with torch.no_grad():
        return contender.run(history, target)


def training_step(contender: Contender, history: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
    """Forward, and backward to history, target (leaves) and all parameters; returns the output.

    Set the mode before: ``contender.run.train()`` for the statistics of the batch.
    """
    for t in (history, target, *contender.unit.parameters()):
        t.grad = None
    out = contender.run(history, target)
    out.backward(gradient)
    return out.detach()

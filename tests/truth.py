"""The rule that every kernel is held to, and the cases it is held to.

The truth is plain PyTorch in float64 (``din_fast.reference``); *plain* is the same in the kernel's dtype, from the same
numbers. For the output, every gradient and the running statistics, on the maximum and on the root mean square, pooled
over the seeds:

    err(fused) <= 2 err(plain) + 32 u S

u is the unit roundoff of the dtype, S the largest absolute value of the truth, for a gradient at least a tenth of the
largest gradient of the case (a bias in front of a BatchNorm has a gradient of exactly zero). float64 kernels are held
to 1e-11 S. A kernel that breaks the rule is wrong: the tolerance is never raised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from din_fast import FusedActivationUnit, UnitSpec, preset, reference

SEEDS = 8
FACTOR = 2.0
EXTRA = 32.0
FLOOR = 0.1
DOUBLE = 1e-11

Adjust = Callable[[nn.Module], None]
Initialise = Callable[[nn.Module, torch.Generator], None]

SPECS: dict[str, UnitSpec] = {
    "rechub": preset("rechub"),
    "rechub-two-layers-softmax": preset("rechub", [17, 5], softmax=True),
    "rechub-relu": preset("rechub", [20], "relu"),
    "rechub-prelu": preset("rechub", [9, 6], "prelu"),
    "rechub-sigmoid": preset("rechub", [12], "sigmoid"),
    "rechub-no-hidden-layer": preset("rechub", []),
    "fuxictr": preset("fuxictr", [50]),
    "fuxictr-two-layers": preset("fuxictr", [80, 40]),
    "fuxictr-softmax": preset("fuxictr", [24, 7], softmax=True),
    "fuxictr-norm-and-dice": preset("fuxictr", [16, 9], batch_norm=True),
    "fuxictr-norm-relu": preset("fuxictr", [16, 9, 5], "relu", batch_norm=True),
    "fuxictr-relu": preset("fuxictr", [36], "relu"),
    "fuxictr-prelu-per-channel": preset("fuxictr", [19, 10], "prelu"),
    "fuxictr-sigmoid-softmax": preset("fuxictr", [32], "sigmoid", softmax=True),
    "fuxictr-identity": preset("fuxictr", [8], "identity"),
    "fuxictr-three-layers": preset("fuxictr", [20, 10, 6]),
    "deepctr": preset("deepctr", [16, 8]),
    "deepctr-softmax": preset("deepctr", [33], softmax=True),
    "deepctr-sigmoid": preset("deepctr", None, "sigmoid"),
    "blog": preset("blog"),
    "row-dice-without-norm": UnitSpec((21, 4), activation="dice_row"),
    "row-dice-per-channel": UnitSpec((13,), activation="dice_row", batch_norm=True, per_channel_slope=True),
    "batch-dice-one-slope": UnitSpec((13,), activation="dice_batch", dice_affine=True),
    "mean-over-all": UnitSpec((11,), activation="relu", pooling="mean"),
    "mean-over-valid": UnitSpec((11,), activation="prelu", softmax=True, pooling="mean_valid"),
    "three-blocks": UnitSpec((14,), blocks=("k", "q*k", "q"), activation="dice_row", batch_norm=True),
    "no-raw-history": UnitSpec((14,), blocks=("q", "q", "q*k", "q-k"), activation="dice_batch"),
    "no-hidden-layer-softmax": UnitSpec((), activation="identity", softmax=True, empty="uniform"),
    "tanh": UnitSpec((12, 5), activation="tanh"),
    "norm-tanh-softmax": UnitSpec((9, 14), activation="tanh", batch_norm=True, softmax=True),
    "silu": UnitSpec((12, 7), activation="silu", blocks=("k-q", "q*k", "k", "q")),
    "norm-silu": UnitSpec((8, 17, 3), activation="silu", batch_norm=True, blocks=("k-q", "q", "q*k")),
    "leaky-relu": UnitSpec((10, 6), activation="leaky_relu", negative_slope=0.2, hidden_bias=False),
    "norm-leaky-relu-mean": UnitSpec((18,), activation="leaky_relu", batch_norm=True, pooling="mean"),
    "score-prelu": UnitSpec((9,), activation="prelu", score_activation="prelu", scale_scores=True),
    "score-prelu-dice-mean": UnitSpec((20, 4), activation="dice_batch", score_activation="prelu", pooling="mean_valid"),
    "score-prelu-no-hidden-layer": UnitSpec((), activation="identity", score_activation="prelu", scale_scores=True),
    "scores-out": UnitSpec((16, 5), activation="dice_batch", pooling="none"),
    "scores-out-softmax": UnitSpec((11,), activation="relu", softmax=True, pooling="none", empty="uniform"),
    "scores-out-prelu": UnitSpec((7,), activation="prelu", score_activation="prelu", pooling="none"),
    "scores-out-sigmoid": UnitSpec((7,), score_activation="sigmoid", pooling="none", scale_scores=True),
    "recbole": preset("recbole", [16, 8, 4]),
    "recbole-dice": preset("recbole", [13], "dice"),
    "easyrec-norm-dice": preset("easyrec", [32, 8], "dice", batch_norm=True),
    "easyrec-leaky-relu": preset("easyrec", [12], "leaky_relu"),
    "recstudio": preset("recstudio", [16, 7]),
    "rechorus": preset("rechorus", [33]),
    "paper": preset("paper"),
    "sparrow": preset("sparrow"),
    "valid-dice": UnitSpec((18, 7), activation="dice_batch", dice_affine=True, batch_stats="valid"),
    "valid-norm-row-dice-softmax": UnitSpec((15,), batch_norm=True, softmax=True, batch_stats="valid", empty="uniform"),
    "valid-norm-and-dice": UnitSpec((9, 16, 5), activation="dice_batch", batch_norm=True, batch_stats="valid"),
    "valid-norm-silu": UnitSpec((10,), activation="silu", batch_norm=True, batch_stats="valid", pooling="mean_valid"),
    "dropout-relu": UnitSpec((20, 9), activation="relu", dropout=0.4),
    "dropout-row-dice": UnitSpec((21,), batch_norm=True, dropout=0.2, softmax=True),
    "dropout-dice": UnitSpec((16, 9, 6), activation="dice_batch", dice_affine=True, dropout=0.3),
    "dropout-prelu-valid": UnitSpec((12, 8), activation="prelu", batch_norm=True, dropout=0.1, batch_stats="valid"),
}
SHAPES = (
    (7, 13, 10),
    (5, 33, 7),
    (4, 16, 16),
    (3, 40, 36),
    (9, 8, 3),
    (2, 201, 5),
    (16, 1, 12),
    (1, 50, 8),
    (6, 65, 32),
)
MASKINGS = ("none", "mask", "lengths", "both")


@dataclass(frozen=True)
class Case:
    """One unit on one shape: B, L and D, how positions are masked, and the mode of the module."""

    spec: UnitSpec
    shape: tuple[int, int, int] = (7, 13, 10)
    masking: str = "none"
    training: bool = True
    scale: float = 1.0  # standard deviation of query and history
    candidates: int | None = None  # M, where each history has several

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.masking}-{'train' if self.training else 'eval'}"


def cases() -> dict[str, Case]:
    """Every spec in both modes, over shapes and maskings in turn: each pair of choices meets, not the full product."""
    found = {}
    for i, (name, spec) in enumerate(SPECS.items()):
        for training in (True, False):
            shape = SHAPES[(i + 4 * training) % len(SHAPES)]
            case = Case(spec, shape, MASKINGS[(i + i // 4 + training) % len(MASKINGS)], training)
            found[f"{name}-{case}"] = case
    return found


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call, and the gradient that comes back to its output."""

    history: Tensor
    target: Tensor
    mask: Tensor | None
    lengths: Tensor | None
    upstream: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(
            self, history=self.history.to(dtype), target=self.target.to(dtype), upstream=self.upstream.to(dtype)
        )

    @property
    def valid(self) -> Tensor | None:
        """(B, L) bool, what mask and lengths say together."""
        valid = self.mask
        if self.lengths is not None:
            within = torch.arange(self.history.shape[1]) < self.lengths[:, None]
            valid = within if valid is None else within & valid
        return valid


def draw(case: Case, seed: int, dtype: torch.dtype) -> Inputs:
    """Normal inputs; the first history is full, the last one (of several) empty, masks have holes."""
    g = torch.Generator().manual_seed(1000 + seed)
    batch, length, dim = case.shape
    mask = lengths = None
    if case.masking in ("mask", "both"):
        mask = torch.rand(batch, length, generator=g) < 0.7
        if batch > 1:
            mask[-1] = False
    if case.masking in ("lengths", "both"):
        lengths = torch.randint(0, length + 1, (batch,), generator=g)
        if batch > 0:
            lengths[0] = length
        if batch > 1:
            lengths[-1] = 0
    history = case.scale * torch.randn(batch, length, dim, generator=g, dtype=dtype)
    shape = (batch,) if case.candidates is None else (batch, case.candidates)
    target = case.scale * torch.randn(*shape, dim, generator=g, dtype=dtype)
    columns = length if case.spec.pooling == "none" else dim
    return Inputs(history, target, mask, lengths, torch.randn(*shape, columns, generator=g, dtype=dtype))


@torch.no_grad()
def randomise(unit: nn.Module, g: torch.Generator) -> None:
    """Parameters and running statistics of which none is trivial."""
    for name, p in unit.named_parameters():
        noise = torch.randn(p.shape, generator=g, dtype=p.dtype)
        if p.dim() == 2:
            p.copy_(noise / p.shape[1] ** 0.5)
        elif name.endswith("weight"):  # of a BatchNorm or a PReLU
            p.copy_((1.0 if p.numel() > 1 else 0.3) + 0.2 * noise)
        else:
            p.copy_(0.3 * noise)
    for name, b in unit.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.2 * torch.randn(b.shape, generator=g, dtype=b.dtype))
        elif name.endswith("running_var"):
            b.copy_(0.5 + torch.rand(b.shape, generator=g, dtype=b.dtype))


def fused_unit(spec: UnitSpec, dim: int, backend: str, like: nn.Module | None = None) -> FusedActivationUnit:
    """A fused unit of the dtype, the parameters and the mode of another one, or with random parameters."""
    unit = FusedActivationUnit(dim, spec=spec, backend=backend)
    if like is None:
        randomise(unit, torch.Generator().manual_seed(0))
        return unit
    unit.to(next(like.parameters()).dtype).load_state_dict(like.state_dict())
    return unit.train(like.training)


def call(unit: nn.Module, inputs: Inputs) -> Tensor:
    """The forward of either unit, both with the same random numbers; the plain one has its histories expanded."""
    assert isinstance(unit, FusedActivationUnit | reference.ActivationUnit)
    if unit.spec.dropout:
        torch.manual_seed(7)
    if isinstance(unit, FusedActivationUnit):
        out = unit(inputs.history, inputs.target, mask=inputs.mask, lengths=inputs.lengths)
        assert unit.last_backend == unit.backend
    elif inputs.target.dim() == 2:
        out = unit(inputs.history, inputs.target, inputs.valid)
    else:
        shape = inputs.target.shape[:2]
        history = inputs.history.repeat_interleave(shape[1], dim=0)
        valid = None if inputs.valid is None else inputs.valid.repeat_interleave(shape[1], dim=0)
        out = unit(history, inputs.target.flatten(0, 1), valid)
        out = out.view(*shape, out.shape[-1])
    assert isinstance(out, Tensor)
    return out


def step(unit: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """One forward and backward: the output, every gradient, and the running statistics after it."""
    with torch.no_grad():
        without_grad = call(copy.deepcopy(unit), inputs)
    history, target = inputs.history.detach().requires_grad_(), inputs.target.detach().requires_grad_()
    out = call(unit, replace(inputs, history=history, target=target))
    named = {"history": history, "target": target, **dict(unit.named_parameters())}
    grads = torch.autograd.grad(out, list(named.values()), inputs.upstream, allow_unused=True, materialize_grads=True)
    found = {"output": out.detach(), "output without grad": without_grad}
    found |= {f"grad {name}": grad for name, grad in zip(named, grads, strict=True)}
    return found | {name: b.clone() for name, b in unit.named_buffers() if "running" in name}


def assert_near(name: str, found: Tensor, right: Tensor, atol: float) -> None:
    """For the few places where a bound on the difference is meant, not the rule."""
    torch.testing.assert_close(found, right, rtol=0, atol=atol, msg=lambda message: f"{name}: {message}")


class Comparison:
    """Errors of the fused and of the plain form against the truth, pooled over :meth:`add`, judged by :meth:`check`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.roundoff = torch.finfo(dtype).eps / 2
        self.size: dict[str, float] = {}
        self.largest: dict[tuple[str, str], float] = {}
        self.squares: dict[tuple[str, str], tuple[float, int]] = {}

    def add(self, truth: Mapping[str, Tensor], plain: Mapping[str, Tensor], fused: Mapping[str, Tensor]) -> None:
        assert set(truth) == set(plain) == set(fused)
        for name, right in truth.items():
            self.size[name] = max(self.size.get(name, 0.0), _largest(right))
            for who, found in (("plain", plain[name]), ("fused", fused[name])):
                assert found.shape == right.shape and found.dtype == self.dtype, name
                error = found.double() - right
                key = (name, who)
                self.largest[key] = _worse(self.largest.get(key, 0.0), _largest(error))
                total, count = self.squares.get(key, (0.0, 0))
                self.squares[key] = (total + float(error.square().sum()), count + error.numel())

    def rows(self) -> list[tuple[str, str, float, float, float, float]]:
        """(tensor, measure, S, error of plain, error of fused, limit)."""
        gradients = max((s for name, s in self.size.items() if name.startswith("grad ")), default=0.0)
        rows = []
        for name, size in self.size.items():
            if name.startswith("grad "):
                size = max(size, FLOOR * gradients)
            for measure, error in (("max", self.largest.__getitem__), ("rms", self._rms)):
                plain, fused = error((name, "plain")), error((name, "fused"))
                limit = DOUBLE * size
                if self.dtype != torch.float64:
                    limit = FACTOR * plain + EXTRA * self.roundoff * size
                rows.append((name, measure, size, plain, fused, limit))
        return rows

    def check(self) -> None:
        """Raise an AssertionError with the whole table where a row breaks the rule (NaN breaks it)."""
        rows = self.rows()
        if all(fused <= limit for *_, fused, limit in rows):
            return
        lines = [f"{'':2}{'tensor':44}{'':6}{'S':>10}{'plain':>11}{'fused':>11}{'limit':>11}"]
        for name, measure, size, plain, fused, limit in rows:
            sign = "  " if fused <= limit else "! "
            lines.append(f"{sign}{name:44}{measure:6}{size:10.2e}{plain:11.2e}{fused:11.2e}{limit:11.2e}")
        raise AssertionError("the rule of tests/truth.py is broken:\n" + "\n".join(lines))

    def _rms(self, key: tuple[str, str]) -> float:
        total, count = self.squares[key]
        return (total / count) ** 0.5 if count else 0.0


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _worse(a: float, b: float) -> float:
    return b if b != b else max(a, b)


def check_parity(
    case: Case,
    backend: str,
    dtype: torch.dtype = torch.float32,
    adjust: Adjust | None = None,
    initialise: Initialise = randomise,
) -> None:
    """Hold a backend to the rule on one case; ``adjust`` changes the modules (a frozen norm, say) before the step."""
    comparison = Comparison(dtype)
    for seed in range(SEEDS if dtype == torch.float32 else 3):
        inputs = draw(case, seed, dtype)
        plain = reference.ActivationUnit(case.shape[2], case.spec).to(dtype).train(case.training)
        initialise(plain, torch.Generator().manual_seed(seed))
        fused = fused_unit(case.spec, case.shape[2], backend, like=plain)
        truth = copy.deepcopy(plain).double()
        for unit in (truth, plain, fused):
            if adjust is not None:
                adjust(unit)
        comparison.add(step(truth, inputs.to(torch.float64)), step(plain, inputs), step(fused, inputs))
    comparison.check()

"""What the fused units of all frameworks share: a host's MLP read as parameters and spec, and the call of the kernels.

A fused unit is the host's own module with another ``__class__``: a subclass of the host's class whose forward runs the
kernels. Parameters, buffers, children and hooks stay the objects they are. Nothing of them is cached: each forward
reads the modules that are there now.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from din_fast import functional
from din_fast.spec import MAX_HIDDEN_LAYERS, HiddenLayer, UnitParameters, UnitSpec

NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)
SIMPLE: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
}
# What may be behind the last Linear, as UnitSpec.score_activation.
SCORE_KINDS = {"identity": "none", "sigmoid": "sigmoid", "prelu": "prelu"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unsupported(Exception):
    """Why a unit cannot be fused as it stands; the message is the reason, in a few words."""


class Plan(NamedTuple):
    """A host's unit as the kernels take it: D, what it computes, and its parameters."""

    dim: int
    spec: UnitSpec
    parameters: UnitParameters


class Activation(NamedTuple):
    """An activation after a hidden Linear: ``kind`` is :attr:`UnitSpec.activation`, the rest what that kind needs."""

    kind: str
    slope: Tensor | None = None
    gate_norm: nn.modules.batchnorm._BatchNorm | None = None
    dice_eps: float = UnitSpec.dice_eps
    negative_slope: float = UnitSpec.negative_slope


class Fused(nn.Module):
    """The base of every fused unit: ``class FusedX(Fused, X)`` with a forward of X's signature.

    A forward reads :func:`live`, and runs the kernels by :func:`run` on what that gives; where it gives None it returns
    ``super().forward(...)``, the host's own. It is never constructed: :func:`din_fast.fuse` changes the class of a
    module that is there, :func:`din_fast.unfuse` changes it back.

    Attributes:
        framework: the framework's name, for reports.
        host: the host's class.
        din_fast_backend: the backend that was asked for.
        last_backend: the backend that ran the last forward, ``host`` for the host's own code, None before the first.
    """

    framework: ClassVar[str]
    host: ClassVar[type[nn.Module]]
    din_fast_backend: str
    last_backend: str | None

    @staticmethod
    @abstractmethod
    def plan(unit: Any) -> Plan:
        """Read a module of the host's class, fused or not.

        Raises:
            Unsupported: the kernels cannot do what the module does.
        """


def swap(unit: Any, fused: type[Fused], backend: str) -> None:
    """Make a module of the host's class a fused one, in place."""
    unit.__class__ = fused
    unit.din_fast_backend = backend
    unit.last_backend = None


def swap_back(unit: Any) -> None:
    """Undo :func:`swap`: nothing of it stays."""
    del unit.din_fast_backend, unit.last_backend
    unit.__class__ = unit.host


_told: set[str] = set()


def live(unit: Fused, unsupported: str | None = None) -> Plan | None:
    """The unit as it is now; None where only the host's own code can do this call.

    So it is where the unit was changed since it was fused, and where the call is of a kind that only the host knows,
    which ``unsupported`` says.

    Raises:
        RuntimeError: it is so, and the backend was named. (With ``auto`` one warning says it.)
    """
    try:
        if unsupported is not None:
            raise Unsupported(unsupported)
        return unit.plan(unit)
    except Unsupported as reason:
        told = f"{type(unit).__name__} cannot run on the kernels: {reason}"
        if unit.din_fast_backend != "auto":
            raise RuntimeError(f"backend {unit.din_fast_backend!r} cannot run: {told}") from None
        if told not in _told:
            _told.add(told)
            warnings.warn(f"din_fast leaves it to the framework's own code: {told}", RuntimeWarning, stacklevel=4)
        unit.last_backend = "host"
        return None


def run(
    unit: Fused,
    plan: Plan,
    query: Tensor,
    history: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_name: str = "target",
) -> Tensor:
    """(B, D), (B, L, D), a bool (B, L), (B,) -> (B, D), or (B, L) where the plan's pooling is ``none``.

    Errors as :func:`din_fast.activation_unit`.
    """
    result = functional.run(
        query, history, plan.parameters, plan.spec, mask, lengths, unit.din_fast_backend, query_name, plan.dim
    )
    unit.last_backend = result.backend
    return result.output(plan.spec)


def whole_lengths(lengths: Tensor, limit: int) -> Tensor:
    """How many positions ``arange(limit) < lengths`` lets through, int64, for lengths of any dtype and value."""
    return lengths.ceil().clamp(0, limit).to(torch.int64)


def fill_overflows(plan: Plan, history: Tensor) -> Plan:
    """Scores of a half type cannot hold -2**31: the fill is -inf then, and a softmax over nothing NaN, not uniform."""
    device = history.device.type
    autocast = torch.is_autocast_enabled(device) and history.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else history.dtype
    return plan._replace(spec=replace(plan.spec, empty="nan")) if dtype == torch.float16 else plan


def check_children(unit: nn.Module) -> None:
    """Raise Unsupported where a child does more than its class says: the kernels read its tensors, and do not call it.

    Weight normalisation by hooks, pruning and quantisation observers are such.
    """
    for name, child in unit.named_modules():
        if child is unit:
            continue
        if any(getattr(child, hooks) for hooks in _HOOKS):
            raise Unsupported(f"{name} has hooks, which would not be called")
        if "forward" in vars(child):
            raise Unsupported(f"{name} has a forward of its own")


def activation_of(module: nn.Module) -> Activation:
    """The activations of torch.nn that the kernels know."""
    kind = SIMPLE.get(type(module))
    if kind is not None:
        return Activation(kind)
    if type(module) is nn.PReLU:
        return Activation("prelu", slope=module.weight)
    if type(module) is nn.LeakyReLU:
        return Activation("leaky_relu", negative_slope=module.negative_slope)
    raise Unsupported(f"unsupported activation {type(module).__name__}")


def one_slope(module: nn.Module) -> Activation:
    """As :func:`activation_of`, for hosts whose MLP sees (B, L, H): there a PReLU of several slopes runs along L."""
    if type(module) is nn.PReLU and module.num_parameters != 1:
        raise Unsupported("a PReLU with a slope for each position")
    return activation_of(module)


class _Layer:
    """A Linear and what follows it, up to the next."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.norm: nn.modules.batchnorm._BatchNorm | None = None
        self.activation: nn.Module | None = None
        self.dropout: nn.Dropout | None = None

    def add(self, module: nn.Module) -> None:
        """Take the next module: a norm, an activation and a dropout, each at most once, in this order."""
        name = type(module).__name__
        if self.dropout is not None:
            raise Unsupported(f"{name} behind a dropout")
        if type(module) is nn.Dropout:
            self.dropout = module
        elif self.activation is not None:
            raise Unsupported(f"{type(self.activation).__name__} in front of {name}")
        elif isinstance(module, NORMS) and type(module) in NORMS and self.norm is None:
            self.norm = module
        else:
            self.activation = module


def read(
    modules: Iterable[nn.Module],
    dim: int,
    activation: Callable[[nn.Module], Activation] = activation_of,
    **fields: Any,
) -> Plan:
    """The modules of a host's MLP, in the order in which they run, as a plan.

    Args:
        modules: [Linear, [BatchNorm], [activation], [Dropout]] for each hidden layer, Linear(., 1), [activation].
            Classes count exactly: a subclass may do anything.
        dim: D.
        activation: what a module behind a Linear is; it raises Unsupported for what the kernels do not know.
        fields: the fields of :class:`UnitSpec` that the host decides.

    Raises:
        Unsupported: they are not such an MLP, or one that the kernels do not know.
    """
    layers: list[_Layer] = []
    for module in modules:
        if type(module) is nn.Linear:
            layers.append(_Layer(module))
        elif type(module) is nn.Dropout and module.p == 0.0:
            continue
        elif not layers:
            raise Unsupported(f"{type(module).__name__} in front of the first Linear")
        else:
            layers[-1].add(module)
    if not layers:
        raise Unsupported("it has no Linear")
    *hidden, end = layers
    blocks = fields.get("blocks", UnitSpec.blocks)
    _check_sizes([layer.linear for layer in layers], len(blocks) * dim)
    if end.norm is not None or end.dropout is not None:
        raise Unsupported("a norm or a dropout behind the last Linear")
    identity = Activation("identity")
    found = [identity if x.activation is None else activation(x.activation) for x in hidden]
    _same("activation", [a.kind for a in found])
    _same("eps of Dice", [a.dice_eps for a in found])
    _same("slope", [a.negative_slope for a in found])
    _same("norm", [x.norm is not None for x in hidden])
    dropouts = [0.0 if x.dropout is None else x.dropout.p for x in hidden]
    _same("dropout", dropouts)
    if hidden and dropouts[0] >= 1.0:
        raise Unsupported("a dropout of everything")
    common = found[0] if found else identity
    score = identity if end.activation is None else activation(end.activation)
    if score.kind not in SCORE_KINDS or (score.slope is not None and score.slope.numel() != 1):
        raise Unsupported(f"unsupported activation of the score {type(end.activation).__name__}")
    if score.kind != "identity" and fields.get("softmax"):
        raise Unsupported(f"{type(end.activation).__name__} on the score together with softmax")
    spec = UnitSpec(
        hidden_units=tuple([x.linear.out_features for x in hidden]),
        activation=common.kind,
        batch_norm=bool(hidden) and hidden[0].norm is not None,
        dice_eps=common.dice_eps,
        negative_slope=common.negative_slope,
        score_activation=SCORE_KINDS[score.kind],
        dropout=dropouts[0] if hidden and dropouts[0] else None,
        **fields,
    )
    layers_found = tuple([_hidden(x, a) for x, a in zip(hidden, found, strict=True)])
    return Plan(dim, spec, UnitParameters(layers_found, end.linear.weight, end.linear.bias, score.slope))


def _hidden(layer: _Layer, activation: Activation) -> HiddenLayer:
    linear, dropout = layer.linear, layer.dropout
    p = dropout.p if dropout is not None and dropout.training else 0.0
    return HiddenLayer(linear.weight, linear.bias, layer.norm, activation.gate_norm, activation.slope, p)


def _check_sizes(linears: list[nn.Linear], inputs: int) -> None:
    if len(linears) - 1 > MAX_HIDDEN_LAYERS:
        raise Unsupported(f"{len(linears) - 1} hidden layers, the kernels take up to {MAX_HIDDEN_LAYERS}")
    for linear in linears:
        if linear.in_features != inputs:
            raise Unsupported(f"a Linear of {linear.in_features} inputs, expected {inputs}")
        inputs = linear.out_features
    if inputs != 1:
        raise Unsupported(f"{inputs} scores for each position")


def _same(what: str, found: list[Any]) -> None:
    for other in found:
        if other != found[0]:
            raise Unsupported(f"hidden layers that differ in {what}: {', '.join([str(f) for f in found])}")

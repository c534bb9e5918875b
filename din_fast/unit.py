"""The drop-in module."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from din_fast import dispatch, functional, quick, reference
from din_fast.frameworks.common import Plan
from din_fast.fusing import plan_of
from din_fast.spec import HiddenLayer, UnitSpec, check_widths, preset


class FusedActivationUnit(nn.Module):
    """DIN's activation unit in one pass; by default torch-rechub's ``ActivationUnit``, with its state_dict keys.

    Args:
        emb_dim: D, the size of an embedding.
        dims: widths of the hidden layers; default [36]. Copied.
        activation: ``dice``, ``relu``, ``leaky_relu``, ``prelu``, ``sigmoid``, ``silu``, ``tanh`` or ``identity``.
        use_softmax: normalise the scores over the valid positions.
        spec: another unit than torch-rechub's, see :func:`din_fast.preset`; together with dims, activation or
            use_softmax it raises.
        backend: ``auto``, ``native``, ``triton`` or ``reference``; see :func:`din_fast.activation_unit`.

    Attributes:
        last_backend: the backend that ran the last forward, or None before the first.

    Raises:
        ValueError: emb_dim or dims not positive, an unknown activation or backend, spec together with dims.
        TypeError: emb_dim or dims of another type.
    """

    last_backend: str | None
    _quick: quick.Quick | None = None

    def __init__(
        self,
        emb_dim: int,
        dims: Sequence[int] | None = None,
        activation: str | None = None,
        use_softmax: bool | None = None,
        *,
        spec: UnitSpec | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(emb_dim, int) or isinstance(emb_dim, bool):
            raise TypeError(f"emb_dim: expected an int, got {emb_dim!r}")
        if emb_dim < 1:
            raise ValueError(f"emb_dim: expected a positive size, got {emb_dim}")
        dispatch.check_name(backend)
        if spec is None:
            spec = preset(
                "rechub",
                None if dims is None else check_widths("dims", dims),
                activation,
                use_softmax,
            )
        elif not isinstance(spec, UnitSpec):
            raise TypeError(f"spec: expected a UnitSpec, got {type(spec).__name__}")
        elif dims is not None or activation is not None or use_softmax is not None:
            raise ValueError(
                "spec: it already holds dims, activation and use_softmax; expected one or the other, got both"
            )
        self.emb_dim = emb_dim
        self.spec = spec
        self.backend = backend
        self.last_backend = None
        self.attention = reference.MLP(emb_dim, spec)

    @classmethod
    def from_module(cls, module: nn.Module, *, backend: str = "auto") -> FusedActivationUnit:
        """One unit of a known framework as a unit of this class, with a copy of its weights and statistics.

        For models that are to be rid of the framework; to fuse one in place, see :func:`din_fast.fuse`. What the
        host's forward does around the unit stays behind: its argument order, its form of a mask, the windows of
        TorchEasyRec's ``MultiWindowDINEncoder``, of which this is the scores.

        Args:
            module: a unit that :func:`din_fast.fuse` knows, fused or not. It is not changed.
            backend: as for the class.

        Raises:
            ValueError: it is no known unit, or one that the kernels cannot do; the message says why. An unknown
                backend.
        """
        found = plan_of(module)
        if found is None or isinstance(found, str):
            reason = found or f"{type(module).__name__} is not known"
            raise ValueError(f"module: expected a unit that din_fast.fuse can fuse: {reason}")
        plan = found[1]
        unit = cls(plan.dim, spec=plan.spec, backend=backend)
        unit.attention.mlp = _copied(plan)
        return unit.train(module.training)

    def forward(
        self, history: Tensor, target: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """history (B, L, D), target (B, D), mask (B, L) bool with True = valid, lengths (B,) -> (B, D).

        Several candidates for each history: target (B, M, D) -> (B, M, D); or history (1, L, D) and target (M, D) ->
        (M, D). With the pooling ``none`` the result is the weights, (B, L), (B, M, L) or (M, L).

        The argument order is torch-rechub's, history first. Mind it with targets of three dimensions, where nothing can
        tell them from a history: :func:`din_fast.activation_unit` is keyword-only. Errors as there.
        """
        if mask is None and lengths is None and quick.may_be(history, target, self.backend):
            found = self._quick_score(history, target)
            if found is not None:
                return found
        parameters = self.attention.unit_parameters()
        result = functional.run(
            target, history, parameters, self.spec, mask, lengths, self.backend, "target", self.emb_dim
        )
        self.last_backend = result.backend
        return result.output(self.spec)

    def _quick_score(self, history: Tensor, target: Tensor) -> Tensor | None:
        """What the native backend gives for a plain call without gradient; None where the call has to be looked at."""
        places = self._quick
        if places is None or not places.holds(self._modules["attention"], self.spec, history.shape[2]):
            if history.shape[2] != self.emb_dim:
                return None
            places = self._quick = quick.Quick(self.attention, self.spec, history)
        found = places.score(history, target)
        if found is not None and self.last_backend != "native":
            self.last_backend = "native"
        return found

    def extra_repr(self) -> str:
        spec = self.spec
        rest = f", dropout={spec.dropout}" if spec.dropout else ""
        rest += f", batch_stats={spec.batch_stats}" if spec.batch_stats != "all" else ""
        return (
            f"emb_dim={self.emb_dim}, hidden_units={list(spec.hidden_units)}, activation={spec.activation}, "
            f"softmax={spec.softmax}, pooling={spec.pooling}{rest}, backend={self.backend}"
        )


def _copied(plan: Plan) -> nn.Sequential:
    """The MLP of :class:`FusedActivationUnit` with copies of a plan's parameters and norms."""
    modules: list[nn.Module] = []
    spec, parameters = plan.spec, plan.parameters
    for layer in parameters.hidden:
        modules.append(_linear(layer.weight, layer.bias))
        if layer.norm is not None:
            modules.append(copy.deepcopy(layer.norm))
        modules.append(_activation(layer, spec))
        if spec.dropout is not None:
            modules.append(nn.Dropout(spec.dropout))
    modules.append(_linear(parameters.weight, parameters.bias))
    if parameters.score_slope is not None:
        modules.append(_with_slope(nn.PReLU(), "weight", parameters.score_slope))
    return nn.Sequential(*modules)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def _activation(layer: HiddenLayer, spec: UnitSpec) -> nn.Module:
    module = reference.activation_module(layer.weight.shape[0], spec)
    if layer.gate_norm is not None:
        module.bn = copy.deepcopy(layer.gate_norm)
    if layer.slope is None:
        return module
    return _with_slope(module, "weight" if isinstance(module, nn.PReLU) else "alpha", layer.slope)


def _with_slope(module: nn.Module, name: str, slope: Tensor) -> nn.Module:
    setattr(module, name, nn.Parameter(slope.detach().clone().reshape(-1)))
    if isinstance(module, nn.PReLU):
        module.num_parameters = slope.numel()
    return module

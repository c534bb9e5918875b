"""Scoring a few items at once, where reading a module and checking it costs more than the kernel.

:class:`Quick` remembers where a unit's tensors are: in which dictionary of which module, under which name. It holds no
tensor and no value, so nothing of it can be stale: each call reads the places again. What it cannot do, or the op
refuses, is left to :func:`din_fast.functional.run`, which checks everything and says what is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from din_fast import dispatch, functional, ops, segments
from din_fast.backends import native
from din_fast.reference import MLP
from din_fast.spec import UnitSpec

Place = tuple[dict[str, Any], str]
_NOWHERE: Place = ({"": None}, "")


class Quick:
    """Where the tensors of a unit are, in the order of ``infer``.

    Attributes:
        possible: whether the unit can be scored so: every tensor is one that a module holds, in one place only.
    """

    def __init__(self, mlp: MLP, spec: UnitSpec, history: Tensor) -> None:
        self.mlp, self.spec, self.dim = mlp, spec, history.shape[-1]
        modules = list(mlp.modules())
        self.children = [(m._modules, list(m._modules.values())) for m in modules if m._modules]
        parameters = mlp.unit_parameters()
        flat = segments.check_parameters(parameters, spec, history)
        norms = [norm for layer in parameters.hidden for norm in (layer.norm, layer.gate_norm)]
        held = [((d, name), d[name]) for m in modules for d in (m._parameters, m._buffers) for name in d]
        place = {id(t): at for at, t in held if t is not None}
        self.possible = (
            len(place) == sum(t is not None for _, t in held)
            and all(t is None or id(t) in place for t in flat)
            and not any(norm is not None and norm.running_mean is None for norm in norms)
            and parameters.score_slope is None
        )
        if self.possible:
            self.places = [_NOWHERE if t is None else place[id(t)] for t in flat]
            self.absent = [at for at, t in held if t is None]
            self.norms = norms
            self.with_modes = [m for m in modules if isinstance(m, (nn.Dropout, nn.modules.batchnorm._BatchNorm))]
            self.table, *self.numbers = functional.infer_constants(spec, self.dim)
            self.infer = ops.op("native", "infer")

    def holds(self, mlp: object, spec: UnitSpec, dim: int) -> bool:
        """Whether the unit still has the modules that were read."""
        if mlp is not self.mlp or spec is not self.spec or dim != self.dim:
            return False
        return all(list(children.values()) == then for children, then in self.children)

    def score(self, history: Tensor, target: Tensor) -> Tensor | None:
        """(B, L, D), (B, D) -> what the unit gives; None where that is not for here."""
        if not self.possible:
            return None
        for m in self.with_modes:
            if m.training:
                return None
        for d, name in self.absent:
            if d[name] is not None:
                return None
        eps = [0.0 if norm is None else norm.eps for norm in self.norms]
        try:
            flat = [d[name] for d, name in self.places]
            with ops.below_autograd():
                pooled, weights = self.infer(
                    history, None, None, None, None, target, flat, self.table, eps, *self.numbers
                )
        except (KeyError, RuntimeError):
            return None
        return weights if self.spec.pooling == "none" else pooled

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the unit finds its own places


def may_be(history: Tensor, target: Tensor, backend: str) -> bool:
    """Whether a call is plain enough: float32 or float64 on the CPU, one candidate a history, nothing to be traced."""
    return (
        not torch.is_grad_enabled()
        and type(history) is Tensor
        and type(target) is Tensor
        and history.is_cpu
        and (history.dtype is torch.float32 or history.dtype is torch.float64)
        and history.dim() == 3
        and target.dim() == 2
        and history.size(0) == target.size(0)
        and history.stride(2) == 1
        and target.stride(1) == 1
        and (history.stride(0) > 0 or history.shape[0] == 1)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and dispatch.resolve(backend) in ("auto", "native")
        and native.why_not() is None
    )

"""How long a step of a user's model takes, and which share of it the activation units are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from din_fast.fusing import fuse, unfuse
from din_fast.verification import call, table

SECONDS = 0.5


class StepTime(NamedTuple):
    """Median milliseconds of one form of the model, or why there are none.

    Attributes:
        form: ``eager``, ``compiled`` (torch.compile) or ``fused``.
        step: of a step of the model.
        units: of the same step of its activation units alone, on the inputs that they get in the model.
        reason: why the form did not run; step and units are NaN then.
    """

    form: str
    step: float
    units: float
    reason: str = ""


def benchmark(model: nn.Module, batch: Any) -> list[StepTime]:
    """Time a step of a model and of the units that can be fused: eager, compiled and fused, and print it.

    A step is forward and backward in training mode, and forward without gradients in evaluation mode. Copies are timed:
    the model is not changed.

    Args:
        model: any module with a unit that :func:`din_fast.fuse` can fuse; fused or not.
        batch: a tuple holds the positional arguments of the model, anything else is its one argument.

    Returns:
        What was printed, one :class:`StepTime` for each form.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no unit that can be fused.
    """
    plain, fused = copy.deepcopy(model), copy.deepcopy(model)
    unfuse(plain)
    names = [row.path for row in fuse(fused).fused]
    if not names:
        raise ValueError(f"model: expected a unit that can be fused, found none\n{fuse(fused, dry_run=True)}")
    calls = _calls(plain, names, batch)
    found = [
        _time("eager", plain, calls, batch, lambda m: m),
        _time("compiled", copy.deepcopy(plain), calls, batch, torch.compile),
        _time("fused", fused, calls, batch, lambda m: m),
    ]
    rows: list[tuple[str, ...]] = [("", "step, ms", "its units, ms", "share", "")]
    for t in found:
        rows.append((t.form, f"{t.step:.3f}", f"{t.units:.3f}", f"{t.units / t.step:.0%}", t.reason))
    what = "forward and backward" if model.training else "forward"
    print(f"din_fast.benchmark: {what}, {torch.get_num_threads()} threads, {len(names)} units\n{table(rows)}")
    return found


class _Call(NamedTuple):
    """One call of a unit in a step of the model: its name, and what it was given."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _calls(model: nn.Module, names: list[str], batch: Any) -> list[_Call]:
    """The calls of the units in a step, in their order."""
    found: list[_Call] = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: found.append(_Call(name, *pytree.tree_map(_leaf, (args, kwargs))))

    handles = [model.get_submodule(name).register_forward_pre_hook(recorder(name), with_kwargs=True) for name in names]
    _step(model, lambda: call(model, batch))
    for handle in handles:
        handle.remove()
    return found


def _leaf(x: object) -> object:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _time(form: str, model: nn.Module, calls: list[_Call], batch: Any, prepare: Callable[[Any], Any]) -> StepTime:
    """Time a model as ``prepare`` makes it, and copies of its units in the same way."""
    units = {c.name: prepare(copy.deepcopy(model.get_submodule(c.name))) for c in calls}
    whole = prepare(model)

    def units_step() -> None:
        for c in calls:
            _step(units[c.name], partial(_outputs, units[c.name], c))

    try:
        step = _median(lambda: _step(whole, lambda: call(whole, batch)))
        return StepTime(form, step, _median(units_step))
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        return StepTime(form, math.nan, math.nan, f"torch.compile failed: {reason}")


def _outputs(unit: nn.Module, c: _Call) -> list[Tensor]:
    return [unit(*c.args, **c.kwargs)]


def _step(module: nn.Module, forward: Callable[[], list[Tensor]]) -> None:
    """Forward; in training mode backward, too, to parameters and inputs."""
    with torch.set_grad_enabled(module.training):
        outputs = [t for t in forward() if t.requires_grad]
        if outputs:
            module.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _median(step: Callable[[], None]) -> float:
    """Milliseconds."""
    from torch.utils import benchmark as timing  # an eighth of a second to import

    step()
    timer = timing.Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median

"""``fuse(model)``: the units of known frameworks run on the kernels, in place; ``unfuse(model)`` takes it back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from din_fast import dispatch, frameworks
from din_fast.frameworks.common import Fused, Plan, Unsupported, swap, swap_back
from din_fast.verification import compare, table


@dataclass(frozen=True)
class FuseRow:
    """One unit that was found.

    Attributes:
        path: its name in the model, as ``named_modules`` has it; "" for the model itself.
        framework, unit: the framework, and the host's class.
        became: what it computes and the backend that runs it, or None where it was left.
        reason: why it was left; where it was not, what there is to know.
    """

    path: str
    framework: str
    unit: str
    became: str | None
    reason: str = ""


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse` found; ``str`` of it is a table.

    Attributes:
        rows: one :class:`FuseRow` for each unit.
        dry_run: nothing was changed.
        verification: with ``verify``, the table of errors that was printed.
    """

    rows: tuple[FuseRow, ...]
    dry_run: bool = False
    verification: str = field(default="", repr=False)

    @property
    def fused(self) -> tuple[FuseRow, ...]:
        """The units that run on the kernels now (with ``dry_run``: that would)."""
        return tuple(row for row in self.rows if row.became is not None)

    @property
    def left(self) -> tuple[FuseRow, ...]:
        """The units that were left as they are."""
        return tuple(row for row in self.rows if row.became is None)

    def __str__(self) -> str:
        if not self.rows:
            return "din_fast.fuse: no activation unit of a known framework in the model"
        done = "would be fused" if self.dry_run else "fused"
        head = ("module", "framework", "class", "became", "")
        lines = [
            (row.path or "(the model)", row.framework, row.unit, row.became or "left", row.reason) for row in self.rows
        ]
        return f"din_fast.fuse: {len(self.fused)} of {len(self.rows)} units {done}\n{table([head, *lines])}"


def fuse(
    model: nn.Module, *, backend: str = "auto", dry_run: bool = False, strict: bool = False, verify: Any = None
) -> FuseReport:
    """Run the DIN activation units of a model on the kernels, in place.

    Known are torch-rechub's ``ActivationUnit``, DeepCTR-Torch's ``AttentionSequencePoolingLayer``, FuxiCTR's
    ``DIN_Attention`` and its DIEN's attention, RecBole's ``SequenceAttLayer``, TorchEasyRec's ``DINEncoder`` and
    ``MultiWindowDINEncoder``, and what :func:`din_fast.register` added. A fused unit is the same object with the same
    parameters, buffers, children, hooks and state_dict keys, of a subclass of its class, and computes what it did:
    optimizers, checkpoints and ``isinstance`` go on working. It is the masking, padding and scaling of the framework
    that it keeps, whatever they are. What differs is rounding, the random numbers of a dropout inside the unit, and
    that NaN or Inf in padded positions of a history no longer spreads to the result.

    Args:
        model: any module; its dtype and device decide, with ``backend``, what runs. Fusing a fused model again only
            sets the backend.
        backend: ``auto``, ``native`` or ``triton``, as in :func:`din_fast.activation_unit`. A unit that would end on
            the reference is left, as there is nothing to gain.
        dry_run: change nothing, only report.
        strict: raise where nothing was fused, or a unit had to be left; then nothing is changed.
        verify: a batch to run the original and the fused model on, forward and backward, on copies: a tuple holds the
            positional arguments of ``model``, anything else is its one argument. The errors of both against float64
            are printed. Dropout is off for it.

    Returns:
        A :class:`FuseReport`, which prints as a table.

    Raises:
        TypeError: model is not a module.
        ValueError: an unknown backend.
        RuntimeError: ``strict``, and see there.
    """
    _check_model(model)
    dispatch.check_name(backend)
    found = [(module, _judge(name, module, backend)) for name, module in model.named_modules()]
    units = [(module, *judged) for module, judged in found if judged is not None]
    rows = tuple(row for _, row, _ in units)
    report = FuseReport(rows, dry_run)
    if strict and (report.left or not report.rows):
        raise RuntimeError(f"strict: expected every unit to be fused, and at least one\n{report}")
    if verify is not None:
        original, twin = copy.deepcopy(model), copy.deepcopy(model)
        unfuse(original)
        fuse(twin, backend=backend)
        report = FuseReport(rows, dry_run, compare(original, twin, verify))
        print(report.verification)
    if not dry_run:
        for module, _, fused in units:
            if fused is not None:
                swap(module, fused, backend)
    return report


def unfuse(model: nn.Module) -> int:
    """Put every fused unit of a model back to its own class, with the weights as they are now.

    Returns:
        How many there were.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    for module in fused:
        swap_back(module)
    return len(fused)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def plan_of(module: nn.Module) -> tuple[type[Fused], Plan] | str | None:
    """The class that fuses a module and its plan; or why it is left; or None where it is no known unit."""
    fused = type(module) if isinstance(module, Fused) else frameworks.recognise(module)
    if fused is None or isinstance(fused, str):
        return fused
    if type(module) not in (fused, fused.host):
        return f"a subclass of {fused.host.__name__}, whose forward may be another"
    if "forward" in vars(module):
        return "it has a forward of its own"
    try:
        return fused, fused.plan(module)
    except Unsupported as reason:
        return str(reason)


def _judge(path: str, module: nn.Module, backend: str) -> tuple[FuseRow, type[Fused] | None] | None:
    """The row of the report and the class that fuses the module; None for a module that is no unit."""
    found = plan_of(module)
    if found is None:
        return None
    left = found if isinstance(found, str) else _no_gain(found[1], backend)
    host = type(module).host if isinstance(module, Fused) else type(module)
    if isinstance(found, str) or left is not None:
        return FuseRow(path, _framework(module), host.__name__, None, left or ""), None
    fused, plan = found
    note = "its dropout draws random numbers of its own" if plan.spec.dropout else ""
    return FuseRow(path, _framework(module), host.__name__, _became(plan, backend), note), fused


def _framework(module: nn.Module) -> str:
    found = type(module) if isinstance(module, Fused) else frameworks.recognise(module)
    return type(module).__module__.partition(".")[0] if found is None or isinstance(found, str) else found.framework


def _no_gain(plan: Plan, backend: str) -> str | None:
    """Why the unit would end on the reference, or could not run at all; None where a kernel runs it."""
    history = plan.parameters.weight.new_empty(0, 0, plan.dim)
    backend = _backend(plan, backend)
    if backend == "reference":
        return "the reference backend is no faster than the framework's own code"
    return dispatch.objection(backend, history, plan.spec.hidden_units)


def _backend(plan: Plan, backend: str) -> str:
    """The backend that a unit will ask for on its device."""
    backend = dispatch.resolve(backend)
    return dispatch.fastest(plan.parameters.weight.device) if backend == "auto" else backend


def _became(plan: Plan, backend: str) -> str:
    spec = plan.spec
    parts = [f"D {plan.dim}", f"hidden {list(spec.hidden_units)}", spec.activation]
    parts += ["batch norm"] if spec.batch_norm else []
    parts += [spec.score_activation + " score"] if spec.score_activation != "none" else []
    parts += ["softmax"] if spec.softmax else []
    parts += ["scores out"] if spec.pooling == "none" else []
    return f"{_backend(plan, backend)}: {', '.join(parts)}"

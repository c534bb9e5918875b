"""A model and its fused twin on the user's batch, both against float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as lines with aligned columns; the first is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def call(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating-point outputs of a model: a tuple holds its positional arguments, anything else is the one."""
    out = model(*batch) if isinstance(batch, tuple) else model(batch)
    found: list[Tensor] = pytree.tree_leaves(out)
    return [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]


def compare(original: nn.Module, fused: nn.Module, batch: Any) -> str:
    """The largest errors of both models against the original in float64, as a table.

    Compared are outputs, the gradient of every parameter for a random gradient of the outputs, and running statistics
    after the step. The models' modes stay as they are, but dropout is off: its random numbers are not the same. NaN
    counts as right where the truth is NaN.

    Args:
        original, fused: the two, of the same state; they are changed by the step.
        batch: what :func:`call` takes.
    """
    truth = copy.deepcopy(original).double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # what a model creates in its forward is float64, too
    try:
        right = _step(truth, pytree.tree_map(_double, batch))
    finally:
        torch.set_default_dtype(before)
    found = [_step(model, batch) for model in (original, fused)]
    rows: list[tuple[str, ...]] = [("", "largest value", "error before", "error fused")]
    for name, t in right.items():
        size, *errors = _largest(t.nan_to_num()), *(_error(f[name], t) for f in found)
        rows.append((name, *(f"{x:.2e}" for x in (size, *errors))))
    return f"din_fast.fuse: largest errors on the batch, against float64\n{table(rows)}"


def _double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        outputs = call(model, batch)
    found = {f"output {i}": t.detach().clone() for i, t in enumerate(outputs)}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differentiable = [t for t in outputs if t.requires_grad]
    if differentiable and parameters:
        g = torch.Generator().manual_seed(0)
        upstream = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in differentiable]
        grads = torch.autograd.grad(
            differentiable, list(parameters.values()), upstream, allow_unused=True, materialize_grads=True
        )
        found |= {f"grad {name}": grad.to_dense() for name, grad in zip(parameters, grads, strict=True)}
    return found | {name: b.clone() for name, b in model.named_buffers() if "running_" in name}


def _error(found: Tensor, right: Tensor) -> float:
    found = found.double()
    return _largest(torch.where(found.isnan() & right.isnan(), 0.0, found - right))


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0

"""Registration with torch.library, and nothing else: fake kernels and autograd of the ops that a backend defines.

A backend ``name`` has five ops, on segments (:mod:`din_fast.segments`) and folded parameters (:mod:`din_fast.fold`):

``{name}_moments``           mean and M2 of a hidden layer's z over all rows, and z itself in panels where it is kept
``{name}_forward``           pooled vectors and weights of the positions
``{name}_backward_moments``  one pass of the backward down to a layer with batch statistics: the sums that they need
``{name}_backward``          the last pass, down to the inputs
``{name}_infer``             evaluation without gradient, from the raw parameters

Arguments of the first four, beside the segments:

weights    A_q, A_k, A_p (H1, D), b1; (W, b) of each further hidden layer; the score's weight (H,) and bias (1,)
affine     six a hidden layer, (H,) or empty: center, norm_scale, norm_shift, gate_scale, gate_shift, slope
response   one a hidden layer, (2, 4, H), or empty where the layer has no batch statistics
kept       one a hidden layer: z in panels, or empty where it is computed again
sums       one a hidden layer, (5, H), or empty while unknown: sum dn (z - center), dn, dx (z - center), dx, d slope
local      what one pass of the backward leaves to the next: d score, and dz of a layer without its statistics' answer
(Lists hold tensors only: torch.library gives no gradient to a list with a None in it. Absent is empty.)

values, candidate_matrix, window_offsets, dropout, seed: not built yet; anything but None and 0 raises
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from din_fast.backends import native

SUMS = 5  # rows of `sums`
AFFINES = 6  # tensors a layer in `affine`
PANEL_ROWS = 16  # kept rows of a user are rounded up to this, csrc/unit.h


# Positions of the arguments of `forward`.
_HISTORY, _QUERY, _WEIGHTS, _AFFINE, _RESPONSE, _KEPT = 0, 5, 6, 7, 8, 9


def op(backend: str, name: str) -> Any:
    """The op ``{backend}_{name}``, ready to call."""
    return getattr(torch.ops.din_fast, f"{backend}_{name}").default


def call(backend: str, name: str, *arguments: Any) -> list[Tensor]:
    """Call an op; lengths that it finds out of range are a ValueError, as every other bad value."""
    try:
        result: list[Tensor] = op(backend, name)(*arguments)
    except RuntimeError as error:
        if str(error).startswith("lengths:"):
            raise ValueError(str(error).splitlines()[0]) from None
        raise
    return result


def panel_rows(history: Tensor, starts: Tensor | None, lengths: Tensor | None) -> int:
    """Rows that the panels of all users hold together."""
    if starts is None:
        return history.shape[0] * ((history.shape[1] + PANEL_ROWS - 1) // PANEL_ROWS * PANEL_ROWS)
    assert lengths is not None
    return int(((lengths + PANEL_ROWS - 1) // PANEL_ROWS * PANEL_ROWS).sum())


def _units(weights: Sequence[Tensor]) -> list[int]:
    return [int(b.shape[0]) for b in weights[3:-2:2]]


def _fake_moments(*arguments: Any) -> list[Tensor]:
    history, starts, lengths, _, _, _, weights, _, _, _, layer, keep, *_ = arguments
    units = _units(weights)[layer]
    count = history.new_empty((), dtype=torch.float64)
    size = panel_rows(history, starts, lengths) * units if keep else 0
    return [count, history.new_empty(units), history.new_empty(units), history.new_empty(size)]


def _fake_forward(*arguments: Any) -> list[Tensor]:
    history, query = arguments[_HISTORY], arguments[_QUERY]
    return [history.new_empty(query.shape), history.new_empty(history.shape[:-1]), history.new_empty(0)]


def _fake_infer(*arguments: Any) -> list[Tensor]:
    return _fake_forward(*arguments)[:2]


def _fake_backward_pass(
    common: Sequence[Any], from_layer: int, to: int, need_history: bool, need_query: bool, need_weights: bool
) -> list[Tensor]:
    _, _, history, starts, lengths, _, _, query, weights, _, _, _, _, sums, local, *_ = common
    units = _units(weights)
    layers = len(units)
    empty = history.new_empty
    out = [empty(0) for _ in range(2 + len(weights) + layers + 2)]
    rows = panel_rows(history, starts, lengths)
    first_sum = 2 + len(weights)
    if not local:
        out[-2] = empty(rows)
        if need_weights:
            out[first_sum - 2] = empty(units[-1])
            out[first_sum - 1] = empty(1)
    if 0 <= to < layers - 1:
        out[-1] = empty(rows * units[to])
    for i in range(from_layer, max(to, 0) - 1, -1):
        if sums[i].numel() == 0:
            out[first_sum + i] = empty((SUMS, units[i]))
        if i != to and need_weights:
            if i:
                out[2 + 2 * i + 2] = empty(weights[2 * i + 2].shape)
            out[2 + 2 * i + 3] = empty(units[i])
    if to < 0:
        if need_weights:
            for i in range(3):
                out[2 + i] = empty(weights[i].shape)
        if need_query:
            out[1] = empty(query.shape)
        if need_history:
            out[0] = empty(history.shape)
    return out


def _fake_backward_moments(*arguments: Any) -> list[Tensor]:
    from_layer, layer, need_weights = arguments[18:21]
    return _fake_backward_pass(arguments[:18], from_layer, layer, False, False, need_weights)


def _fake_backward(*arguments: Any) -> list[Tensor]:
    from_layer, need_history, need_query, need_weights = arguments[18:22]
    return _fake_backward_pass(arguments[:18], from_layer, -1, need_history, need_query, need_weights)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    segments, lists, ctx.rest = inputs[:6], inputs[6:10], inputs[10:]
    ctx.counts = [len(x) for x in lists]
    ctx.save_for_backward(*segments, *(t for x in lists for t in x), output[1])
    ctx.set_materialize_grads(False)


def _backward_of_forward(backend: str) -> Any:
    def backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        segments, tensors, scores = saved[:6], saved[6:-1], saved[-1]
        lists = []
        for count in ctx.counts:
            lists.append(tensors[:count])
            tensors = tensors[count:]
        weights, affine, response, kept = lists
        needs = ctx.needs_input_grad
        need_weights = any(needs[_WEIGHTS]) or any(needs[_AFFINE])
        nothing = (None,) * (10 + len(ctx.rest))
        if grads[0] is None and grads[1] is None:
            return nothing
        result = _all_passes(
            backend,
            (grads[0], grads[1], *segments, weights, affine, response, kept, scores),
            ctx.rest,
            needs,
            need_weights,
        )
        d_history, d_query, d_weights, sums = result
        d_affine: list[Tensor | None] = []
        for i in range(len(response)):
            rows = [None, *sums[i].unbind()]  # the center is a constant, the others have their sum
            given = affine[AFFINES * i : AFFINES * (i + 1)]
            d_affine += [row if t.numel() else None for row, t in zip(rows, given, strict=True)]
        out: list[Any] = list(nothing)
        out[_HISTORY] = d_history if needs[_HISTORY] else None
        out[_QUERY] = d_query if needs[_QUERY] else None
        out[_WEIGHTS] = d_weights if need_weights else [None] * len(weights)
        out[_AFFINE] = d_affine if need_weights else [None] * len(affine)
        out[_RESPONSE] = [None] * len(response)
        out[_KEPT] = [None] * len(kept)
        return tuple(out)

    return backward


def _all_passes(
    backend: str, arguments: tuple[Any, ...], rest: tuple[Any, ...], needs: Any, need_weights: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The passes of the backward: one for each layer with batch statistics, from the last, and one to the inputs."""
    weights, response = arguments[8], arguments[10]
    layers = len(response)
    reserved, numbers = rest[:3], rest[3:]
    sums = [arguments[2].new_empty(0)] * layers
    local: list[Tensor] = []
    d_weights: list[Tensor | None] = [None] * len(weights)
    first_sum, top = 2 + len(weights), layers - 1

    def take(out: list[Tensor]) -> None:
        for i, t in enumerate(out[2:first_sum]):
            if t.numel():
                d_weights[i] = t
        for i, t in enumerate(out[first_sum:-2]):
            if t.numel():
                sums[i] = t

    for layer in range(layers - 1, -1, -1):
        if response[layer].numel() == 0:
            continue
        out = op(backend, "backward_moments")(*arguments, sums, local, *reserved, top, layer, need_weights, *numbers)
        take(out)
        local = [out[-2] if not local else local[0], out[-1]]
        top = layer
    out = op(backend, "backward")(
        *arguments, sums, local, *reserved, top, bool(needs[_HISTORY]), bool(needs[_QUERY]), need_weights, *numbers
    )
    take(out)
    return out[0], out[1], d_weights, sums  # type: ignore[return-value]


def _no_setup(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_gradient(what: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"din_fast: {what}")

    return backward


def register(backend: str) -> None:
    """Fake kernels and autograd for the ops that a backend has defined."""
    names: dict[str, tuple[Callable[..., Any], str]] = {
        "moments": (_fake_moments, "the moments have no gradient of their own; forward's backward holds it"),
        "backward_moments": (_fake_backward_moments, "the gradient of a gradient is not implemented"),
        "backward": (_fake_backward, "the gradient of a gradient is not implemented"),
        "infer": (_fake_infer, "infer is for calls without gradient; use forward"),
    }
    torch.library.register_fake(f"din_fast::{backend}_forward", _fake_forward)
    torch.library.register_autograd(
        f"din_fast::{backend}_forward", _backward_of_forward(backend), setup_context=_setup_forward
    )
    for name, (fake, message) in names.items():
        torch.library.register_fake(f"din_fast::{backend}_{name}", fake)
        torch.library.register_autograd(f"din_fast::{backend}_{name}", _no_gradient(message), setup_context=_no_setup)


if native.why_not() is None:
    register("native")

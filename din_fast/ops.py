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
response   one a hidden layer, (2, 4, H) float64, or empty where the layer has no batch statistics
kept       one a hidden layer: z in panels, or empty where it is computed again
sums       one a hidden layer, (5, H) float64, or empty while unknown: dn (z - center), dn, dx (z - center), dx, d slope
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


def op(backend: str, name: str) -> Any:
    """The op ``{backend}_{name}``, ready to call."""
    return getattr(torch.ops.din_fast, f"{backend}_{name}").default


def call(backend: str, name: str, *arguments: Any) -> list[Tensor]:
    """Call an op; lengths that it finds out of range are a ValueError, as every other bad value."""
    try:
        result: list[Tensor] = op(backend, name)(*arguments)
    except RuntimeError as error:
        line = str(error).partition("\n")[0]  # torch puts the place in the C++ source in front of what is wrong
        start = line.find("lengths: ")
        if start < 0:
            raise
        raise ValueError(line[start:]) from None
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
    history, query = arguments[0], arguments[5]
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
            out[first_sum + i] = empty((SUMS, units[i]), dtype=torch.float64)
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


def _forward_with_autograd(backend: str) -> Callable[..., list[Tensor]]:
    """The Autograd kernel of ``forward``.

    ``torch.library.register_autograd`` would do, but flattening lists of tensors through pytree costs it more than a
    small batch takes: here the lists are flattened by hand.
    """
    forward = op(backend, "forward")

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, counts: list[int], rest: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
            lists = _split(tensors[6:], counts)
            with torch._C._AutoDispatchBelowAutograd():
                pooled, scores, kept = forward(*tensors[:6], *lists, *rest)
            ctx.counts, ctx.rest = counts, rest
            ctx.save_for_backward(*tensors, scores)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(kept)
            return pooled, scores, kept

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            *tensors, scores = ctx.saved_tensors
            out: list[Any] = [None] * (2 + len(tensors))
            if grads[0] is None and grads[1] is None:
                return tuple(out)
            weights, affine, response, kept = _split(tensors[6:], ctx.counts)
            needs = ctx.needs_input_grad[2:]
            first_weight = 6
            first_affine = first_weight + len(weights)
            need_weights = any(needs[first_weight : first_affine + len(affine)])
            need_history, need_query = needs[0], needs[5]
            arguments = (grads[0], grads[1], *tensors[:6], weights, affine, response, kept, scores)
            d_history, d_query, d_weights, sums = _all_passes(
                backend, arguments, ctx.rest, need_history, need_query, need_weights
            )
            out[2] = d_history if need_history else None
            out[7] = d_query if need_query else None
            if need_weights:
                out[2 + first_weight : 2 + first_affine] = d_weights
                for i in range(len(response)):
                    # The center is a constant, the others have their sum.
                    for j, row in enumerate(sums[i].to(tensors[0].dtype).unbind(), start=AFFINES * i + 1):
                        out[2 + first_affine + j] = row if affine[j].numel() else None
            return tuple(out)

    def kernel(*arguments: Any) -> list[Tensor]:
        segments, lists, rest = arguments[:6], arguments[6:10], arguments[10:]
        return list(Forward.apply([len(x) for x in lists], rest, *segments, *(t for x in lists for t in x)))

    return kernel


def _split(tensors: Sequence[Any], counts: list[int]) -> list[list[Any]]:
    lists, start = [], 0
    for count in counts:
        lists.append(list(tensors[start : start + count]))
        start += count
    return lists


def _all_passes(
    backend: str,
    arguments: tuple[Any, ...],
    rest: tuple[Any, ...],
    need_history: bool,
    need_query: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor]]:
    """The passes of the backward: one for each layer with batch statistics, from the last, and one to the inputs."""
    weights, response = arguments[8], arguments[10]
    layers = len(response)
    reserved, numbers = rest[:3], rest[3:]
    sums = [arguments[2].new_empty(0, dtype=torch.float64)] * layers
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
        *arguments, sums, local, *reserved, top, need_history, need_query, need_weights, *numbers
    )
    take(out)
    return out[0], out[1], d_weights, sums


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
    torch.library.impl(f"din_fast::{backend}_forward", "Autograd")(_forward_with_autograd(backend))
    for name, (fake, message) in names.items():
        torch.library.register_fake(f"din_fast::{backend}_{name}", fake)
        torch.library.register_autograd(f"din_fast::{backend}_{name}", _no_gradient(message), setup_context=_no_setup)


if native.why_not() is None:
    register("native")

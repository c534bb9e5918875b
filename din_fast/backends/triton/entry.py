"""The ops of the Triton backend, from arguments (din_fast/ops.py says what each is) to kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from din_fast.backends.triton import forward as kernels
from din_fast.backends.triton import statistics
from din_fast.backends.triton.backward import Pass
from din_fast.backends.triton.operands import Call, fold


def _not_built(absent: Sequence[Any], dropout: float) -> None:
    for name, value in zip(("values", "candidate_matrix", "window_offsets"), absent, strict=True):
        if value is not None:
            raise RuntimeError(f"{name}: not built yet; expected None")
    if dropout != 0.0:
        raise RuntimeError(f"dropout: not built yet; expected 0, got {dropout}")


def _kept(call: Call, kept: Sequence[Tensor]) -> dict[int, Tensor]:
    """z of the layers that were kept, by layer, as (rows, units)."""
    if call.rows == 0:
        return {i: call.empty(0, call.units[i]) for i in range(1, call.layers)}
    return {i: t.view(call.rows, call.units[i]) for i, t in enumerate(kept) if t.numel()}


def moments(*arguments: Any) -> list[Tensor]:
    """The op ``triton_moments``; arguments as in din_fast/ops.py."""
    segments, (weights, affine, kept, candidate_matrix, layer, keep) = arguments[:6], arguments[6:12]
    activation, dice_eps, _, dropout, _ = arguments[12:]
    _not_built((None, candidate_matrix, None), dropout)
    call = Call(segments, weights, affine, activation, dice_eps)
    count, mean, m2, z = statistics.moments(call, _kept(call, kept), layer, keep)
    return [count, mean, m2, call.empty(0) if z is None else z.view(-1)]


def forward(*arguments: Any) -> list[Tensor]:
    """The op ``triton_forward``: pooled, weights, and z of the further layers that were not kept before."""
    *segments, weights, affine, _, kept, values, candidate_matrix, window_offsets, activation, dice_eps, pads = (
        arguments[:16]
    )
    score, dropout = arguments[16:20], arguments[20]
    _not_built((values, candidate_matrix, window_offsets), dropout)
    call = Call(segments, weights, affine, activation, dice_eps)
    before = _kept(call, kept)
    pooled, scores, z = kernels.forward(call, before, True, pads, *score)
    new = [z[i].view(-1) for i in sorted(z) if i not in before]
    return [pooled, scores, torch.cat(new) if len(new) > 1 else new[0] if new else call.empty(0)]


def infer(*arguments: Any) -> list[Tensor]:
    """The op ``triton_infer``: the fold is torch operations, in float32."""
    segments, (parameters, blocks, eps, activation, dice_eps), score = arguments[:6], arguments[6:11], arguments[11:]
    weights, affine = fold(parameters, blocks, eps)
    call = Call(segments, weights, affine, activation if len(parameters) > 2 else 0, dice_eps)
    pooled, scores, _ = kernels.forward(call, {}, False, False, *score)
    return [pooled, scores]


def backward_moments(*arguments: Any) -> list[Tensor]:
    """The op ``triton_backward_moments``."""
    from_layer, layer, need_weights = arguments[18:21]
    return _backward_pass(arguments[:18], from_layer, layer, False, False, need_weights, arguments[21:])


def backward(*arguments: Any) -> list[Tensor]:
    """The op ``triton_backward``."""
    from_layer, need_history, need_query, need_weights = arguments[18:22]
    return _backward_pass(arguments[:18], from_layer, -1, need_history, need_query, need_weights, arguments[22:])


def _backward_pass(
    common: Sequence[Any],
    from_layer: int,
    to: int,
    need_history: bool,
    need_query: bool,
    need_weights: bool,
    rest: Sequence[Any],
) -> list[Tensor]:
    """One pass: d_history, d_query, gradients of `weights`, sums of each layer, d logit and local; the others empty.

    local: d z of the lowest layer but the first that this pass reached, where another pass is to go on from it.
    """
    (grad_pooled, grad_scores), segments = common[:2], common[2:8]
    weights, affine, response, kept, scores, sums, local = common[8:15]
    activation, dice_eps, pads, score_activation, softmax, _, pooling, dropout, _ = rest
    _not_built(common[15:18], dropout)
    call = Call(segments, weights, affine, activation, dice_eps)
    z = _kept(call, kept)
    if len(z) < call.layers - 1:
        raise ValueError(f"kept: expected z of all {call.layers - 1} layers after the first, got it of {len(z)}")
    run = Pass(call, z, scores, sums, response, pads, score_activation, softmax, pooling)
    if local:
        run.d_logit = local[0]
        reached = max(from_layer, 1)
        if reached < call.layers:
            run.local[reached] = local[1].view(call.rows, call.units[reached])
        layer = from_layer - 1
    else:
        run.score_gradient(grad_pooled, grad_scores)
        layer = call.layers - 1
    while layer >= max(to, 0) and not (layer == 0 and to < 0):
        run.layer(layer, layer == to or need_weights, need_weights, False)
        layer -= 1
    d_history = d_query = None
    if to < 0:
        if need_weights or need_query:
            d_query = run.inputs(layer == 0 and need_weights, need_weights, need_query)
        if need_history:
            d_history = run.history(grad_pooled)
    if need_weights and not local:
        run.d_weights[-1] = run.d_logit.sum(dtype=torch.float64).float().reshape(1)
    reached = min(run.local, default=0)
    new_local = to >= 0 and run.local and not (local and reached == max(from_layer, 1))
    # An op gives no input back, nor one tensor twice.
    return [
        *(call.empty(0) if t is None else t for t in (d_history, d_query, *run.d_weights)),
        *(call.empty(0) if t is sums[i] else t for i, t in enumerate(run.sums)),
        call.empty(0) if local else run.d_logit,
        run.local[reached].view(-1) if new_local else call.empty(0),
    ]

"""The ops of the Triton backend, from their arguments by name (din_fast/ops.py says what each is) to kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from din_fast.backends.triton import forward as kernels
from din_fast.backends.triton import statistics
from din_fast.backends.triton.backward import Pass
from din_fast.backends.triton.operands import Call
from din_fast.fold import fold_parameters
from din_fast.segments import Segments
from din_fast.spec import KERNEL_ACTIVATIONS, POOLINGS, SCORE_ACTIVATIONS

Arguments = Mapping[str, Any]


def _call(a: Arguments, weights: Sequence[Tensor], affine: Sequence[Tensor], activation: int) -> Call:
    for name in ("values", "candidate_matrix", "window_offsets"):
        if a.get(name) is not None:
            raise RuntimeError(f"{name}: not built yet; expected None")
    if "score_activation" in a:  # all ops but the moments
        score_activation = SCORE_ACTIVATIONS[a["score_activation"]]
        if a["softmax"] and score_activation != "none":
            raise ValueError(f"score_activation: expected none together with softmax, got {score_activation}")
        wanted = 2 if score_activation == "prelu" else 1
        if weights[-1].numel() != wanted:
            raise ValueError(f"weights: expected {wanted} elements in the last, got {weights[-1].numel()}")
    segments = Segments(a["history"], a["starts"], a["lengths"], a["candidate_offsets"], a["mask"])
    return Call(segments, a["query"], weights, affine, activation, a["dice_eps"], a.get("dropout", 0.0), a.get("seed"))


def _kept(call: Call, kept: Sequence[Tensor]) -> dict[int, Tensor]:
    """z of the layers that were kept, by layer, as (rows, units)."""
    if call.rows == 0:
        return {i: call.empty(0, call.units[i]) for i in range(1, call.layers)}
    return {i: t.view(call.rows, call.units[i]) for i, t in enumerate(kept) if t.numel()}


def moments(a: Arguments) -> list[Tensor]:
    """The op ``triton_moments``."""
    call = _call(a, a["weights"], a["affine"], a["activation"])
    count, mean, m2, z = statistics.moments(call, _kept(call, a["kept"]), a["layer"], a["keep"], a["pads_are_input"])
    return [count, mean, m2, call.empty(0) if z is None else z.view(-1)]


def forward(a: Arguments) -> list[Tensor]:
    """The op ``triton_forward``: pooled, weights, and z of the further layers that were not kept before."""
    call = _call(a, a["weights"], a["affine"], a["activation"])
    before = _kept(call, a["kept"])
    pooled, scores, z = kernels.forward(call, before, True, a["pads_are_input"], *_score(a))
    new = [z[i].view(-1) for i in sorted(z) if i not in before]
    return [pooled, scores, torch.cat(new) if len(new) > 1 else new[0] if new else call.empty(0)]


def infer(a: Arguments) -> list[Tensor]:
    """The op ``triton_infer``: the fold is torch operations, in float32."""
    no_hidden_layer = len(a["parameters"]) == 3
    activation = 0 if no_hidden_layer else a["activation"]
    gated = KERNEL_ACTIVATIONS[activation] == "dice_batch"
    weights, affine = fold_parameters(a["parameters"], a["blocks"], a["eps"], gated, a["score_factor"])
    call = _call(a, weights, affine, activation)
    pooled, scores, _ = kernels.forward(call, {}, False, False, *_score(a))
    return [pooled, scores]


def _score(a: Arguments) -> tuple[int, bool, int, int]:
    return a["score_activation"], a["softmax"], a["empty"], a["pooling"]


def backward_moments(a: Arguments) -> list[Tensor]:
    """The op ``triton_backward_moments``."""
    return _backward_pass(a, a["layer"], False, False)


def backward(a: Arguments) -> list[Tensor]:
    """The op ``triton_backward``."""
    return _backward_pass(a, -1, a["need_history"], a["need_query"])


def _backward_pass(a: Arguments, to: int, need_history: bool, need_query: bool) -> list[Tensor]:
    """One pass: d_history, d_query, gradients of `weights`, sums of each layer, d logit and local; the others empty.

    local: d z of the lowest layer but the first that this pass reached, where another pass is to go on from it.
    """
    call = _call(a, a["weights"], a["affine"], a["activation"])
    grad_pooled = None if POOLINGS[a["pooling"]] == "none" else a["grad_pooled"]
    z = _kept(call, a["kept"])
    if len(z) < call.layers - 1:
        raise ValueError(f"kept: expected z of all {call.layers - 1} layers after the first, got it of {len(z)}")
    score = a["score_activation"], a["softmax"], a["pooling"]
    run = Pass(call, z, a["scores"], a["sums"], a["response"], a["pads_are_input"], *score)
    need_weights, local = a["need_weights"], a["local"]
    known = max(a["from_layer"], 1)  # the layer that `local` is of
    if local:
        run.d_logit = local[0]
        if known < call.layers:
            run.local[known] = local[1].view(call.rows, call.units[known])
        layer = a["from_layer"] - 1
    else:
        run.score_gradient(grad_pooled, a["grad_scores"])
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
        run.d_weights[-1] = run.score_bias_gradient()
    reached = min(run.local, default=0)
    new_local = to >= 0 and run.local and not (local and reached == known)
    # An op gives no input back, nor one tensor twice.
    return [
        *(call.empty(0) if t is None else t for t in (d_history, d_query, *run.d_weights)),
        *(call.empty(0) if t is old else t for t, old in zip(run.sums, a["sums"], strict=True)),
        call.empty(0) if local else run.d_logit,
        run.local[reached].view(-1) if new_local else call.empty(0),
    ]

"""The one public function: check, choose a backend, run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from din_fast import dispatch, distributed, fold, ops, reference, segments
from din_fast.spec import (
    EMPTY_RULES,
    KERNEL_ACTIVATIONS,
    POOLINGS,
    SCORE_ACTIVATIONS,
    HiddenLayer,
    UnitParameters,
    UnitSpec,
    batch_mode,
    slope_of,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Result(NamedTuple):
    """pooled (B, D), the weights of the positions (B, L), and the backend that ran; (B, M, D) and (B, M, L) for
    queries (B, M, D)."""

    pooled: Tensor
    weights: Tensor
    backend: str

    def output(self, spec: UnitSpec) -> Tensor:
        """What the unit gives: the pooled vectors, or the weights where the spec has no pooling."""
        return self.weights if spec.pooling == "none" else self.pooled


def activation_unit(
    *,
    query: Tensor,
    history: Tensor,
    parameters: UnitParameters,
    spec: UnitSpec,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """DIN's activation unit: score every history item against the candidate, sum the history weighted by the scores.

    Keyword-only, since :class:`~din_fast.FusedActivationUnit` takes (history, target) in that order.

    Args:
        query: (B, D), the candidate item; or (B, M, D), M candidates for each history, which is then read once and
            never expanded; or (M, D) where the history is (1, L, D). float32, float64 (not on the triton backend),
            bfloat16 or float16; in half types all arithmetic is float32. Under autocast query and history are cast to
            its dtype, parameters and statistics are not.
        history: (B, L, D), same dtype and device; any strides, nothing is copied unless the last stride is not 1. One
            history expanded over B (stride 0) is taken as one user with B candidates, unless mask or lengths differ.
        parameters: the weights, norms and slopes of the MLP, of the history's dtype, or float32 for a history of a half
            type. BatchNorms in training mode get their running statistics updated, each with its own momentum.
        spec: what the unit computes.
        mask: (B, L) bool, True = valid; a masked position has weight 0 and is left out of the softmax.
        lengths: (B,) int64 or int32, the first ``lengths[b]`` positions are valid. With a mask as well, both must hold.
        backend: ``auto``, ``native``, ``triton`` or ``reference``. ``auto`` means ``DIN_FAST_BACKEND`` where that is
            set, read at each call.

    Returns:
        (B, D), or (B, M, D), the weighted sum (or mean, as ``spec.pooling`` says) of the history; with the pooling
        ``none`` the weights, (B, L) or (B, M, L). An empty history gives zeros, unless ``spec.empty`` says otherwise.

    Raises:
        ValueError: wrong rank or shape, lengths negative or beyond L, mixed devices, an unknown backend, one row in
            training with batch statistics, different dropout probabilities in the layers.
        TypeError: a dtype that the backend does not have, mixed dtypes, a mask that is not bool.
        RuntimeError: the backend that was named cannot run here, the gradient of a gradient was asked for, or the two
            norms of a layer are synchronised over different processes.

    Dropout draws a seed from torch's generator of the device; the same seed gives the same result on one backend.

    Source: Zhou et al. 2018, https://arxiv.org/abs/1706.06978, and the framework that ``spec`` describes.
    """
    return run(query, history, parameters, spec, mask, lengths, backend).output(spec)


def run(
    query: Tensor,
    history: Tensor,
    parameters: UnitParameters,
    spec: UnitSpec,
    mask: Tensor | None,
    lengths: Tensor | None,
    backend: str,
    query_name: str = "query",
    emb_dim: int | None = None,
) -> Result:
    """As :func:`activation_unit`, but positional; it tells the weights and which backend ran.

    ``query_name`` is what the caller calls the query, for error messages; ``emb_dim`` is the D that a module was built
    for.
    """
    segs, flat_query, shape = segments.prepare(query, history, mask, lengths, query_name, emb_dim)
    flat = segments.check_parameters(parameters, spec, segs.history)
    chosen = dispatch.choose(backend, segs.history, spec.hidden_units)
    batch_statistics = reference.uses_batch_statistics(parameters)
    synchronised = batch_statistics and distributed.synchronised(parameters.hidden)
    if batch_statistics and not synchronised:
        segments.check_batch_statistics(segs, flat_query, spec.batch_stats == "valid")
    dropout = segments.check_dropout(parameters)
    if chosen == "reference":
        pooled, weights = _reference(flat_query, segs, parameters, spec)
    else:
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (flat_query, segs.history, *flat)
        )
        if batch_statistics or needs_grad or dropout:
            if chosen == "native" and not synchronised and not is_compiling():
                pooled, weights = _train(flat_query, segs, parameters, flat, spec, batch_statistics, dropout)
            else:
                pooled, weights = _with_gradient(chosen, flat_query, segs, parameters, spec, batch_statistics, dropout)
        else:
            pooled, weights = _infer(chosen, flat_query, segs, parameters, flat, spec)
        if parameters.score_slope is not None:
            # The ops give the scores before their PReLU, whose gradient needs them.
            weights = reference.weights_of(weights, None, spec, fold.wide(parameters.score_slope))
        weights = weights.to(segs.history.dtype)
    if shape is not None:
        pooled, weights = pooled.view(*shape, pooled.shape[-1]), weights.view(*shape, weights.shape[-1])
    return Result(pooled, weights, chosen)


def _reference(
    query: Tensor, segs: segments.Segments, parameters: UnitParameters, spec: UnitSpec
) -> tuple[Tensor, Tensor]:
    """The plain form, which writes every tensor: a history of several candidates is expanded, too."""
    history = segs.history
    segments.check_length_values(segs.lengths, history.shape[1])
    valid = segments.valid_positions(segs)
    dtype = history.dtype
    if segs.candidate_offsets is not None:
        user = segments.user_of_candidates(segs, query)
        history, valid = history[user], None if valid is None else valid[user]
    if parameters.weight.dtype != dtype:  # float32 parameters, and a history of a half type
        query, history = fold.wide(query), fold.wide(history)
    pooled, weights = reference.activation_unit(query, history, parameters, spec, valid)
    return pooled.to(dtype), weights.to(dtype)


# z of the layers with batch statistics is kept for the backward up to this; beyond, it is computed again in each pass.
KEEP_LIMIT_BYTES = 1 << 30


def _infer(
    backend: str,
    query: Tensor,
    segs: segments.Segments,
    parameters: UnitParameters,
    flat: list[Tensor | None],
    spec: UnitSpec,
) -> tuple[Tensor, Tensor]:
    """Evaluation without gradient: one op, which folds the raw parameters itself."""
    norms = [norm for layer in parameters.hidden for norm in (layer.norm, layer.gate_norm)]
    table, *numbers = infer_constants(spec, query.shape[-1])
    pooled, weights = ops.call(
        backend,
        "infer",
        *segs_arguments(segs, query),
        flat,
        table,
        [0.0 if norm is None else norm.eps for norm in norms],
        *numbers,
    )
    return pooled, weights


def infer_constants(spec: UnitSpec, dim: int) -> tuple[Any, ...]:
    """What ``infer`` takes of a spec: the blocks, and, behind the eps of the norms, its numbers."""
    numbers = (spec.kernel_activation, spec.dice_eps, *_score(spec), spec.score_factor(dim))
    return fold.block_table(spec.blocks), *numbers


def _train(
    query: Tensor,
    segs: segments.Segments,
    parameters: UnitParameters,
    flat: list[Tensor | None],
    spec: UnitSpec,
    batch_statistics: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """As :func:`_with_gradient` on the native backend, in an op and another for the backward, which fold by themselves.

    What torch takes for the small operations around the ops of the other way is more than the work on a small batch.
    """
    norms = [norm for layer in parameters.hidden for norm in (layer.norm, layer.gate_norm)]
    eps = [0.0 if norm is None else norm.eps for norm in norms]
    modes = [0 if norm is None else 2 if batch_mode(norm) else 1 for norm in norms]
    table, activation, dice_eps, *score, score_factor = infer_constants(spec, query.shape[-1])
    pads_are_input = batch_statistics and spec.batch_stats == "all"
    seed = reference.draw_seed(query.device) if dropout else None
    constants = (table, eps, modes, activation, dice_eps, pads_are_input, *score, dropout, seed, score_factor)
    flat = list(flat)
    for i, mode in enumerate(modes):
        if mode == 2:  # the running statistics are not read, and change before the backward
            at = fold.FIELDS * (i // 2) + (8 if i % 2 else 4)
            flat[at : at + 2] = None, None
    pooled, scores, numbers, statistics = ops.train(constants, KEEP_LIMIT_BYTES, *segs_arguments(segs, query), *flat)
    if batch_statistics and query.shape[0] * segs.history.shape[1] > 0:
        fold.update_all(parameters.hidden, numbers, statistics, not pads_are_input)
    return pooled, scores


def _with_gradient(
    backend: str,
    query: Tensor,
    segs: segments.Segments,
    parameters: UnitParameters,
    spec: UnitSpec,
    batch_statistics: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Fold, take the moments of each layer that needs them, run forward, and only then update running statistics."""
    hidden, weights = _folded(parameters, spec, query.shape[-1])
    arguments = segs_arguments(segs, query)
    identity = (KERNEL_ACTIVATIONS.index("identity"), 0.0)
    activation = (spec.kernel_activation, spec.dice_eps) if parameters.hidden else identity
    silu = spec.activation == "silu" and bool(parameters.hidden)
    pads_are_input = batch_statistics and spec.batch_stats == "all"
    may_be_empty = batch_statistics and not pads_are_input
    random = (dropout, reference.draw_seed(query.device) if dropout else None)
    rows = query.shape[0] * segs.history.shape[1]
    absent = weights[0].new_empty(0)
    row_bytes = ops.kept_rows(backend, segs.history, None, None, query) * absent.element_size()
    affines: list[fold.Affine] = []
    kept: list[Tensor] = []
    updates: list[tuple[HiddenLayer, fold.Affine, Tensor, Tensor]] = []
    groups: list[ProcessGroup | None] = []
    kept_bytes = 0
    for i, layer in enumerate(hidden):
        mean = variance = count = None
        panel = absent
        group = None
        if batch_mode(layer.norm) or batch_mode(layer.gate_norm):
            layer_bytes = row_bytes * layer.weight.shape[0]
            # Triton's forward would keep it else: its backward reads z of every layer but the first.
            keep = backend == "triton" or kept_bytes + layer_bytes <= KEEP_LIMIT_BYTES
            kept_bytes += layer_bytes if keep else 0
            group = distributed.group_of(layer, i)
            with torch.no_grad():
                count, mean, m2, panel = ops.call(
                    backend, "moments", *arguments, weights, _flat(affines, len(hidden), absent), kept, None, i, keep,
                    *activation, pads_are_input, *random,
                )  # fmt: skip
                if group is not None:
                    count, mean, m2 = distributed.merge_moments(count, mean, m2, group)
                variance = m2 / (count.clamp(min=1) if rows == 0 or may_be_empty else count)
        affine = fold.affine(layer, mean, variance, count, silu)
        affines.append(affine)
        kept.append(panel)
        groups.append(group)
        if mean is not None and variance is not None and count is not None and (rows > 0 or group is not None):
            updates.append((layer, affine, variance, count))
    response = [absent if a.response is None else a.response for a in affines]
    pooled, scores, _ = ops.forward(
        backend, groups, *arguments, weights, _flat(affines, len(hidden), absent), response, kept,
        None, None, None, *activation, pads_are_input, *_score(spec), *random,
    )  # fmt: skip
    for layer, affine, variance, count in updates:
        fold.update_layer(layer, affine, variance, count, may_be_empty)
    return pooled, scores


def _folded(parameters: UnitParameters, spec: UnitSpec, dim: int) -> tuple[tuple[HiddenLayer, ...], list[Tensor]]:
    """The layers, and the folded weights as the ops take them. No hidden layer is one of one unit, as it stands."""
    hidden, weight, bias, score_slope = parameters
    weights = fold.fold_layers(
        [(x.weight, x.bias) for x in hidden],
        weight,
        bias,
        score_slope,
        spec.score_factor(dim),
        fold.block_table(spec.blocks),
    )
    hidden = tuple(x._replace(slope=slope_of(x, spec)) for x in hidden)
    return hidden or (HiddenLayer(weight, bias),), weights


def segs_arguments(segs: segments.Segments, query: Tensor) -> tuple[Tensor | None, ...]:
    """The first six arguments of every op."""
    return segs.history, segs.starts, segs.lengths, segs.candidate_offsets, segs.mask, query


def _score(spec: UnitSpec) -> tuple[int, bool, int, int]:
    return (
        SCORE_ACTIVATIONS.index(spec.score_activation),
        spec.softmax,
        EMPTY_RULES.index(spec.empty),
        POOLINGS.index(spec.pooling),
    )


def _flat(affines: list[fold.Affine], layers: int, absent: Tensor) -> list[Tensor]:
    flat = [absent if t is None else t for affine in affines for t in affine[: fold.AFFINES]]
    return flat + [absent] * (fold.AFFINES * layers - len(flat))

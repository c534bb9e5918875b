"""The one public function: check, choose a backend, run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from din_fast import dispatch, fold, ops, reference, segments
from din_fast.spec import (
    ACTIVATIONS,
    EMPTY_RULES,
    POOLINGS,
    SCORE_ACTIVATIONS,
    HiddenLayer,
    UnitParameters,
    UnitSpec,
    batch_mode,
)


class Result(NamedTuple):
    """pooled (B, D), the weights of the positions (B, L), and the backend that ran."""

    pooled: Tensor
    weights: Tensor
    backend: str


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
        query: (B, D), the candidate item; float32, float64 (not on the triton backend), bfloat16 or float16 (not on
            the native one).
        history: (B, L, D), same dtype and device; any strides, nothing is copied unless the last stride is not 1.
        parameters: the weights, norms and slopes of the MLP. BatchNorms in training mode get their running statistics
            updated, each with its own momentum.
        spec: what the unit computes.
        mask: (B, L) bool, True = valid; a masked position has weight 0 and is left out of the softmax.
        lengths: (B,) int64 or int32, the first ``lengths[b]`` positions are valid. With a mask as well, both must hold.
        backend: ``auto``, ``native``, ``triton`` or ``reference``. ``auto`` means ``DIN_FAST_BACKEND`` where that is
            set, read at each call.

    Returns:
        (B, D), the weighted sum (or mean, as ``spec.pooling`` says) of the history. An empty history gives zeros,
        unless ``spec.empty`` says otherwise.

    Raises:
        ValueError: wrong rank or shape, lengths negative or beyond L, mixed devices, an unknown backend, one row in
            training with batch statistics.
        TypeError: a dtype that the backend does not have, mixed dtypes, a mask that is not bool.
        RuntimeError: the backend that was named cannot run here, the gradient of a gradient was asked for, or a
            SyncBatchNorm is in training in more than one process, which the kernels do not serve yet.

    Source: Zhou et al. 2018, https://arxiv.org/abs/1706.06978, and the framework that ``spec`` describes.
    """
    return run(query, history, parameters, spec, mask, lengths, backend).pooled


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
    segs = segments.prepare(query, history, mask, lengths, query_name, emb_dim)
    flat = segments.check_parameters(parameters, spec, history)
    chosen = dispatch.choose(backend, history, spec.hidden_units)
    batch_statistics = reference.uses_batch_statistics(parameters)
    if batch_statistics:
        segments.check_batch_statistics(history)
    if chosen == "reference":
        segments.check_length_values(segs.lengths, history.shape[1])
        valid = segments.valid_positions(segs)
        return Result(*reference.activation_unit(query, history, parameters, spec, valid), chosen)
    segments.check_one_process(parameters)
    query = segments.unit_stride(query)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, history, *flat))
    if batch_statistics or needs_grad:
        pooled, weights = _with_gradient(chosen, query, segs, parameters, spec, batch_statistics)
    else:
        pooled, weights = _infer(chosen, query, segs, parameters.hidden, flat, spec)
    return Result(pooled, weights.to(history.dtype), chosen)


# z of the layers with batch statistics is kept for the backward up to this; beyond, it is computed again in each pass.
KEEP_LIMIT_BYTES = 1 << 30


def _infer(
    backend: str,
    query: Tensor,
    segs: segments.Segments,
    hidden: tuple[HiddenLayer, ...],
    flat: list[Tensor | None],
    spec: UnitSpec,
) -> tuple[Tensor, Tensor]:
    """Evaluation without gradient: one op, which folds the raw parameters itself."""
    eps = [0.0 if norm is None else norm.eps for layer in hidden for norm in (layer.norm, layer.gate_norm)]
    pooled, weights = ops.call(
        backend, "infer", *segs_arguments(segs, query), flat, fold.block_table(spec.blocks), eps,
        *_activation(spec), *_score(spec),
    )  # fmt: skip
    return pooled, weights


def _with_gradient(
    backend: str,
    query: Tensor,
    segs: segments.Segments,
    parameters: UnitParameters,
    spec: UnitSpec,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Fold, take the moments of each layer that needs them, run forward, and only then update running statistics."""
    hidden, weights = _folded(parameters, spec)
    arguments = segs_arguments(segs, query)
    activation = _activation(spec) if parameters.hidden else (ACTIVATIONS.index("identity"), 0.0)
    rows = segs.history.shape[0] * segs.history.shape[1]
    absent = weights[0].new_empty(0)
    row_bytes = ops.kept_rows(backend, segs.history, None, None, query) * absent.element_size()
    affines: list[fold.Affine] = []
    kept: list[Tensor] = []
    updates: list[tuple[HiddenLayer, fold.Affine, Tensor, Tensor]] = []
    kept_bytes = 0
    for i, layer in enumerate(hidden):
        mean = variance = count = None
        panel = absent
        if batch_mode(layer.norm) or batch_mode(layer.gate_norm):
            layer_bytes = row_bytes * layer.weight.shape[0]
            # Triton's forward would keep it else: its backward reads z of every layer but the first.
            keep = backend == "triton" or kept_bytes + layer_bytes <= KEEP_LIMIT_BYTES
            kept_bytes += layer_bytes if keep else 0
            with torch.no_grad():
                count, mean, m2, panel = ops.call(
                    backend, "moments", *arguments, weights, _flat(affines, len(hidden), absent), kept, None, i, keep,
                    *activation, True, 0.0, 0,
                )  # fmt: skip
                if rows == 0:
                    count = count.clamp(min=1)
                variance = m2 / count
        affine = fold.affine(layer, mean, variance, count)
        affines.append(affine)
        kept.append(panel)
        if mean is not None and variance is not None and count is not None and rows > 0:
            updates.append((layer, affine, variance, count))
    response = [absent if a.response is None else a.response for a in affines]
    pooled, scores, _ = ops.call(
        backend, "forward", *arguments, weights, _flat(affines, len(hidden), absent), response, kept,
        None, None, None, *activation, batch_statistics, *_score(spec), 0.0, 0,
    )  # fmt: skip
    for layer, affine, variance, count in updates:
        fold.update_layer(layer, affine, variance, count)
    return pooled, scores


def _folded(parameters: UnitParameters, spec: UnitSpec) -> tuple[tuple[HiddenLayer, ...], list[Tensor]]:
    """The layers, and the folded weights as the ops take them. No hidden layer is one of one unit, as it stands."""
    hidden, weight, bias = parameters
    weights = fold.fold_layers([(x.weight, x.bias) for x in hidden], weight, bias, fold.block_table(spec.blocks))
    return hidden or (HiddenLayer(weight, bias),), weights


def segs_arguments(segs: segments.Segments, query: Tensor) -> tuple[Tensor | None, ...]:
    """The first six arguments of every op."""
    return segs.history, segs.starts, segs.lengths, segs.candidate_offsets, segs.mask, query


def _activation(spec: UnitSpec) -> tuple[int, float]:
    return ACTIVATIONS.index(spec.activation), spec.dice_eps


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

"""The one public function: check, choose a backend, run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from din_fast import dispatch, fold, ops, reference, segments
from din_fast.spec import HiddenLayer, UnitParameters, UnitSpec


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
        query: (B, D), the candidate item; float32 or float64.
        history: (B, L, D), same dtype and device; any strides, nothing is copied unless the last stride is not 1.
        parameters: the weights, norms and slopes of the MLP. BatchNorms in training mode get their running statistics
            updated, each with its own momentum.
        spec: what the unit computes.
        mask: (B, L) bool, True = valid; a masked position has weight 0 and is left out of the softmax.
        lengths: (B,) int64 or int32, the first ``lengths[b]`` positions are valid. With a mask as well, both must hold.
        backend: ``auto``, ``native``, ``triton`` or ``reference``. ``auto`` means ``DIN_FAST_BACKEND`` where that is set,
            read at each call.

    Returns:
        (B, D), the weighted sum (or mean, as ``spec.pooling`` says) of the history. An empty history gives zeros,
        unless ``spec.empty`` says otherwise.

    Raises:
        ValueError: wrong rank or shape, lengths negative or beyond L, mixed devices, an unknown backend, one row in
            training with batch statistics.
        TypeError: a dtype other than float32 or float64, mixed dtypes, a mask that is not bool.
        RuntimeError: the backend that was named cannot run, or the gradient of a gradient was asked for.

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
) -> Result:
    """As :func:`activation_unit`, but positional, and it tells the weights and which backend ran."""
    segs = segments.prepare(query, history, mask, lengths)
    segments.check_parameters(parameters, spec, history)
    chosen = dispatch.choose(backend, history)
    batch_statistics = reference.uses_batch_statistics(parameters)
    if batch_statistics:
        segments.check_batch_statistics(history)
    if chosen == "reference":
        segments.check_length_values(segs.lengths, history.shape[1])
        valid = segments.valid_positions(segs)
        return Result(*reference.activation_unit(query, history, parameters, spec, valid), chosen)
    raise RuntimeError("no other backend yet")

"""Every layout of histories as segments of rows, and every check of shapes, dtypes and devices.

The kernels know one layout: the history is rows of D numbers with one row stride; a user's segment is a start (in
elements) and a length. A dense (B, L, D) tensor, sliced or not, is such a layout as it stands: nothing is copied unless
its last stride is not 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from din_fast.spec import UnitParameters, UnitSpec

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class Segments(NamedTuple):
    """Histories as the kernels take them.

    Attributes:
        history: (users, L, D), any strides but a last stride of 1; or, ragged, (N, D).
        starts: (users,) int64, where a user's rows begin, in elements; None for a dense history.
        lengths: (users,) int64, valid rows of each user; None when all L count.
        candidate_offsets: (users + 1,) int64, the candidates of each user; None for one candidate a user.
        mask: (users, L) bool, True where a position counts; None when all do.
    """

    history: Tensor
    starts: Tensor | None
    lengths: Tensor | None
    candidate_offsets: Tensor | None
    mask: Tensor | None


def unit_stride(t: Tensor) -> Tensor:
    """The tensor itself where its rows are contiguous, else a copy: the only copy that is ever made of an input."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def prepare(
    query: Tensor,
    history: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    query_name: str = "query",
    emb_dim: int | None = None,
) -> Segments:
    """Check the four inputs of a dense call, (B, D), (B, L, D), (B, L) and (B,), and describe them as segments.

    ``query_name`` is what the caller calls the query; ``emb_dim``, where it is given, is the only D allowed.
    """
    _tensor("history", history)
    _tensor(query_name, query)
    if history.dim() != 3:
        raise ValueError(f"history: expected 3 dimensions (batch, length, dim), got shape {tuple(history.shape)}")
    batch, length, dim = history.shape
    if emb_dim is not None and dim != emb_dim:
        raise ValueError(f"history: expected dim {emb_dim} (emb_dim), got {dim}")
    if query.dim() != 2:
        raise ValueError(f"{query_name}: expected 2 dimensions (batch, dim), got shape {tuple(query.shape)}")
    if tuple(query.shape) != (batch, dim):
        raise ValueError(
            f"{query_name}: expected shape {(batch, dim)} to go with the history, got {tuple(query.shape)}"
        )
    if dim < 1:
        raise ValueError(f"history: expected dim of at least 1, got shape {tuple(history.shape)}")
    if history.dtype not in FLOATS:
        raise TypeError(f"history: expected float32, float64, bfloat16 or float16, got {history.dtype}")
    if query.dtype != history.dtype:
        raise TypeError(f"{query_name}: expected {history.dtype} as the history has, got {query.dtype}")
    _same_device(query_name, query, history)
    if mask is not None:
        _tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool (True = valid), got {mask.dtype}")
        if tuple(mask.shape) != (batch, length):
            raise ValueError(f"mask: expected shape {(batch, length)}, got {tuple(mask.shape)}")
        _same_device("mask", mask, history)
        mask = mask if mask.is_contiguous() else mask.contiguous()
    if lengths is not None:
        _tensor("lengths", lengths)
        if lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"lengths: expected int64 or int32, got {lengths.dtype}")
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths: expected shape {(batch,)}, got {tuple(lengths.shape)}")
        _same_device("lengths", lengths, history)
        lengths = lengths.to(torch.int64).contiguous()
    return Segments(unit_stride(history), None, lengths, None, mask)


def check_length_values(lengths: Tensor | None, limit: int) -> None:
    """Raise where a length is negative or beyond L. The native op does this itself, without a pass in Python."""
    if lengths is not None and lengths.numel() and bool(((lengths < 0) | (lengths > limit)).any()):
        low, high = int(lengths.min()), int(lengths.max())
        raise ValueError(f"lengths: expected values from 0 to {limit}, got {low} to {high}")


def check_segments(segments: Segments, query: Tensor, values: bool) -> None:
    """What :func:`prepare` has checked for the public functions, for callers of the ops; ``values``: read them, too.

    Raises:
        ValueError: a shape, stride or dtype that no kernel takes, or a length, start or offset out of range.
    """
    history, starts, lengths, offsets, mask = segments
    rank = 3 if starts is None else 2
    if history.dim() != rank or query.dim() != 2:
        raise ValueError(f"history, query: expected {rank} and 2 dimensions, got {history.dim()} and {query.dim()}")
    dim, users = history.shape[-1], history.shape[0] if starts is None else starts.shape[0]
    if unit_stride(history) is not history or unit_stride(query) is not query:
        raise ValueError(f"history, query: expected a last stride of 1, got {history.stride()} and {query.stride()}")
    if query.shape[1] != dim or query.dtype != history.dtype:
        raise ValueError(f"query: expected dim {dim} and {history.dtype}, got {query.shape[1]} and {query.dtype}")
    if offsets is None and query.shape[0] != users:
        raise ValueError(f"query: expected {users} rows, got {query.shape[0]}")
    sizes = {"starts": (starts, users), "lengths": (lengths, users), "candidate_offsets": (offsets, users + 1)}
    for name, (t, size) in sizes.items():
        if t is not None and (t.dtype != torch.int64 or t.shape != (size,) or not t.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous int64 of shape {(size,)}, got {t.dtype} {tuple(t.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != history.shape[:2] or not mask.is_contiguous()):
        shape = tuple(history.shape[:2])
        raise ValueError(f"mask: expected contiguous bool of shape {shape}, got {mask.dtype} {tuple(mask.shape)}")
    if starts is not None and (lengths is None or mask is not None or offsets is not None):
        raise ValueError("starts: expected lengths, no mask and one candidate a user with ragged histories")
    if starts is not None and not history.is_contiguous():
        raise ValueError(f"history: expected contiguous rows for ragged histories, got strides {history.stride()}")
    if values:
        _check_values(segments, query.shape[0])


def _check_values(segments: Segments, candidates: int) -> None:
    history, starts, lengths, offsets, _ = segments
    if starts is None:
        check_length_values(lengths, history.shape[1])
    elif lengths is not None:
        rows, dim = history.shape
        wrong = (lengths < 0) | (starts < 0) | (starts % dim != 0) | (starts // dim + lengths > rows)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"starts, lengths: expected segments within {rows} rows, got start {int(starts[at])} and "
                f"length {int(lengths[at])} at {at}"
            )
    if offsets is not None:
        in_order = not bool((offsets.diff() < 0).any())
        if not in_order or int(offsets[0]) != 0 or int(offsets[-1]) != candidates:
            raise ValueError(f"candidate_offsets: expected 0 to {candidates} in order, got {offsets.tolist()}")


def valid_positions(segments: Segments) -> Tensor | None:
    """(B, L) bool, True where a position counts, or None when all do."""
    if segments.lengths is None:
        return segments.mask
    rows = torch.arange(segments.history.shape[1], device=segments.history.device)
    within = rows < segments.lengths.unsqueeze(1)
    return within if segments.mask is None else within & segments.mask


def check_parameters(parameters: UnitParameters, spec: UnitSpec, history: Tensor) -> list[Tensor | None]:
    """Check that the parameters are those of the spec, of the history's dtype and on its device.

    Returns them flat, as ``infer`` takes them, since reading a module's tensor costs more than its check: a hidden
    layer's weight and bias, weight, bias, running mean and variance of its norm and of its gate's norm, and slope;
    in the end the last Linear's weight and bias.
    """
    if len(parameters.hidden) != len(spec.hidden_units):
        raise ValueError(
            f"parameters: expected {len(spec.hidden_units)} hidden layers as the spec has, got {len(parameters.hidden)}"
        )
    flat: list[Tensor | None] = []
    inputs = len(spec.blocks) * history.shape[-1]
    for i, (layer, units) in enumerate(zip(parameters.hidden, spec.hidden_units, strict=True)):
        name = f"parameters.hidden[{i}]"
        _parameter(name, "weight", layer.weight, (units, inputs), history)
        _parameter(name, "bias", layer.bias, (units,), history)
        _slope(name, layer.slope, units, spec, history)
        norm = _norm(f"{name}.norm", layer.norm, units, spec.batch_norm, history)
        gate = _norm(f"{name}.gate_norm", layer.gate_norm, units, spec.activation == "dice_batch", history)
        flat += [layer.weight, layer.bias, *norm, *gate, layer.slope]
        inputs = units
    _parameter("parameters", "weight", parameters.weight, (1, inputs), history)
    _parameter("parameters", "bias", parameters.bias, (1,), history)
    return [*flat, parameters.weight, parameters.bias]


def check_batch_statistics(history: Tensor) -> None:
    """A variance needs two rows: raise for one, before anything changes."""
    rows = history.shape[0] * history.shape[1]
    if rows == 1:
        raise ValueError(
            f"history: expected more than 1 row for batch statistics in training, got {tuple(history.shape)}"
        )


def check_one_process(parameters: UnitParameters) -> None:
    """The kernels do not share their statistics between processes yet: raise rather than train on a part of them."""
    for i, layer in enumerate(parameters.hidden):
        for norm in (layer.norm, layer.gate_norm):
            synced = isinstance(norm, nn.SyncBatchNorm) and norm.training
            if synced and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise RuntimeError(
                    f"parameters.hidden[{i}]: expected BatchNorm1d, got SyncBatchNorm in training with "
                    f"{torch.distributed.get_world_size()} processes, which is not built yet; use backend='reference'"
                )


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def _same_device(name: str, t: Tensor, history: Tensor) -> None:
    if t.device != history.device:
        raise ValueError(f"{name}: expected device {history.device} as the history has, got {t.device}")


def _slope(owner: str, slope: Tensor | None, units: int, spec: UnitSpec, history: Tensor) -> None:
    if (slope is None) == spec.has_slope:
        raise ValueError(
            f"{owner}.slope: expected {'a tensor' if spec.has_slope else 'None'} for the activation {spec.activation}, "
            f"got {slope if slope is None else 'a tensor'}"
        )
    if slope is not None:
        if slope.numel() not in (1, units):
            raise ValueError(f"{owner}.slope: expected 1 or {units} elements, got shape {tuple(slope.shape)}")
        _parameter(owner, "slope", slope, slope.shape, history)


def _norm(
    owner: str, norm: nn.modules.batchnorm._BatchNorm | None, units: int, wanted: bool, history: Tensor
) -> tuple[Tensor | None, ...]:
    if (norm is not None) != wanted:
        raise ValueError(
            f"{owner}: expected {'a BatchNorm' if wanted else 'None'} as the spec says, got {type(norm).__name__}"
        )
    if norm is None:
        return (None,) * len(NORM_TENSORS)
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    for field, t in zip(NORM_TENSORS, tensors, strict=True):
        _parameter(owner, field, t, (units,), history)
    return tensors


def _parameter(owner: str, field: str, t: Tensor | None, shape: tuple[int, ...], history: Tensor) -> None:
    if t is None:
        return
    if t.shape != shape:
        raise ValueError(f"{owner}.{field}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype != history.dtype:
        raise TypeError(f"{owner}.{field}: expected {history.dtype} as the history has, got {t.dtype}")
    if t.device != history.device:
        raise ValueError(f"{owner}.{field}: expected device {history.device} as the history has, got {t.device}")

"""Every layout of histories as segments of rows, and every check of shapes, dtypes and devices.

The kernels know one layout: the history is rows of D numbers with one row stride; a user's segment is a start (in
elements) and a length. A dense (B, L, D) tensor, sliced or not, is such a layout as it stands: nothing is copied unless
its last stride is not 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from din_fast.spec import UnitParameters, UnitSpec, slope_of

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_TYPES = (torch.bfloat16, torch.float16)
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
) -> tuple[Segments, Tensor, tuple[int, int] | None]:
    """Check the four inputs of a dense call and describe them as segments.

    Args:
        query: (B, D), (B, M, D), or (M, D) where the history is (1, L, D).
        history: (B, L, D).
        mask: (B, L) or None.
        lengths: (B,) or None.
        query_name: what the caller calls the query, for error messages.
        emb_dim: where it is given, the only D allowed.

    Returns:
        The segments, the queries as (candidates, D) with unit stride, and (B, M) where there are two such dimensions.
        Under autocast query and history are cast to its dtype.
    """
    _tensor("history", history)
    _tensor(query_name, query)
    if history.dim() != 3:
        raise ValueError(f"history: expected 3 dimensions (batch, length, dim), got shape {tuple(history.shape)}")
    batch, length, dim = history.shape
    if emb_dim is not None and dim != emb_dim:
        raise ValueError(f"history: expected dim {emb_dim} (emb_dim), got {dim}")
    if query.dim() not in (2, 3):
        raise ValueError(
            f"{query_name}: expected 2 dimensions (batch, dim) or 3 (batch, candidates, dim), "
            f"got shape {tuple(query.shape)}"
        )
    # One history serves any number of candidates.
    rows = query.shape[0] if query.dim() == 2 and batch == 1 else batch
    if query.shape[0] != rows or query.shape[-1] != dim:
        expected = (rows, *query.shape[1:-1], dim)
        raise ValueError(f"{query_name}: expected shape {expected} to go with the history, got {tuple(query.shape)}")
    if dim < 1:
        raise ValueError(f"history: expected dim of at least 1, got shape {tuple(history.shape)}")
    history, query = _autocast(history, query)
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
    if lengths is not None:
        _tensor("lengths", lengths)
        if lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"lengths: expected int64 or int32, got {lengths.dtype}")
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths: expected shape {(batch,)}, got {tuple(lengths.shape)}")
        _same_device("lengths", lengths, history)
    shape = None
    if query.dim() == 3:
        shape = (batch, query.shape[1])
        query = query.reshape(-1, dim)
    elif batch > 1 and all(t is None or t.stride(0) == 0 for t in (history, mask, lengths)):
        history = _Shared.apply(history)
        mask, lengths = None if mask is None else mask[:1], None if lengths is None else lengths[:1]
    users = history.shape[0]
    offsets = None
    if query.shape[0] != users:
        each = query.shape[0] if shape is None else shape[1]
        offsets = torch.arange(users + 1, device=history.device) * each
    if mask is not None:
        mask = mask if mask.is_contiguous() else mask.contiguous()
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    return Segments(unit_stride(history), None, lengths, offsets, mask), unit_stride(query), shape


def _autocast(history: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast does to the inputs of an operation that it runs in its own dtype."""
    device = history.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return history, query
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(history), cast(query)


class _Shared(torch.autograd.Function):
    """(B, L, D) with stride 0 over B -> (1, L, D).

    Slicing would do, but its backward would write (B, L, D). This one gives a gradient of stride 0, whose sum over B,
    which the backward of expand takes, is that of the one history.
    """

    @staticmethod
    def forward(ctx: Any, history: Tensor) -> Tensor:
        ctx.batch = history.shape[0]
        return history[:1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad / ctx.batch).expand(ctx.batch, -1, -1)


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


def user_of_candidates(segments: Segments, query: Tensor) -> Tensor:
    """(candidates,) int64, the user that each candidate belongs to."""
    assert segments.candidate_offsets is not None
    candidates = torch.arange(query.shape[0], device=query.device)
    return torch.searchsorted(segments.candidate_offsets[1:], candidates, right=True)


def check_parameters(parameters: UnitParameters, spec: UnitSpec, history: Tensor) -> list[Tensor | None]:
    """Check that the parameters are those of the spec, of the history's dtype (or wider) and on its device.

    Returns them flat, as ``infer`` takes them, since reading a module's tensor costs more than its check: a hidden
    layer's weight and bias, weight, bias, running mean and variance of its norm and of its gate's norm, and slope;
    in the end the last Linear's weight and bias and the score's slope. Those of half types are given in float32.
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
        flat += [layer.weight, layer.bias, *norm, *gate, slope_of(layer, spec)]
        inputs = units
    _parameter("parameters", "weight", parameters.weight, (1, inputs), history)
    _parameter("parameters", "bias", parameters.bias, (1,), history)
    slope, wanted = parameters.score_slope, spec.score_activation == "prelu"
    if (slope is not None) != wanted or (slope is not None and slope.numel() != 1):
        raise ValueError(
            f"parameters.score_slope: expected {'one element' if wanted else 'None'} for the score activation "
            f"{spec.score_activation}, got {slope if slope is None else tuple(slope.shape)}"
        )
    if slope is not None:
        _parameter("parameters", "score_slope", slope, slope.shape, history)
    flat += [parameters.weight, parameters.bias, slope]
    if history.dtype in HALF_TYPES:
        flat = [None if t is None else t.to(torch.float32) for t in flat]
    return flat


def check_batch_statistics(segments: Segments, query: Tensor, valid_only: bool) -> None:
    """A variance needs two rows: raise for one, before anything changes.

    Which positions are valid is read on the CPU only, where that waits for nothing, and not while torch.compile traces.
    """
    rows = query.shape[0] * segments.history.shape[1]
    if valid_only and segments.history.device.type == "cpu" and not torch.compiler.is_compiling():
        valid = valid_positions(segments)
        if valid is not None:
            if segments.candidate_offsets is not None:
                valid = valid[user_of_candidates(segments, query)]
            rows = int(valid.sum())
    if rows == 1:
        what = "valid row" if valid_only else "row"
        raise ValueError(
            f"history: expected more than 1 {what} for batch statistics in training, got 1 of shape "
            f"{tuple(segments.history.shape)}"
        )


def check_dropout(parameters: UnitParameters) -> float:
    """The dropout of the hidden layers, which has to be the same in all."""
    found = {layer.dropout for layer in parameters.hidden}
    if len(found) > 1:
        raise ValueError(f"parameters.hidden: expected one dropout in all layers, got {sorted(found)}")
    return found.pop() if found else 0.0


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
    if t.dtype != history.dtype and not (t.dtype == torch.float32 and history.dtype in HALF_TYPES):
        raise TypeError(f"{owner}.{field}: expected {history.dtype} as the history has, got {t.dtype}")
    if t.device != history.device:
        raise ValueError(f"{owner}.{field}: expected device {history.device} as the history has, got {t.device}")

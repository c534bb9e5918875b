"""The two exact rewritings that the kernels live on.

1. Every feature block is linear in q, k or q*k, so the first Linear collapses to three H x D matrices:
   ``z = A_q q + b + (A_k + A_p diag(q)) k``.
2. A BatchNorm, and Dice's gate, are affine in z: ``n = norm_scale (z - center) + norm_shift`` and
   ``x = gate_scale (z - center) + gate_shift``, one number per hidden unit.

Both are ordinary torch operations, so autograd carries the gradient of scales, shifts and A back to the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from din_fast.spec import BLOCKS, HiddenLayer, batch_mode


def block_table(blocks: tuple[str, ...]) -> list[int]:
    """The coefficients of the blocks in (q, k, q*k), flat, as ``infer`` takes them."""
    return [sign for name in blocks for sign in BLOCKS[name]]


# What the lists of the ops hold, see din_fast/ops.py.
AFFINES = 6  # tensors a layer in `affine`
SUMS = 5  # rows of `sums`
FIELDS = 11  # tensors a hidden layer in the raw parameters of `infer` and `train`
NUMBERS = 8  # rows a hidden layer in the `numbers` of `train`, csrc/fold.h


def fold_first_layer(weight: Tensor, blocks: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(H, len(blocks) * D) -> A_q, A_k, A_p, each (H, D), in the wider of float32 and the weight's dtype."""
    return fold_table(wide(weight), block_table(blocks))


def fold_table(weight: Tensor, table: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fold_first_layer`, of a weight as it stands, from the blocks' coefficients."""
    parts = weight.chunk(len(table) // 3, dim=1)
    folded: list[Tensor | None] = [None, None, None]
    for at, sign in enumerate(table):
        if sign:
            part, so_far = parts[at // 3], folded[at % 3]
            if so_far is None:
                folded[at % 3] = part if sign > 0 else -part
            else:
                folded[at % 3] = so_far + part if sign > 0 else so_far - part
    a_q, a_k, a_p = (torch.zeros_like(parts[0]) if f is None else f.contiguous() for f in folded)
    return a_q, a_k, a_p


def fold_layers(
    layers: Sequence[tuple[Tensor, Tensor | None]],
    weight: Tensor,
    bias: Tensor | None,
    score_slope: Tensor | None,
    score_factor: float,
    table: Sequence[int],
) -> list[Tensor]:
    """The ops' `weights`, from weight and bias of each hidden layer and of the last Linear; half types in float32.

    No hidden layer is one of one unit, as it stands. The score's slope, where there is one, is behind its bias.
    """
    if not layers:
        layers, weight, bias = [(weight, bias)], weight.new_ones(1, 1), None
    found: list[Tensor] = []
    for i, (w, b) in enumerate(layers):
        found += fold_table(wide(w), table) if i == 0 else [wide(w)]
        found.append(found[-1].new_zeros(w.shape[0]) if b is None else wide(b))
    score, last = wide(weight).reshape(-1), found[-1].new_zeros(1) if bias is None else wide(bias)
    if score_factor != 1.0:
        score, last = score * score_factor, last * score_factor
    if score_slope is not None:
        last = torch.cat([last, wide(score_slope).reshape(1)])
    return [*found, score, last]


def fold_parameters(
    parameters: Sequence[Tensor | None], table: Sequence[int], eps: Sequence[float], gated: bool, score_factor: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The raw parameters of ``infer`` (:func:`din_fast.segments.check_parameters`) as `weights` and `affine`.

    ``gated``: the kernel's activation is batch Dice; where its gate has no statistics it is the one that SiLU is.
    """
    *raw, weight, bias, score_slope = parameters
    assert weight is not None
    absent = wide(weight).new_empty(0)
    layers: list[tuple[Tensor, Tensor | None]] = []
    affine: list[Tensor] = []
    for at in range(0, len(raw), FIELDS):
        w, b, *norms, slope = raw[at : at + FIELDS]
        assert w is not None
        layers.append((w, b))
        scale, shift = _running_affine(norms[:4], eps[2 * len(layers) - 2], absent)
        gate_scale, gate_shift = _running_affine(norms[4:], eps[2 * len(layers) - 1], absent)
        if gated and not gate_scale.numel():
            gate_scale, gate_shift = (scale, shift) if scale.numel() else (absent.new_ones(w.shape[0]), absent)
        elif scale.numel() and gate_scale.numel():  # Dice's norm sees what the norm before it gives
            gate_scale, gate_shift = gate_scale * scale, gate_shift + gate_scale * shift
        slopes = absent if slope is None else wide(slope).reshape(-1).expand(w.shape[0])
        if gated and slope is None:
            slopes = absent.new_zeros(w.shape[0])
        affine += [absent, scale, shift, gate_scale, gate_shift, slopes]
    return fold_layers(layers, weight, bias, score_slope, score_factor, table), affine or [absent] * AFFINES


def _running_affine(norm: Sequence[Tensor | None], eps: float, absent: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm by its running statistics, from weight, bias, mean and variance."""
    weight, bias, mean, variance = norm
    if mean is None or variance is None:
        return absent, absent
    scale = _inverse(weight, wide(variance), eps)
    return scale, _plus(bias, -wide(mean) * scale)


class Affine(NamedTuple):
    """One hidden layer's affine maps of z, each (H,) or None; a shift of None is 0.

    ``response`` (2, 4, H) is how the batch statistics answer: with the backward sums S = (sum dn (z - mean), sum dn,
    sum dx (z - mean), sum dx), the full gradient is ``dz = local - e0 - e1 (z - mean)`` where
    ``e_i = (response[i] * S).sum(0)``.
    """

    center: Tensor | None
    norm_scale: Tensor | None
    norm_shift: Tensor | None
    gate_scale: Tensor | None
    gate_shift: Tensor | None
    slope: Tensor | None
    response: Tensor | None


def affine(
    layer: HiddenLayer, mean: Tensor | None, variance: Tensor | None, count: Tensor | None, silu: bool = False
) -> Affine:
    """Scales and shifts of a hidden layer, from its norms and the batch's (biased) moments of z.

    mean, variance (H,) and count (0-d) are None when no norm of the layer is in batch mode. They are constants here:
    the gradient that flows through them is what ``response`` describes. ``silu``: the layer is the Dice
    that SiLU is, whose gate sees what its norm gives, with alpha 0.
    """
    norm, gate = layer.norm, layer.gate_norm
    slope = None if layer.slope is None else wide(layer.slope).reshape(-1).expand(layer.weight.shape[0])
    scale: Tensor | None = None
    shift: Tensor | None = None
    gate_scale: Tensor | None = None
    gate_shift: Tensor | None = None
    if norm is not None:
        if batch_mode(norm):
            assert variance is not None
            scale = _inverse(norm.weight, variance, norm.eps)
            shift = None if norm.bias is None else wide(norm.bias)
        else:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = _inverse(norm.weight, wide(norm.running_var), norm.eps)
            running_mean = wide(norm.running_mean)
            shift = _plus(norm.bias, scale * (running_mean.neg() if mean is None else mean - running_mean))
    if gate is not None:
        if batch_mode(gate):
            assert variance is not None
            if scale is not None:
                inverse = scale * torch.rsqrt(scale.square() * variance + gate.eps)
            else:
                inverse = torch.rsqrt(variance + gate.eps)
            gate_scale = _times(gate.weight, inverse)
            gate_shift = None if gate.bias is None else wide(gate.bias)
        else:
            assert gate.running_mean is not None and gate.running_var is not None
            rest = _inverse(gate.weight, wide(gate.running_var), gate.eps)
            running_mean = wide(gate.running_mean)
            gate_scale = rest if scale is None else rest * scale
            at_center = shift if scale is not None else mean  # what the gate sees where z is at its center
            offset = running_mean.neg() if at_center is None else at_center - running_mean
            gate_shift = _plus(gate.bias, rest * offset)
    elif silu:
        units = layer.weight.shape[0]
        gate_scale, gate_shift = (wide(layer.weight).new_ones(units) if scale is None else scale), shift
        slope = wide(layer.weight).new_zeros(units)
    response = None
    if mean is not None:
        assert variance is not None and count is not None
        response = _response(layer, variance, count, scale, gate_scale)
    return Affine(mean, scale, shift, gate_scale, gate_shift, slope, response)


@torch.no_grad()
def _response(
    layer: HiddenLayer, variance: Tensor, count: Tensor, scale: Tensor | None, gate_scale: Tensor | None
) -> Tensor:
    """d(mean) and d(variance) as linear functions of the four sums; see :class:`Affine`."""
    norm, gate = layer.norm, layer.gate_norm
    zero = torch.zeros_like(variance)
    scale_by_variance = None  # -2 d norm_scale / d variance
    if scale is not None and norm is not None and batch_mode(norm):
        scale_by_variance = scale / (variance + norm.eps)
    gate_by_variance = None  # -2 d gate_scale / d variance
    if gate is None:
        gate_by_variance = None if gate_scale is None else scale_by_variance
    elif gate_scale is not None:
        if not batch_mode(gate):
            assert gate.running_var is not None
            if scale_by_variance is not None:
                rest = _inverse(gate.weight, wide(gate.running_var), gate.eps)
                gate_by_variance = rest * scale_by_variance
        elif scale is None:
            gate_by_variance = gate_scale / (variance + gate.eps)
        else:
            squared = scale.square()
            inverse = torch.rsqrt(squared * variance + gate.eps)
            gate_by_variance = gate_scale * squared * inverse.square()
            if scale_by_variance is not None:
                by_scale = _times(gate.weight, gate.eps * inverse**3)
                gate_by_variance = gate_by_variance + by_scale * scale_by_variance
    # Through `center`: d mean = -scale sum(dn) - gate_scale sum(dx), but for a frozen norm, whose shift moves with it.
    by_mean = scale if batch_mode(norm) else None
    gate_by_mean = gate_scale if batch_mode(gate) or batch_mode(norm) else None
    rows = [None, by_mean, None, gate_by_mean, scale_by_variance, None, gate_by_variance, None]
    return torch.stack([zero if r is None else r for r in rows]).view(2, 4, -1).to(torch.float64) / count


def wide(t: Tensor) -> Tensor:
    """Half types in float32, which all arithmetic of a unit is done in; the others as they are."""
    return t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32)


def _inverse(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """The factor of a BatchNorm."""
    return _times(weight, torch.rsqrt(variance + eps))


def _times(weight: Tensor | None, x: Tensor) -> Tensor:
    return x if weight is None else wide(weight) * x


def _plus(bias: Tensor | None, x: Tensor) -> Tensor:
    return x if bias is None else wide(bias) + x


@torch.no_grad()
def update_running_statistics(
    norm: nn.modules.batchnorm._BatchNorm,
    mean: Tensor,
    variance: Tensor,
    count: Tensor | float,
    may_be_empty: bool = False,
) -> None:
    """What torch's BatchNorm does to its buffers in training: unbiased variance, momentum or cumulative average.

    mean, variance (H,), biased; count (0-d, or a number where reading it waits for nothing): the rows they were taken
    over. Nothing changes when no statistics are tracked or when the norm is frozen (eval), nor, where it
    ``may_be_empty``, for a count of 0.
    """
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None or norm.running_var is None:
        return
    if isinstance(count, float):
        if may_be_empty and count == 0:
            return
        may_be_empty = False
    factor: Tensor | float = 0.0 if norm.momentum is None else norm.momentum
    some = count > 0 if may_be_empty else 1
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(some)
        if norm.momentum is None:
            factor = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    if may_be_empty:
        assert isinstance(count, Tensor)
        factor = (count > 0).to(mean.dtype) * factor
    others = max(count - 1, 1.0) if isinstance(count, float) else (count - 1).clamp(min=1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
    norm.running_var.lerp_((variance * (count / others)).to(norm.running_var.dtype), factor)


def update_layer(
    layer: HiddenLayer, affine: Affine, variance: Tensor, count: Tensor | float, may_be_empty: bool = False
) -> None:
    """Update the running statistics of a hidden layer's norms from the batch's moments of z."""
    assert affine.center is not None
    mean = affine.center
    if layer.norm is not None:
        update_running_statistics(layer.norm, mean, variance, count, may_be_empty)
        # Dice's norm sees what the norm before it gives: an affine map of z.
        assert affine.norm_scale is not None
        scale, shift = affine.norm_scale.detach(), affine.norm_shift
        mean, variance = torch.zeros_like(scale) if shift is None else shift.detach(), scale.square() * variance
    if layer.gate_norm is not None:
        update_running_statistics(layer.gate_norm, mean, variance, count, may_be_empty)


def update_all(hidden: Sequence[HiddenLayer], numbers: Tensor, statistics: Tensor, may_be_empty: bool) -> None:
    """:func:`update_layer` of the layers with batch statistics, from what the op ``native_train`` leaves behind."""
    widths = [layer.weight.shape[0] for layer in hidden]
    at, at_count = numbers.shape[0] - NUMBERS * sum(widths), 0
    for layer, units in zip(hidden, widths, strict=True):
        if batch_mode(layer.norm) or batch_mode(layer.gate_norm):
            # Rows of csrc/fold.h: bias, center, scale and shift of the norm, and three of the gate; the variance.
            center, scale, shift, variance = (numbers.narrow(0, at + units * i, units) for i in (1, 2, 3, 7))
            found = Affine(center, scale, shift, None, None, None, None)
            update_layer(layer, found, variance, statistics[at_count].item(), may_be_empty)
        at += NUMBERS * units
        at_count += 1 + 8 * units

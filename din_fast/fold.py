"""The two exact rewritings that the kernels live on.

1. Every feature block is linear in q, k or q*k, so the first Linear collapses to three H x D matrices:
   ``z = A_q q + b + (A_k + A_p diag(q)) k``.
2. A BatchNorm, and Dice's gate, are affine in z: ``n = norm_scale (z - center) + norm_shift`` and
   ``x = gate_scale (z - center) + gate_shift``, one number per hidden unit.

Both are ordinary torch operations, so autograd carries the gradient of scales, shifts and A back to the parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from din_fast.spec import BLOCKS, HiddenLayer


def block_table(blocks: tuple[str, ...]) -> list[int]:
    """The coefficients of the blocks in (q, k, q*k), flat, as ``infer`` takes them."""
    return [sign for name in blocks for sign in BLOCKS[name]]


def fold_first_layer(weight: Tensor, blocks: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(H, len(blocks) * D) -> A_q, A_k, A_p, each (H, D), in the wider of float32 and the weight's dtype."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    parts = weight.chunk(len(blocks), dim=1)
    folded: list[Tensor | None] = [None, None, None]
    for name, part in zip(blocks, parts, strict=True):
        for i, sign in enumerate(BLOCKS[name]):
            if sign:
                term = part if sign > 0 else -part
                folded[i] = term if folded[i] is None else folded[i] + term  # type: ignore[operator]
    a_q, a_k, a_p = (torch.zeros_like(parts[0]) if f is None else f.contiguous() for f in folded)
    return a_q, a_k, a_p


class Affine(NamedTuple):
    """One hidden layer's affine maps of z, each (H,) or None; ``response`` is None without batch statistics.

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


def batch_mode(norm: nn.modules.batchnorm._BatchNorm | None) -> bool:
    """Whether this BatchNorm normalises with the statistics of the batch at hand."""
    return norm is not None and (norm.training or norm.running_mean is None)


def affine(layer: HiddenLayer, mean: Tensor | None, variance: Tensor | None, count: Tensor | None) -> Affine:
    """Scales and shifts of a hidden layer, from its norms and the batch's (biased) moments of z.

    mean, variance (H,) and count (0-d) are None when no norm of the layer is in batch mode. They are constants here:
    the gradient that flows through them is what ``response`` describes.
    """
    units = layer.weight.shape[0]
    norm, gate = layer.norm, layer.gate_norm
    slope = None if layer.slope is None else layer.slope.reshape(-1).expand(units).contiguous()
    scale: Tensor | None = None
    shift: Tensor | None = None
    gate_scale: Tensor | None = None
    gate_shift: Tensor | None = None
    one = layer.weight.new_ones(units)
    if norm is not None:
        if batch_mode(norm):
            assert variance is not None
            scale = _times(norm.weight, torch.rsqrt(variance + norm.eps))
            shift = torch.zeros_like(scale) if norm.bias is None else norm.bias
        else:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = _times(norm.weight, torch.rsqrt(norm.running_var + norm.eps))
            shift = _plus(norm.bias, scale * (norm.running_mean.neg() if mean is None else mean - norm.running_mean))
    if gate is not None:
        n_scale = one if scale is None else scale
        if batch_mode(gate):
            assert variance is not None
            gate_scale = _times(gate.weight, n_scale * torch.rsqrt(n_scale.square() * variance + gate.eps))
            gate_shift = torch.zeros_like(gate_scale) if gate.bias is None else gate.bias
        else:
            assert gate.running_mean is not None and gate.running_var is not None
            rest = _times(gate.weight, torch.rsqrt(gate.running_var + gate.eps))
            gate_scale = rest * n_scale
            at_center = shift if shift is not None else torch.zeros_like(one) if mean is None else mean
            gate_shift = _plus(gate.bias, rest * (at_center - gate.running_mean))
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
    scale_by_variance = zero  # d norm_scale / d variance
    if norm is not None and batch_mode(norm):
        assert scale is not None
        scale_by_variance = -0.5 * scale / (variance + norm.eps)
    gate_by_variance = zero  # d gate_scale / d variance
    if gate is not None:
        assert gate_scale is not None
        if batch_mode(gate):
            n_scale = torch.ones_like(variance) if scale is None else scale
            inverse = torch.rsqrt(n_scale.square() * variance + gate.eps)
            gate_by_variance = -0.5 * gate_scale * (n_scale * inverse).square()
            by_scale = _times(gate.weight, gate.eps * inverse**3)
            gate_by_variance = gate_by_variance + by_scale * scale_by_variance
        else:
            assert gate.running_var is not None
            rest = _times(gate.weight, torch.rsqrt(gate.running_var + gate.eps))
            gate_by_variance = rest * scale_by_variance
    # Through `center`: d mean = -scale sum(dn) - gate_scale sum(dx), but for a frozen norm, whose shift moves with it.
    by_mean = gate_by_mean = zero
    if scale is not None and batch_mode(norm):
        by_mean = scale
    if gate_scale is not None and (batch_mode(gate) or batch_mode(norm)):
        gate_by_mean = gate_scale
    rows = [zero, by_mean, zero, gate_by_mean, -2 * scale_by_variance, zero, -2 * gate_by_variance, zero]
    return torch.stack(rows).view(2, 4, -1).to(torch.float64) / count


def _times(weight: Tensor | None, x: Tensor) -> Tensor:
    return x if weight is None else weight * x


def _plus(bias: Tensor | None, x: Tensor) -> Tensor:
    return x if bias is None else bias + x


@torch.no_grad()
def update_running_statistics(
    norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor, count: Tensor
) -> None:
    """What torch's BatchNorm does to its buffers in training: unbiased variance, momentum or cumulative average.

    mean, variance (H,), biased; count (0-d): the rows they were taken over, at least 2. Nothing changes when no
    statistics are tracked or when the norm is frozen (eval).
    """
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None or norm.running_var is None:
        return
    factor: Tensor | float = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
    unbiased = variance * (count / (count - 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), factor)


def update_layer(layer: HiddenLayer, affine: Affine, variance: Tensor, count: Tensor) -> None:
    """Update the running statistics of a hidden layer's norms from the batch's moments of z."""
    assert affine.center is not None
    mean = affine.center
    if layer.norm is not None:
        update_running_statistics(layer.norm, mean, variance, count)
        # Dice's norm sees what the norm before it gives: an affine map of z.
        assert affine.norm_scale is not None and affine.norm_shift is not None
        mean, variance = affine.norm_shift.detach(), affine.norm_scale.detach().square() * variance
    if layer.gate_norm is not None:
        update_running_statistics(layer.gate_norm, mean, variance, count)

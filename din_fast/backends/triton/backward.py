"""The backward: gradients of the scores, then layer by layer down to the history.

``score_gradient_kernel``   d logit of every position from the gradients of the pooled vectors and of the weights
``softmax_gradient_kernel`` the same through the softmax, program = candidate
``row_kernel``              row Dice: what the gradient of a row needs of the whole row
``layer_kernel``            one layer, program = (group of candidates, chunk of hidden units): sums for batch statistics
                            and slopes, the gradient of the weight above, d z for the layer below; of the first
                            layer the gradients of A_k, A_p, q and c
``complete_kernel``         d z of a layer as the layer below needs it
``history_kernel``          d k, program = (users, tile), summed over a user's candidates in order

No atomics: what is summed over positions stays in a program's registers, programs write partial sums in a fixed
layout, and torch adds them up in float64. z of the first layer is made again in each kernel, z of the others is read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from din_fast.backends.triton import tiling
from din_fast.backends.triton.arithmetic import (
    CENTER,
    DICE_ROW,
    E0,
    E1,
    POOL_MEAN_VALID,
    SCORE,
    SCORE_PRELU,
    SCORE_SIGMOID,
    activation_gradient,
    add_chunk,
    answered,
    candidate_chunk,
    count_valid,
    dropout_factors,
    dropout_rows,
    enter_tile,
    first_chunk,
    is_valid,
    load_columns,
    load_query,
    load_rows,
    locate,
    normed,
    parameter,
    part_end,
    pooling_scale,
    score_prelu,
    store_columns,
    sum_rows,
    taking_part,
    tile_rows,
    to_rows,
)
from din_fast.backends.triton.operands import OPTIONS, Call, on_device
from din_fast.fold import SUMS

TAKEN = tl.constexpr(6)  # the rows of the op's `sums`, and d of the score's weight
COMPLETE = 1024  # elements of a program of complete_kernel
ROW = tl.constexpr(4)  # row Dice: mean, 1 / sqrt(sum of squares + H eps), mean of dx, sum of dx x


# ---------------------------------------------------------------- scores
@triton.jit
def load_gradient(gradient, c, d, ok, dim, BC: tl.constexpr):
    """The gradient of the pooled vectors, columns d, float32: (1, d) of one candidate, (rows, d) of several."""
    g_ptr, g_stride, g_column = gradient
    if BC == 1:
        g = tl.load(g_ptr + c * g_stride + d * g_column, mask=d < dim, other=0.0)[None, :]
    else:
        at = g_ptr + (c * g_stride)[:, None] + (d * g_column)[None, :]
        g = tl.load(at, mask=ok[:, None] & (d < dim)[None, :], other=0.0)
    return g.to(tl.float32)


@triton.jit
def score_gradient_kernel(
    k_ptr,
    starts_ptr,
    lengths_ptr,
    mask_ptr,
    users_ptr,
    candidates,
    length,
    rows,
    user_stride,
    row_stride,
    dim,
    g_ptr,
    g_stride,
    g_column,
    gs_ptr,
    gs_stride,
    gs_column,
    scores_ptr,
    bias_ptr,
    d_logit_ptr,
    d_slope_ptr,
    part_rows,
    BC: tl.constexpr,
    LP: tl.constexpr,
    BD: tl.constexpr,
    POOLED: tl.constexpr,
    SCORES: tl.constexpr,
    RAGGED: tl.constexpr,
    LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK: tl.constexpr,
    SCORE_ACT: tl.constexpr,
    POOLING: tl.constexpr,
):
    """d weight = scale (g . k) + d weight from outside, through a sigmoid; zero where a position does not count.

    With a PReLU on the score what comes from outside is its gradient before the PReLU; d_slope (programs,) is that of
    the slope.
    """
    seg = (k_ptr, starts_ptr, lengths_ptr, mask_ptr, users_ptr, candidates, length, rows, user_stride, row_stride)
    gradient = (g_ptr, g_stride, g_column)
    c0 = tl.program_id(0).to(tl.int64) * BC
    c = tile_rows(c0, 0, BC, LP)[0]
    user, start, first, total, count = locate(seg, c, RAGGED, LENGTHS, GROUPS)
    found = tl.zeros((BC,), tl.float32)
    if POOLING == POOL_MEAN_VALID:
        found = count_valid(seg, c0, c, user, total, count, MASK, BC, LP)
    scale = to_rows(pooling_scale(POOLING, found, total, BC, LP), BC, LP)
    d_slope = tl.zeros((BC * LP,), tl.float32)
    begin = tl.program_id(1) * part_rows
    end = part_end(begin, part_rows, total, BC, LP)
    for l0 in tl.range(begin, end, LP):
        pos = tile_rows(c0, l0, BC, LP)[1]
        inside = (pos < total) & (pos < end)
        ok = is_valid(seg, user, pos, count, MASK) & inside
        dp = tl.zeros((BC * LP,), tl.float32)
        if POOLED:
            for d0 in tl.range(0, dim, BD):
                d = d0 + tl.arange(0, BD)
                k = load_rows(k_ptr, start, pos, row_stride, d, ok, dim).to(tl.float32)
                g = load_gradient(gradient, c, d, ok, dim, BC)
                dp += tl.sum(k * g, 1)
            dp = dp * scale
        if SCORE_ACT == SCORE_PRELU:
            s = tl.load(scores_ptr + first + pos, mask=ok, other=0.0)
            d_slope += tl.where(ok & ~(s > 0.0), dp * s, 0.0)
            dp = tl.where(s > 0.0, dp, dp * tl.load(bias_ptr + 1))
        if SCORES:
            at = gs_ptr + c * gs_stride + pos.to(tl.int64) * gs_column
            if RAGGED:
                at = gs_ptr + (first + pos) * gs_column
            dp += tl.load(at, mask=ok, other=0.0).to(tl.float32)
        if SCORE_ACT == SCORE_SIGMOID:
            p = tl.load(scores_ptr + first + pos, mask=ok, other=0.0)
            dp = dp * p * (1.0 - p)
        tl.store(d_logit_ptr + first + pos, tl.where(ok, dp, 0.0), mask=inside)
    if SCORE_ACT == SCORE_PRELU:
        at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(d_slope_ptr + at, tl.sum(d_slope, 0))


@triton.jit
def softmax_gradient_kernel(
    k_ptr,
    starts_ptr,
    lengths_ptr,
    mask_ptr,
    users_ptr,
    candidates,
    length,
    rows,
    user_stride,
    row_stride,
    scores_ptr,
    d_logit_ptr,
    LP: tl.constexpr,
    RAGGED: tl.constexpr,
    LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK: tl.constexpr,
):
    """d logit = p (dp - sum p dp), in place; where nothing counts the weights are constants."""
    seg = (k_ptr, starts_ptr, lengths_ptr, mask_ptr, users_ptr, candidates, length, rows, user_stride, row_stride)
    c = tl.program_id(0).to(tl.int64)
    user, _, first, _, count = locate(seg, c, RAGGED, LENGTHS, GROUPS)
    part = tl.zeros((LP,), tl.float32)
    for l0 in tl.range(0, count.to(tl.int32), LP):
        pos = l0 + tl.arange(0, LP)
        ok = is_valid(seg, user, pos, count, MASK)
        p = tl.load(scores_ptr + first + pos, mask=ok, other=0.0)
        part += p * tl.load(d_logit_ptr + first + pos, mask=ok, other=0.0)
    mean = tl.sum(part, 0)
    for l0 in tl.range(0, count.to(tl.int32), LP):
        pos = l0 + tl.arange(0, LP)
        ok = is_valid(seg, user, pos, count, MASK)
        p = tl.load(scores_ptr + first + pos, mask=ok, other=0.0)
        dp = tl.load(d_logit_ptr + first + pos, mask=ok, other=0.0)
        tl.store(d_logit_ptr + first + pos, p * (dp - mean), mask=ok)


# ---------------------------------------------------------------- what the kernels below share
@triton.jit
def z_chunk(tile, folded, z_ptr, first, pos, ok, units, h, FIRST, BC, BD, WIDE, PREC):
    """z of a chunk of the layer: made again (the first), or read."""
    return first_chunk(tile, folded, h, BC, BD, WIDE, PREC) if FIRST else load_columns(z_ptr, first, pos, ok, units, h)


@triton.jit
def above_piece(dz_ptr, first, pos, ok, AT: tl.constexpr, N: tl.constexpr, LD: tl.constexpr):
    """Columns AT.. of d z of the layer above, as complete_kernel left it."""
    at = dz_ptr + (first + pos)[:, None] * LD + (AT + tl.arange(0, N))[None, :]
    return tl.load(at, mask=ok[:, None], other=0.0)


@triton.jit
def above(dz_ptr, first, pos, ok, NA: tl.constexpr, NB: tl.constexpr, LAST: tl.constexpr):
    """d z of the layer above in pieces; zeros where there is none."""
    dza = tl.zeros((pos.shape[0], NA), tl.float32)
    dzb = dza
    if not LAST:
        dza = above_piece(dz_ptr, first, pos, ok, 0, NA, NA + NB)
        if NB > 0:
            dzb = above_piece(dz_ptr, first, pos, ok, NA, NB, NA + NB)
    return dza, dzb


@triton.jit
def from_above(
    d_logit, p_ptr, hp, h, dza, dzb, w_ptr, NA: tl.constexpr, NB: tl.constexpr, LAST: tl.constexpr, PREC: tl.constexpr
):
    """The gradient of a chunk of the layer's activations."""
    if LAST:
        da = d_logit[:, None] * parameter(p_ptr, hp, SCORE, h)
    else:
        at = h[:, None] * (NA + NB) + tl.arange(0, NA)[None, :]
        da = tl.dot(dza, tl.trans(tl.load(w_ptr + at)), input_precision=PREC)
        if NB > 0:
            at = h[:, None] * (NA + NB) + NA + tl.arange(0, NB)[None, :]
            da = tl.dot(dzb, tl.trans(tl.load(w_ptr + at)), da, input_precision=PREC)
    return da


@triton.jit
def row_numbers(row_ptr, first, pos, ok, DICE: tl.constexpr):
    """What row_kernel wrote: mean, inverse, mean of dx, sum of dx x."""
    at = row_ptr + (first + pos) * ROW
    mean = tl.zeros((pos.shape[0],), tl.float32)
    inverse = mean
    mean_dx = mean
    dot_dx = mean
    if DICE:
        mean = tl.load(at, mask=ok, other=0.0)
        inverse = tl.load(at + 1, mask=ok, other=0.0)
        mean_dx = tl.load(at + 2, mask=ok, other=0.0)
        dot_dx = tl.load(at + 3, mask=ok, other=0.0)
    return mean, inverse, mean_dx, dot_dx


# ---------------------------------------------------------------- row Dice
@triton.jit
def row_kernel(
    k_ptr,
    starts_ptr,
    lengths_ptr,
    mask_ptr,
    users_ptr,
    candidates,
    length,
    rows,
    user_stride,
    row_stride,
    q_ptr,
    q_stride,
    c_ptr,
    ak_ptr,
    ap_ptr,
    hp0,
    dim,
    seed_ptr,
    below,
    factor,
    p_ptr,
    units: tl.constexpr,
    hp,
    z_ptr,
    w_ptr,
    next_dz_ptr,
    eps,
    d_logit_ptr,
    row_ptr,
    part_rows,
    BC: tl.constexpr,
    LP: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    NA: tl.constexpr,
    NB: tl.constexpr,
    LAYER: tl.constexpr,
    LAST: tl.constexpr,
    RAGGED: tl.constexpr,
    LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK: tl.constexpr,
    PADS: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    PREC: tl.constexpr,
    FAST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """(rows, 4): mean, inverse, mean of dx and sum of dx x of each row of the layer."""
    seg = (k_ptr, starts_ptr, lengths_ptr, mask_ptr, users_ptr, candidates, length, rows, user_stride, row_stride)
    folded = (c_ptr, ak_ptr, ap_ptr, hp0)
    c0 = tl.program_id(0).to(tl.int64) * BC
    c = tile_rows(c0, 0, BC, LP)[0]
    user, start, first, total, count = locate(seg, c, RAGGED, LENGTHS, GROUPS)
    random = (seed_ptr, below, factor, first)
    begin = tl.program_id(1) * part_rows
    end = part_end(begin, part_rows, total, BC, LP)
    for l0 in tl.range(begin, end, LP):
        pos = tile_rows(c0, l0, BC, LP)[1]
        ok = taking_part(seg, user, pos, count, (pos < total) & (pos < end), MASK, PADS)
        tile = (0.0, 0.0, k_ptr, start, pos, row_stride, ok, q_ptr, q_stride, c, dim)
        if LAYER == 0:
            tile = enter_tile(seg, start, c, pos, ok, (q_ptr, q_stride), dim, BC, BD, WIDE)
        d_logit = tl.load(d_logit_ptr + first + pos, mask=ok, other=0.0)
        dza, dzb = above(next_dz_ptr, first, pos, ok, NA, NB, LAST)
        mean = tl.zeros((BC * LP,), tl.float32)
        m2 = mean
        for h0 in tl.range(0, hp, BH):
            h = h0 + tl.arange(0, BH)
            z = z_chunk(tile, folded, z_ptr, first, pos, ok, units, h, LAYER == 0, BC, BD, WIDE, PREC)
            if h0 < units:
                mean, m2 = add_chunk(mean, m2, normed(z, p_ptr, hp, h, NORM), h, h0, units, BH)
        inverse = tl.rsqrt(m2 + units * eps)
        dropout = dropout_rows(random, pos, LAYER, DROPOUT)
        sum_dx = tl.zeros((BC * LP,), tl.float32)
        dot_dx = sum_dx
        none = sum_dx
        for h0 in tl.range(0, hp, BH):
            h = h0 + tl.arange(0, BH)
            z = z_chunk(tile, folded, z_ptr, first, pos, ok, units, h, LAYER == 0, BC, BD, WIDE, PREC)
            da = from_above(d_logit, p_ptr, hp, h, dza, dzb, w_ptr, NA, NB, LAST, PREC)
            if DROPOUT:
                da = da * dropout_factors(random, dropout, h)
            dx = activation_gradient(z, da, mean, inverse, none, none, p_ptr, hp, h, ACT, NORM, FAST)[2]
            x = (normed(z, p_ptr, hp, h, NORM) - mean[:, None]) * inverse[:, None]
            dx = tl.where((h < units)[None, :], dx, 0.0)
            sum_dx += tl.sum(dx, 1)
            dot_dx += tl.sum(dx * x, 1)
        at = row_ptr + (first + pos) * ROW
        tl.store(at, mean, mask=ok)
        tl.store(at + 1, inverse, mask=ok)
        tl.store(at + 2, sum_dx / units, mask=ok)
        tl.store(at + 3, dot_dx, mask=ok)


# ---------------------------------------------------------------- one layer
@triton.jit
def layer_kernel(
    k_ptr,
    starts_ptr,
    lengths_ptr,
    mask_ptr,
    users_ptr,
    candidates,
    length,
    rows,
    user_stride,
    row_stride,
    q_ptr,
    q_stride,
    c_ptr,
    ak_ptr,
    ap_ptr,
    hp0,
    dim,
    seed_ptr,
    below,
    factor,
    p_ptr,
    units: tl.constexpr,
    hp,
    z_ptr,
    w_ptr,
    next_dz_ptr,
    d_logit_ptr,
    row_ptr,
    local_ptr,
    sums_ptr,
    dw_ptr,
    db_ptr,
    dak_ptr,
    dap_ptr,
    dc_ptr,
    dq_ptr,
    blocks,
    group_parts,
    part_rows,
    BC: tl.constexpr,
    LP: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BA: tl.constexpr,
    WIDE: tl.constexpr,
    NA: tl.constexpr,
    NB: tl.constexpr,
    LAYER: tl.constexpr,
    LAST: tl.constexpr,
    TAKE: tl.constexpr,
    WEIGHT: tl.constexpr,
    LOCAL: tl.constexpr,
    LD: tl.constexpr,
    INPUTS: tl.constexpr,
    ANSWER: tl.constexpr,
    RAGGED: tl.constexpr,
    LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK: tl.constexpr,
    PADS: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    PREC: tl.constexpr,
    FAST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Program = (group of candidates and part of their histories, chunk of hidden units, slice of BA columns of k).

    TAKE    sums (groups, 6, hp): dn (z - center), dn, dx (z - center), dx, d slope, d of the score's weight
    WEIGHT  dw (groups, hp, NA + NB) and db (groups, NA + NB) of the layer above
    LOCAL   d z of this layer but for the answer of its batch statistics, rows of LD columns
    INPUTS  dak, dap (groups, dim, hp); dc (parts, C, hp); dq (chunks, parts, C, dim), what comes through A_p
    """
    seg = (k_ptr, starts_ptr, lengths_ptr, mask_ptr, users_ptr, candidates, length, rows, user_stride, row_stride)
    folded = (c_ptr, ak_ptr, ap_ptr, hp0)
    group = tl.program_id(0) // group_parts
    part = tl.program_id(0) % group_parts
    groups = tl.num_programs(0) // group_parts
    at_group = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    e = tl.program_id(2) * BA + tl.arange(0, BA)
    center = parameter(p_ptr, hp, CENTER, h)
    s0 = tl.zeros((BH,), tl.float32)
    s1 = s0
    s2 = s0
    s3 = s0
    s4 = s0
    s5 = s0
    wa = tl.zeros((BH, NA), tl.float32)
    ba = tl.zeros((NA,), tl.float32)
    wb = wa
    bb = ba
    if NB > 0:
        wb = tl.zeros((BH, NB), tl.float32)
        bb = tl.zeros((NB,), tl.float32)
    dak = tl.zeros((BA, BH), tl.float32)
    dap = dak
    ap = dak
    if INPUTS:
        ap = tl.load(ap_ptr + e[:, None] * hp + h[None, :], mask=(e < dim)[:, None], other=0.0)
    per_group = tl.cdiv(blocks, groups)
    for i in tl.range(0, tl.minimum(per_group, blocks - group * per_group)):
        c0 = (group.to(tl.int64) * per_group + i) * BC
        c = tile_rows(c0, 0, BC, LP)[0]
        user, start, first, total, count = locate(seg, c, RAGGED, LENGTHS, GROUPS)
        random = (seed_ptr, below, factor, first)
        begin = part * part_rows
        end = part_end(begin, part_rows, total, BC, LP)
        if BC == 1 and not PADS:
            end = tl.minimum(end, count.to(tl.int32))
        dc = tl.zeros((BC, BH), tl.float32)
        dab = tl.zeros((BA, BH), tl.float32)  # one candidate: of its matrix
        dq = tl.zeros((BC, BA), tl.float32)
        # What does not change is left to L1, since there are no registers left; wide layers have more warps, and some.
        for l0 in tl.range(begin, end, LP, disable_licm=NA + NB <= 128):
            pos = tile_rows(c0, l0, BC, LP)[1]
            ok = taking_part(seg, user, pos, count, (pos < total) & (pos < end), MASK, PADS)
            tile = (0.0, 0.0, k_ptr, start, pos, row_stride, ok, q_ptr, q_stride, c, dim)
            if LAYER == 0:
                tile = enter_tile(seg, start, c, pos, ok, (q_ptr, q_stride), dim, BC, BD, WIDE)
            z = z_chunk(tile, folded, z_ptr, first, pos, ok, units, h, LAYER == 0, BC, BD, WIDE, PREC)
            d_logit = tl.load(d_logit_ptr + first + pos, mask=ok, other=0.0)
            dza, dzb = above(next_dz_ptr, first, pos, ok, NA, NB, LAST)
            da = from_above(d_logit, p_ptr, hp, h, dza, dzb, w_ptr, NA, NB, LAST, PREC)
            mean, inverse, mean_dx, dot_dx = row_numbers(row_ptr, first, pos, ok, ACT == DICE_ROW)
            factors = da
            if DROPOUT:
                factors = dropout_factors(random, dropout_rows(random, pos, LAYER, True), h)
                da = da * factors
            y, dn, dx, d_slope, dz = activation_gradient(
                z, da, mean, inverse, mean_dx, dot_dx, p_ptr, hp, h, ACT, NORM, FAST
            )
            dz = tl.where(ok[:, None], dz, 0.0)
            if DROPOUT:
                y = y * factors
            if TAKE:
                zc = z - center
                s0 += tl.sum(tl.where(ok[:, None], dn * zc, 0.0), 0)
                s1 += tl.sum(tl.where(ok[:, None], dn, 0.0), 0)
                s2 += tl.sum(dx * zc, 0)
                s3 += tl.sum(dx, 0)
                s4 += tl.sum(d_slope, 0)
                if LAST:
                    s5 += tl.sum(d_logit[:, None] * y, 0)
            if WEIGHT:
                yt = tl.trans(tl.where(ok[:, None], y, 0.0).to(w_ptr.dtype.element_ty))
                wa = tl.dot(yt, dza, wa, input_precision=PREC)
                ba += tl.sum(dza.to(tl.float32), 0)
                if NB > 0:
                    wb = tl.dot(yt, dzb, wb, input_precision=PREC)
                    bb += tl.sum(dzb.to(tl.float32), 0)
            if LOCAL:
                store_columns(local_ptr, first, pos, ok, LD, dz.to(local_ptr.dtype.element_ty), h)
            if INPUTS:
                dz = answered(dz, z, ok, p_ptr, hp, h, ANSWER)
                dc += sum_rows(dz, BC, LP)
                k = tile[0]
                if WIDE:
                    k = load_rows(k_ptr, start, pos, row_stride, e, ok, dim)
                dzt = dz.to(k.dtype)
                if BC == 1:
                    dab = tl.dot(tl.trans(k), dzt, dab, input_precision=PREC)
                else:
                    dak = tl.dot(tl.trans(k), dzt, dak, input_precision=PREC)
                    dap = tl.dot(tl.trans(tile[1]), dzt, dap, input_precision=PREC)
                    dkq = tl.dot(dzt, tl.trans(ap.to(k.dtype)), input_precision=PREC)
                    dq += sum_rows(dkq * k.to(tl.float32), BC, LP)
        if INPUTS:
            if BC == 1:
                q = load_query(q_ptr, c, q_stride, e, c < candidates, dim, 1)
                dak += dab
                dap += dab * q[:, None]
                dq += tl.sum(dab * ap, 1)[None, :]
            cs = c0 + tl.arange(0, BC)
            here = (cs < candidates)[:, None]
            at = (part.to(tl.int64) * candidates + cs)[:, None]
            if tl.program_id(2) == 0:
                tl.store(dc_ptr + at * hp + h[None, :], dc, mask=here)
            at += tl.program_id(1).to(tl.int64) * group_parts * candidates
            tl.store(dq_ptr + at * dim + e[None, :], dq, mask=here & (e < dim)[None, :])
    if TAKE and tl.program_id(2) == 0:
        at = sums_ptr + at_group * TAKEN * hp + h
        tl.store(at, s0)
        tl.store(at + hp, s1)
        tl.store(at + 2 * hp, s2)
        tl.store(at + 3 * hp, s3)
        tl.store(at + 4 * hp, s4)
        tl.store(at + 5 * hp, s5)
    if WEIGHT and tl.program_id(2) == 0:
        at = (at_group * hp + h)[:, None] * (NA + NB)
        ha = tl.arange(0, NA)
        tl.store(dw_ptr + at + ha[None, :], wa)
        if NB > 0:
            tl.store(dw_ptr + at + NA + tl.arange(0, NB)[None, :], wb)
        if tl.program_id(1) == 0:
            tl.store(db_ptr + at_group * (NA + NB) + ha, ba)
            if NB > 0:
                tl.store(db_ptr + at_group * (NA + NB) + NA + tl.arange(0, NB), bb)
    if INPUTS:
        at = (at_group * dim + e)[:, None] * hp + h[None, :]
        tl.store(dak_ptr + at, dak, mask=(e < dim)[:, None])
        tl.store(dap_ptr + at, dap, mask=(e < dim)[:, None])


# ---------------------------------------------------------------- a layer's d z, complete
@triton.jit
def complete_kernel(
    local_ptr,
    z_ptr,
    p_ptr,
    dz_ptr,
    rows,
    units: tl.constexpr,
    LD: tl.constexpr,
    BLOCK: tl.constexpr,
    ANSWER: tl.constexpr,
):
    """d z of a layer, complete with its statistics' answer, (rows, LD) in the history's dtype; zeros beyond its units.

    Once for all the chunks of the layer below, which read it as operands of their products.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = i // LD
    h = (i % LD).to(tl.int32)
    ok = (row < rows) & (h < units)
    dz = tl.load(local_ptr + row * units + h, mask=ok, other=0.0)
    if ANSWER:
        z = tl.load(z_ptr + row * units + h, mask=ok, other=0.0)
        center = tl.load(p_ptr + CENTER * LD + h)
        dz -= (z - center) * tl.load(p_ptr + E1 * LD + h) + tl.load(p_ptr + E0 * LD + h)
    tl.store(dz_ptr + i, dz.to(dz_ptr.dtype.element_ty), mask=row < rows)


# ---------------------------------------------------------------- the history
@triton.jit
def history_kernel(
    k_ptr,
    starts_ptr,
    lengths_ptr,
    mask_ptr,
    users_ptr,
    candidates,
    length,
    rows,
    user_stride,
    row_stride,
    q_ptr,
    q_stride,
    c_ptr,
    ak_ptr,
    ap_ptr,
    hp0,
    dim,
    seed_ptr,
    below,
    factor,
    p_ptr,
    units: tl.constexpr,
    hp,
    z_ptr,
    w_ptr,
    next_dz_ptr,
    d_logit_ptr,
    row_ptr,
    g_ptr,
    g_stride,
    g_column,
    scores_ptr,
    bias_ptr,
    offsets_ptr,
    dk_ptr,
    part_rows,
    BC: tl.constexpr,
    LP: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BA: tl.constexpr,
    WIDE: tl.constexpr,
    NA: tl.constexpr,
    NB: tl.constexpr,
    LAST: tl.constexpr,
    ANSWER: tl.constexpr,
    POOLED: tl.constexpr,
    RAGGED: tl.constexpr,
    LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK: tl.constexpr,
    PADS: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    SCORE_ACT: tl.constexpr,
    POOLING: tl.constexpr,
    PREC: tl.constexpr,
    FAST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Program = (user or a tile's candidates, part of the history, slice of BA columns): d k, shaped as the history."""
    seg = (k_ptr, starts_ptr, lengths_ptr, mask_ptr, users_ptr, candidates, length, rows, user_stride, row_stride)
    folded = (c_ptr, ak_ptr, ap_ptr, hp0)
    gradient = (g_ptr, g_stride, g_column)
    u0 = tl.program_id(0).to(tl.int64) * BC
    e = tl.program_id(2) * BA + tl.arange(0, BA)
    first_candidate = u0
    last_candidate = u0 + 1
    if GROUPS:  # clamped, so that nothing is read outside
        first_candidate = tl.maximum(tl.load(offsets_ptr + u0), 0)
        last_candidate = tl.minimum(tl.load(offsets_ptr + u0 + 1), candidates)
    begin = tl.program_id(1) * part_rows
    end = begin + LP
    if BC == 1:
        end = tl.minimum(begin + part_rows, length)
        if RAGGED:
            end = tl.minimum(begin + part_rows, locate(seg, u0, RAGGED, LENGTHS, GROUPS)[3].to(tl.int32))
    for l0 in tl.range(begin, end, LP):
        dk = tl.zeros((BC * LP, BA), tl.float32)
        for c1 in tl.range(first_candidate, last_candidate):
            c, pos = tile_rows(c1, l0, BC, LP)
            user, start, first, total, count = locate(seg, c, RAGGED, LENGTHS, GROUPS)
            inside = (pos < total) & (pos < end)
            ok = taking_part(seg, user, pos, count, inside, MASK, PADS)
            if POOLED:
                found = tl.zeros((BC,), tl.float32)
                if POOLING == POOL_MEAN_VALID:
                    found = count_valid(seg, c1, c, user, total, count, MASK, BC, LP)
                scale = to_rows(pooling_scale(POOLING, found, total, BC, LP), BC, LP)
                weight = tl.load(scores_ptr + first + pos, mask=inside, other=0.0)
                if SCORE_ACT == SCORE_PRELU:
                    weight = score_prelu(weight, tl.load(bias_ptr + 1))
                g = load_gradient(gradient, c, e, inside, dim, BC)
                dk += (weight * scale)[:, None] * g
            tile = enter_tile(seg, start, c, pos, ok, (q_ptr, q_stride), dim, BC, BD, WIDE)
            q = load_query(q_ptr, c, q_stride, e, ok, dim, BC)
            d_logit = tl.load(d_logit_ptr + first + pos, mask=ok, other=0.0)
            dza, dzb = above(next_dz_ptr, first, pos, ok, NA, NB, LAST)
            mean, inverse, mean_dx, dot_dx = row_numbers(row_ptr, first, pos, ok, ACT == DICE_ROW)
            random = (seed_ptr, below, factor, first)
            dropout = dropout_rows(random, pos, 0, DROPOUT)
            dkq = tl.zeros((BC * LP, BA), tl.float32)  # several candidates: of q k
            for h0 in tl.range(0, hp, BH):
                h = h0 + tl.arange(0, BH)
                z = z_chunk(tile, folded, z_ptr, first, pos, ok, units, h, True, BC, BD, WIDE, PREC)
                da = from_above(d_logit, p_ptr, hp, h, dza, dzb, w_ptr, NA, NB, LAST, PREC)
                if DROPOUT:
                    da = da * dropout_factors(random, dropout, h)
                dz = activation_gradient(z, da, mean, inverse, mean_dx, dot_dx, p_ptr, hp, h, ACT, NORM, FAST)[4]
                dtype = q_ptr.dtype.element_ty
                dz = answered(dz, z, ok, p_ptr, hp, h, ANSWER).to(dtype)
                w = e[:, None] * hp + h[None, :]
                ak = tl.load(ak_ptr + w, mask=(e < dim)[:, None], other=0.0)
                ap = tl.load(ap_ptr + w, mask=(e < dim)[:, None], other=0.0)
                if BC == 1:
                    a = candidate_chunk(ak, ap, q).to(dtype)
                    dk = tl.dot(dz, tl.trans(a), dk, input_precision=PREC)
                else:
                    dk = tl.dot(dz, tl.trans(ak.to(dtype)), dk, input_precision=PREC)
                    dkq = tl.dot(dz, tl.trans(ap.to(dtype)), dkq, input_precision=PREC)
            if BC > 1:
                dk += dkq * q
        u, pos = tile_rows(u0, l0, BC, LP)
        row = u * length + pos
        there = pos < end
        if RAGGED:
            row = locate(seg, u0, RAGGED, LENGTHS, GROUPS)[2] + pos
        if BC > 1:
            there = (u < candidates) & (pos < length)
        at = dk_ptr + row[:, None] * dim + e[None, :]
        tl.store(at, dk.to(dk_ptr.dtype.element_ty), mask=there[:, None] & (e < dim)[None, :])


# ---------------------------------------------------------------- launching
class Pass:
    """One pass of the backward over a call: from a layer's gradient down to another, or to the inputs.

    Args:
        z: of the layers after the first, by layer. scores: the weights, as forward gave them.
        sums, response: of each layer, as the op's; sums are empty while unknown.

    Attributes:
        d_logit: of every row. local: d z, but for the answer of batch statistics, of the layers after the first that
            have such statistics and were reached. d_weights: as the op's. All three are filled as the pass goes on, or
            by the caller.
    """

    def __init__(
        self,
        call: Call,
        z: dict[int, Tensor],
        scores: Tensor,
        sums: list[Tensor],
        response: list[Tensor],
        pads_are_input: bool,
        score_activation: int,
        softmax: bool,
        pooling: int,
    ) -> None:
        self.call, self.z, self.scores = call, z, scores
        self.sums, self.response = list(sums), response
        self.pads_are_input = pads_are_input
        self.score_activation, self.softmax, self.pooling = score_activation, softmax, pooling
        self.d_logit = call.none
        self.d_score_slope = call.none
        self.local: dict[int, Tensor] = {}
        self.complete: dict[int, Tensor] = {}  # d z, for the layer below
        self.d_weights: list[Tensor | None] = [None] * len(call.raw_weights)
        self.rows_of: dict[int, Tensor] = {}
        for i in range(call.layers):
            self._learn(i)
        tile = call.plan.backward
        self.parts, self.part_rows = 1, 1 << 30
        if tile.candidates == 1 and call.starts is None:
            self.parts, self.part_rows = max(tiling.ceil_div(call.length, tile.positions), 1), tile.positions
        # columns of d k and of the matrices' gradients that a program makes
        self.columns = tiling.slice_columns(call.shape, tile)
        self.slices = tiling.ceil_div(call.dim, self.columns)

    def _learn(self, layer: int) -> None:
        """Once its sums are known, a layer's d z can be completed with the answer of its batch statistics."""
        if self.sums[layer].numel() and self.response[layer].numel():
            self.call.with_answer(layer, self.response[layer], self.sums[layer])

    def _has_answer(self, layer: int) -> bool:
        return layer < self.call.layers and self.response[layer].numel() > 0

    def score_gradient(self, grad_pooled: Tensor | None, grad_scores: Tensor | None) -> None:
        """d logit of every row."""
        call, tile = self.call, self.call.plan.backward
        self.d_logit = call.empty(call.rows)
        if self.score_activation == SCORE_PRELU.value:
            self.d_score_slope = call.empty(call.blocks(tile), self.parts)
        if call.starts is not None:
            self.d_logit.zero_()
        if not call.candidates:
            return
        g = (call.none, 0, 0) if grad_pooled is None else (grad_pooled, *grad_pooled.stride())
        gs: tuple[Any, ...] = (call.none, 0, 0)
        if grad_scores is not None:
            gs = (grad_scores, grad_scores.stride(0) if grad_scores.dim() == 2 else 0, grad_scores.stride(-1))
        with on_device(call.history):
            score_gradient_kernel[(call.blocks(tile), self.parts)](
                *call.segments,
                call.dim,
                *g,
                *gs,
                self.scores,
                call.bias,
                self.d_logit,
                self.d_score_slope,
                self.part_rows,
                BC=tile.candidates,
                LP=tile.positions,
                BD=tile.columns,
                POOLED=grad_pooled is not None,
                SCORES=grad_scores is not None,
                SCORE_ACT=self.score_activation,
                POOLING=self.pooling,
                num_warps=tile.warps,
                **OPTIONS,
                **call.flags,
            )
            if self.softmax:
                softmax_gradient_kernel[(call.candidates,)](
                    *call.segments, self.scores, self.d_logit, LP=256, **OPTIONS, **call.flags
                )

    def score_bias_gradient(self) -> Tensor:
        """Of the score's bias and, behind it, of the slope of a PReLU on the score."""
        found = [self.d_logit.sum(dtype=torch.float64)]
        if self.score_activation == SCORE_PRELU.value:
            found.append(self.d_score_slope.sum(dtype=torch.float64))
        return torch.stack(found).float()

    def _above(self, layer: int) -> tuple[Any, ...]:
        """This layer's arguments, and those of the layer above it."""
        call, none, above = self.call, self.call.none, layer + 1
        table, units, hp = call.tables[layer], call.units[layer], call.padded_units(layer)
        z = self.z.get(layer, none)
        if above == call.layers:
            return table, units, hp, z, none, none
        return table, units, hp, z, call.weights[above - 1], self._complete(above)

    def _complete(self, layer: int) -> Tensor:
        """d z of a layer after the first, (rows, padded units) in the history's dtype."""
        if layer not in self.complete:
            call = self.call
            dz = self._empty_complete(layer)
            if dz.numel():
                with on_device(call.history):
                    complete_kernel[(tiling.ceil_div(dz.numel(), COMPLETE),)](
                        self.local[layer],
                        self.z[layer],
                        call.tables[layer],
                        dz,
                        call.rows,
                        call.units[layer],
                        LD=dz.shape[1],
                        BLOCK=COMPLETE,
                        ANSWER=self._has_answer(layer),
                        **OPTIONS,
                    )
            self.complete[layer] = dz
        return self.complete[layer]

    def _empty_complete(self, layer: int) -> Tensor:
        return self.call.empty(self.call.rows, self.call.padded_units(layer), dtype=self.call.history.dtype)

    def _flags(self, layer: int) -> dict[str, Any]:
        call = self.call
        na, nb = call.plan.pieces[layer] if layer + 1 < call.layers else (16, 0)
        return {
            **call.tile_flags(call.plan.backward),
            "NA": na,
            "NB": nb,
            "LAST": layer + 1 == call.layers,
            "PADS": self.pads_are_input,
            **call.flags,
            **call.unit_flags,
        }

    def _rows(self, layer: int) -> Tensor:
        """Row Dice: the numbers of each row, made once a pass."""
        call = self.call
        if not call.row_dice:
            return call.none
        if layer not in self.rows_of:
            self.rows_of[layer] = call.empty(call.rows, ROW.value)
            row_kernel[(call.blocks(call.plan.backward), self.parts)](
                *call.segments,
                *call.first,
                *self._above(layer),
                call.eps,
                self.d_logit,
                self.rows_of[layer],
                self.part_rows,
                LAYER=layer,
                **self._flags(layer),
            )
        return self.rows_of[layer]

    def layer(self, layer: int, take: bool, weight: bool, inputs: bool) -> tuple[Tensor, ...]:
        """Run one layer: its sums (``take``), the gradient of the weight above, d z for below, gradients of inputs."""
        call, plan, tile = self.call, self.call.plan, self.call.plan.backward
        last, first = layer + 1 == call.layers, layer == 0
        hp, none = call.padded_units(layer), call.none
        weight = weight and not last
        groups = plan.groups * plan.group_parts
        chunks, slices = hp // tile.units, self.slices if inputs else 1
        blocks = call.blocks(tile)
        wide = call.padded_units(layer + 1) if not last else 16
        sums = call.empty(groups, TAKEN.value, hp) if take else none
        dw = call.empty(groups, hp, wide) if weight else none
        db = call.empty(groups, wide) if weight else none
        d_z = none
        if not first:
            d_z = call.empty(call.rows, call.units[layer]) if self._has_answer(layer) else self._empty_complete(layer)
            (self.local if self._has_answer(layer) else self.complete)[layer] = d_z
        dak, dap, dc, dq = (none,) * 4
        if inputs:
            dak, dap = call.empty(groups, call.dim, hp), call.empty(groups, call.dim, hp)
            dc = call.empty(plan.group_parts, call.candidates, hp)
            dq = call.empty(chunks * plan.group_parts, call.candidates, call.dim)
        part_rows = 1 << 30
        if plan.group_parts > 1:
            tiles = tiling.ceil_div(call.length, tile.positions)
            part_rows = tiling.ceil_div(tiles, plan.group_parts) * tile.positions
        with on_device(call.history):
            row = self._rows(layer)
            if blocks:
                layer_kernel[(groups, chunks, slices)](
                    *call.segments,
                    *call.first,
                    *self._above(layer),
                    self.d_logit,
                    row,
                    d_z,
                    sums,
                    dw,
                    db,
                    dak,
                    dap,
                    dc,
                    dq,
                    blocks,
                    plan.group_parts,
                    part_rows,
                    BA=self.columns,
                    LAYER=layer,
                    TAKE=take,
                    WEIGHT=weight,
                    LOCAL=not first,
                    LD=1 if first else d_z.shape[1],
                    INPUTS=inputs,
                    ANSWER=inputs and self._has_answer(layer),
                    **self._flags(layer),
                )
        if take:
            taken = sums.sum(0, dtype=torch.float64)[:, : call.units[layer]]
            self.sums[layer] = taken[:SUMS].contiguous()
            self._learn(layer)
            if last:
                self.d_weights[-2] = taken[SUMS].float()
        if weight:
            above = layer + 1
            self.d_weights[2 * above + 2] = (
                dw.sum(0, dtype=torch.float64)[: call.units[layer], : call.units[above]].t().float().contiguous()
            )
            self.d_weights[2 * above + 3] = db.sum(0, dtype=torch.float64)[: call.units[above]].float()
        return dak, dap, dc, dq

    def inputs(self, take: bool, need_weights: bool, need_query: bool) -> Tensor | None:
        """The first layer: gradients of A_q, A_k, A_p, b1 and, returned, of the query."""
        call, units = self.call, self.call.units[0]
        dak, dap, dc, dq = self.layer(0, take, take and need_weights, True)
        dc = dc.sum(0)[:, :units]
        if need_weights:
            self.d_weights[0] = dc.t() @ call.query.float()
            for i, d in ((1, dak), (2, dap)):
                self.d_weights[i] = d.sum(0, dtype=torch.float64)[:, :units].t().float().contiguous()
            self.d_weights[3] = dc.sum(0, dtype=torch.float64).float()
        if not need_query:
            return None
        through_c = dc @ call.raw_weights[0].float()
        return (through_c + dq.sum(0)).to(call.query.dtype)

    def history(self, grad_pooled: Tensor | None) -> Tensor:
        """d k, summed over a user's candidates."""
        call, tile = self.call, self.call.plan.backward
        ragged = call.starts is not None
        shape = call.history.shape
        make = torch.zeros if ragged else torch.empty
        dk = make(shape, dtype=call.history.dtype, device=call.history.device)
        if not dk.numel():
            return dk
        g = (call.none, 0, 0) if grad_pooled is None else (grad_pooled, *grad_pooled.stride())
        with on_device(call.history):
            history_kernel[(tiling.ceil_div(call.users, tile.candidates), self.parts, self.slices)](
                *call.segments,
                *call.first,
                *self._above(0),
                self.d_logit,
                self._rows(0),
                *g,
                self.scores,
                call.bias,
                call.none if call.candidate_offsets is None else call.candidate_offsets,
                dk,
                self.part_rows,
                BA=self.columns,
                ANSWER=self._has_answer(0),
                POOLED=grad_pooled is not None,
                SCORE_ACT=self.score_activation,
                POOLING=self.pooling,
                **self._flags(0),
            )
        return dk

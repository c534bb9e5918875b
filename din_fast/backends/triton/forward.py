"""The forward pass: scores, softmax (online), pooling.

``forward_kernel``  program = (a tile's candidates, one part of the history): positions in tiles, hidden units in chunks
``merge_kernel``    program = candidate: the parts of a long history, merged

While positions are gone through, the scores' buffer holds raw scores (minus infinity where a position does not count
under softmax); they become weights in the end, when the largest score and the sum are known.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from din_fast.backends.triton import tiling
from din_fast.backends.triton.arithmetic import (
    DICE_ROW,
    EMPTY_NAN,
    EMPTY_UNIFORM,
    EMPTY_ZEROS,
    LOG2E,
    POOL_MEAN_VALID,
    POOL_NONE,
    SCORE,
    SCORE_PRELU,
    SCORE_SIGMOID,
    activated_pieces,
    activation,
    add_chunk,
    count_valid,
    dropout_factors,
    dropout_rows,
    enter_tile,
    first_chunk,
    first_row_statistics,
    is_valid,
    load_columns,
    load_pieces,
    load_rows,
    locate,
    normed,
    parameter,
    piece_score,
    pooling_scale,
    score_prelu,
    second_layer,
    sigmoid,
    store_columns,
    store_pieces,
    sum_rows,
    third_chunk,
    tile_rows,
    to_rows,
)
from din_fast.backends.triton.operands import OPTIONS, Call, on_device


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def finite(m):
    """The largest score as what is subtracted: where there is none, anything will do."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def inverse_of(total):
    return tl.where(total == 0.0, 0.0, 1.0 / total)  # NaN stays NaN


@triton.jit
def pool(weight, k, BC: tl.constexpr, LP: tl.constexpr):
    """(BC, d): the sum of weight times k over each candidate's rows.

    Half types and one candidate: a product with the weight in three parts, exact to float32 although its operands are
    not, and without a float32 copy of k.
    """
    if BC > 1 or k.dtype == tl.float32:
        s = sum_rows(weight[:, None] * k.to(tl.float32), BC, LP)
    else:
        r = tl.arange(0, 16)[:, None]
        high = weight.to(k.dtype).to(tl.float32)
        middle = (weight - high).to(k.dtype).to(tl.float32)
        low = weight - high - middle
        parts = tl.where(r == 0, high[None, :], tl.where(r == 1, middle[None, :], tl.where(r == 2, low[None, :], 0.0)))
        s = tl.sum(tl.dot(parts.to(k.dtype), k), 0)[None, :]
    return s


@triton.jit
def to_weights(scores_ptr, first, pos, total, m, factor):
    """Raw scores at these positions -> weights, in place."""
    at = scores_ptr + first + pos
    s = tl.load(at, mask=pos < total, other=float("-inf"))
    tl.store(at, exp(s - m) * factor, mask=pos < total)


@triton.jit
def forward_kernel(
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
    hp,
    dim,
    seed_ptr,
    below,
    factor,
    p0_ptr,
    units0: tl.constexpr,
    w1_ptr,
    p1_ptr,
    units1: tl.constexpr,
    w2_ptr,
    p2_ptr,
    units2: tl.constexpr,
    hp2,
    eps,
    z1_ptr,
    z2_ptr,
    bias_ptr,
    scores_ptr,
    pooled_ptr,
    part_ptr,
    part_rows,
    BC: tl.constexpr,
    LP: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    NA: tl.constexpr,
    NB: tl.constexpr,
    LAYERS: tl.constexpr,
    START: tl.constexpr,
    KEEP: tl.constexpr,
    PARTS: tl.constexpr,
    RAGGED: tl.constexpr,
    LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK: tl.constexpr,
    PADS: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    SCORE_ACT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    EMPTY: tl.constexpr,
    POOLING: tl.constexpr,
    PREC: tl.constexpr,
    FAST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """START: the layer whose z is read from its buffer (z1, z2), 0 to begin with the history. KEEP: bit 0 and bit 1:
    write z1 and z2.

    PARTS: the history is cut into tl.num_programs(1) parts of part_rows rows; what a part gives goes to
    part (parts, candidates, dim + 2): the weighted sum, the largest score and the sum of exponentials.
    """
    seg = (k_ptr, starts_ptr, lengths_ptr, mask_ptr, users_ptr, candidates, length, rows, user_stride, row_stride)
    folded = (c_ptr, ak_ptr, ap_ptr, hp)
    c0 = tl.program_id(0).to(tl.int64) * BC
    c = tile_rows(c0, 0, BC, LP)[0]
    user, start, first, total, count = locate(seg, c, RAGGED, LENGTHS, GROUPS)
    found = tl.zeros((BC,), tl.float32)
    if POOLING == POOL_MEAN_VALID or (SOFTMAX and EMPTY != EMPTY_ZEROS):
        found = count_valid(seg, c0, c, user, total, count, MASK, BC, LP)
    # A softmax over nothing with another answer than zeros: all rows count, with one score.
    nothing = to_rows(found == 0.0, BC, LP)

    begin = 0
    own_end = LP  # several candidates a tile: there is one tile
    if BC == 1:
        own_end = total.to(tl.int32)
        if PARTS:
            begin = tl.program_id(1) * part_rows
            own_end = tl.minimum(own_end, begin + part_rows)
        stop = own_end
        # Rows beyond the lengths are gone through where their z is kept, or where they may get a weight.
        if not (PADS and KEEP > 0) and not (SOFTMAX and EMPTY != EMPTY_ZEROS):
            stop = tl.minimum(own_end, count.to(tl.int32))
    else:
        stop = own_end

    d = tl.arange(0, BD)
    acc = tl.zeros((BC, BD), tl.float32)
    m = tl.full((BC,), float("-inf"), tl.float32)
    total_exp = tl.zeros((BC,), tl.float32)
    bias = tl.load(bias_ptr)
    score_slope = bias
    if SCORE_ACT == SCORE_PRELU:
        score_slope = tl.load(bias_ptr + 1)
    random = (seed_ptr, below, factor, first)
    for l0 in tl.range(begin, stop, LP):
        pos = tile_rows(c0, l0, BC, LP)[1]
        inside = (pos < total) & (pos < own_end)
        valid = is_valid(seg, user, pos, count, MASK) & inside
        if SOFTMAX and EMPTY != EMPTY_ZEROS:
            valid = (valid | nothing) & inside
        ok = valid
        if PADS:
            ok = inside
        mean = tl.zeros((BC * LP,), tl.float32)  # row Dice only
        inverse = mean
        if START == 0:
            tile = enter_tile(seg, start, c, pos, ok, (q_ptr, q_stride), dim, BC, BD, WIDE)
            if ACT == DICE_ROW:
                mean, inverse = first_row_statistics(tile, folded, p0_ptr, units0, eps, BC, BD, BH, WIDE, PREC, NORM)
        ya = tl.zeros((BC * LP, NA), tl.float32)  # three layers only
        yb = ya
        if LAYERS > 1 and START < 2:
            if START == 0:
                za, zb = second_layer(
                    tile, folded, mean, inverse, random, p0_ptr, w1_ptr, p1_ptr,
                    NA, NB, BC, BD, BH, WIDE, PREC, ACT, NORM, FAST, DROPOUT,
                )  # fmt: skip
                if KEEP & 1:
                    store_pieces(z1_ptr, first, pos, ok, units1, za, zb, NA, NB)
            else:
                za, zb = load_pieces(z1_ptr, first, pos, ok, units1, NA, NB)
            if LAYERS == 3:
                ya, yb = activated_pieces(za, zb, random, pos, p1_ptr, units1, eps, NA, NB, ACT, NORM, FAST, DROPOUT)
        if LAYERS == 2:
            s = piece_score(za, zb, random, pos, p1_ptr, units1, eps, NA, NB, ACT, NORM, FAST, DROPOUT)
        else:
            p_ptr = p0_ptr if LAYERS == 1 else p2_ptr
            width = hp if LAYERS == 1 else hp2
            if LAYERS == 3 and ACT == DICE_ROW:
                mean = tl.zeros((BC * LP,), tl.float32)
                m2 = mean
                for h0 in tl.range(0, hp2, BH):
                    h = h0 + tl.arange(0, BH)
                    if START < 2:
                        z = third_chunk(ya, yb, w2_ptr, p2_ptr, hp2, h, NA, NB, PREC)
                    else:
                        z = load_columns(z2_ptr, first, pos, ok, units2, h)
                    if h0 < units2:
                        mean, m2 = add_chunk(mean, m2, normed(z, p2_ptr, hp2, h, NORM), h, h0, units2, BH)
                inverse = tl.rsqrt(m2 + units2 * eps)
            part = tl.zeros((BC * LP, BH), tl.float32)
            dropout = dropout_rows(random, pos, LAYERS - 1, DROPOUT)
            for h0 in tl.range(0, width, BH):
                h = h0 + tl.arange(0, BH)
                if LAYERS == 1:
                    z = first_chunk(tile, folded, h, BC, BD, WIDE, PREC)
                elif START < 2:
                    z = third_chunk(ya, yb, w2_ptr, p2_ptr, hp2, h, NA, NB, PREC)
                    if KEEP & 2:
                        store_columns(z2_ptr, first, pos, ok, units2, z, h)
                else:
                    z = load_columns(z2_ptr, first, pos, ok, units2, h)
                y = activation(z, mean, inverse, p_ptr, width, h, ACT, NORM, FAST)
                if DROPOUT:
                    y = y * dropout_factors(random, dropout, h)
                part += y * parameter(p_ptr, width, SCORE, h)
            s = tl.sum(part, 1)
        s += bias
        if SCORE_ACT == SCORE_SIGMOID:
            s = sigmoid(s, FAST)
        if SOFTMAX:
            if EMPTY == EMPTY_UNIFORM:
                s = tl.where(nothing, 0.0, s)
            if EMPTY == EMPTY_NAN:
                s = tl.where(nothing, float("nan"), s)
            s = tl.where(valid, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(tl.reshape(s, (BC, LP)), 1))
            base = finite(m_new)
            weight = exp(s - to_rows(base, BC, LP))
            before = exp(m - base)
            total_exp = total_exp * before + sum_rows(weight, BC, LP)
            acc = acc * before[:, None]
            m = m_new
        else:
            s = tl.where(valid, s, 0.0)
            weight = s
            if SCORE_ACT == SCORE_PRELU:
                weight = score_prelu(s, score_slope)
        tl.store(scores_ptr + first + pos, s, mask=inside)
        if not WIDE and POOLING != POOL_NONE:
            k = tile[0] if START == 0 else load_rows(k_ptr, start, pos, row_stride, d, ok, dim)
            acc += pool(weight, k, BC, LP)

    if BC == 1:  # rows that were left out
        done = begin + tl.cdiv(tl.maximum(stop - begin, 0), LP) * LP
        for l0 in tl.range(done, own_end, LP):
            pos = l0 + tl.arange(0, LP)
            value = 0.0
            if SOFTMAX:
                value = float("-inf")
            tl.store(scores_ptr + first + pos, tl.zeros((LP,), tl.float32) + value, mask=pos < own_end)

    # What is left: scale, raw scores -> weights; WIDE: the pooling, a slice of columns at a time.
    scale = pooling_scale(POOLING, found, total, BC, LP)
    base = finite(m)
    if SOFTMAX and not PARTS:
        scale = scale * inverse_of(total_exp)
    if PARTS:
        scale = tl.full((BC,), 1.0, tl.float32)
    cs = c0 + tl.arange(0, BC)
    here = cs < candidates
    out_ptr = pooled_ptr
    out_stride = dim
    at = cs
    if PARTS:
        out_ptr = part_ptr
        out_stride = dim + 2
        at = cs + tl.program_id(1).to(tl.int64) * candidates
        tl.store(part_ptr + at * out_stride + dim, m, mask=here)
        tl.store(part_ptr + at * out_stride + dim + 1, total_exp, mask=here)
    if not WIDE and POOLING != POOL_NONE:
        v = (acc * scale[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (at * out_stride)[:, None] + d[None, :], v, mask=here[:, None] & (d < dim)[None, :])
    if SOFTMAX or (WIDE and POOLING != POOL_NONE):
        tl.debug_barrier()  # other threads wrote the scores that are read below
    if WIDE and POOLING != POOL_NONE:
        for d0 in tl.range(0, dim, BD):
            e = d0 + d
            acc = tl.zeros((BC, BD), tl.float32)
            for l0 in tl.range(begin, stop, LP):
                pos = l0 + tl.arange(0, LP)
                ok = pos < own_end
                if not PADS:
                    valid = is_valid(seg, user, pos, count, MASK)
                    if SOFTMAX and EMPTY != EMPTY_ZEROS:
                        valid = valid | nothing
                    ok = ok & valid
                s = tl.load(scores_ptr + first + pos, mask=ok, other=0.0)
                if SOFTMAX:
                    s = tl.where(ok, exp(s - base), 0.0)
                if SCORE_ACT == SCORE_PRELU:
                    s = score_prelu(s, score_slope)
                acc += pool(s, load_rows(k_ptr, start, pos, row_stride, e, ok, dim), BC, LP)
            v = (acc * scale[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (at * out_stride)[:, None] + e[None, :], v, mask=here[:, None] & (e < dim)[None, :])
        tl.debug_barrier()
    if SOFTMAX and not PARTS:
        factor = to_rows(inverse_of(total_exp), BC, LP)
        for l0 in tl.range(0, own_end, LP):
            pos = tile_rows(c0, l0, BC, LP)[1]
            to_weights(scores_ptr, first, pos, total, to_rows(base, BC, LP), factor)


@triton.jit
def merge_kernel(
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
    scores_ptr,
    pooled_ptr,
    part_ptr,
    parts,
    LP: tl.constexpr,
    BD: tl.constexpr,
    RAGGED: tl.constexpr,
    LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    POOLING: tl.constexpr,
):
    """Merge the parts of one candidate's history, in order; BD columns at a time."""
    seg = (k_ptr, starts_ptr, lengths_ptr, mask_ptr, users_ptr, candidates, length, rows, user_stride, row_stride)
    c = tl.program_id(0).to(tl.int64)
    user, _, first, total, count = locate(seg, c, RAGGED, LENGTHS, GROUPS)
    found = tl.zeros((1,), tl.float32)
    if POOLING == POOL_MEAN_VALID:
        found = count_valid(seg, c, c, user, total, count, MASK, 1, LP)
    one = tl.zeros((1,), tl.int32)
    m = tl.full((1,), float("-inf"), tl.float32)
    step = candidates * (dim + 2)
    state = part_ptr + c * (dim + 2) + dim + one
    if SOFTMAX:
        for i in tl.range(0, parts):
            m = tl.maximum(m, tl.load(state + i * step))
    base = finite(m)
    total_exp = tl.zeros((1,), tl.float32)
    if SOFTMAX:
        for i in tl.range(0, parts):
            total_exp += exp(tl.load(state + i * step) - base) * tl.load(state + i * step + 1)
    scale = pooling_scale(POOLING, found, total, 1, LP)
    if SOFTMAX:
        scale = scale * inverse_of(total_exp)
    if POOLING != POOL_NONE:
        for d0 in tl.range(0, dim, BD):
            d = d0 + tl.arange(0, BD)
            acc = tl.zeros((BD,), tl.float32)
            for i in tl.range(0, parts):
                v = tl.load(part_ptr + i * step + c * (dim + 2) + d, mask=d < dim, other=0.0)
                if SOFTMAX:
                    v = v * exp(tl.load(state + i * step) - base)
                acc += v
            tl.store(pooled_ptr + c * dim + d, (acc * scale).to(pooled_ptr.dtype.element_ty), mask=d < dim)
    if SOFTMAX:
        for l0 in tl.range(0, total.to(tl.int32), LP):
            to_weights(scores_ptr, first, l0 + tl.arange(0, LP), total, base, inverse_of(total_exp))


def forward(
    call: Call,
    kept: dict[int, Tensor],
    keep: bool,
    pads_are_input: bool,
    score_activation: int,
    softmax: bool,
    empty: int,
    pooling: int,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """(pooled (C, D), weights float32 (C, L) or ragged (N,), z of the layers after the first).

    Without pooling, pooled is (C, 0); with a PReLU on the score, the weights are the scores before it.
    kept: z of layers that the moments have made already, by layer; with ``keep`` the others' are made and returned.
    """
    ragged = call.starts is not None
    columns = 0 if pooling == POOL_NONE.value else call.dim
    pooled = call.empty(call.candidates, columns, dtype=call.history.dtype)
    # Ragged: rows outside all segments have a weight too.
    scores = call.empty(call.rows).zero_() if ragged else call.empty(call.candidates, call.length)
    missing = [i for i in range(1, call.layers) if i not in kept]
    start = 0 if missing else call.layers - 1
    if missing and missing[0] > 1:
        start = missing[0] - 1
    z = dict(kept)
    if keep:
        z |= {i: call.empty_rows(call.units[i], pads_are_input) for i in missing}
    if call.candidates == 0:
        return pooled, scores, z
    plan, tile = call.plan, call.plan.forward
    parts = plan.parts
    part = call.empty(parts, call.candidates, call.dim + 2) if parts > 1 else call.none
    with on_device(call.history):
        forward_kernel[(call.blocks(tile), parts)](
            *call.segments,
            *call.first,
            *call.network(z),
            call.bias,
            scores,
            pooled,
            part,
            plan.part_rows,
            **call.tile_flags(tile),
            NA=call.second[0],
            NB=call.second[1],
            LAYERS=call.layers,
            START=start,
            KEEP=sum(1 << i - 1 for i in missing) if keep else 0,
            PARTS=parts > 1,
            PADS=pads_are_input,
            SCORE_ACT=score_activation,
            SOFTMAX=softmax,
            EMPTY=empty,
            POOLING=pooling,
            **call.flags,
            **call.unit_flags,
        )
        if parts > 1 and (softmax or columns):
            merge_kernel[(call.candidates,)](
                *call.segments,
                call.dim,
                scores,
                pooled,
                part,
                parts,
                LP=256,
                BD=min(tiling.power_of_two(call.dim, 16), 128),
                SOFTMAX=softmax,
                POOLING=pooling,
                **OPTIONS,
                **call.flags,
            )
    return pooled, scores, z

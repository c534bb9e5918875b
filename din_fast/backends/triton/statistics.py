"""Batch statistics: mean and M2 of a layer's z over all rows that count.

Each program takes them over the rows of its tile, in two passes in registers; the tiles are merged by Chan's rule in
float64 (:func:`merge`). Never E[z^2] - E[z]^2. The tiles depend on the shape alone, so the bits do too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from din_fast.backends.triton import tiling
from din_fast.backends.triton.arithmetic import (
    DICE_ROW,
    activated_pieces,
    enter_tile,
    first_chunk,
    first_row_statistics,
    load_pieces,
    locate,
    part_end,
    second_layer,
    store_columns,
    store_pieces,
    taking_part,
    third_chunk,
    tile_rows,
)
from din_fast.backends.triton.operands import Call, on_device


@triton.jit
def add_tile(n, mean, m2, z, ok):
    """Chan's rule: count, mean and M2 of n rows, and of the rows of this tile that are ok."""
    here = tl.sum(ok.to(tl.float32), 0)
    tile_mean = tl.sum(tl.where(ok[:, None], z, 0.0), 0) / tl.maximum(here, 1.0)
    d = tl.where(ok[:, None], z - tile_mean[None, :], 0.0)
    delta = tile_mean - mean
    both = tl.maximum(n + here, 1.0)
    return mean + delta * (here / both), m2 + tl.sum(d * d, 0) + delta * delta * (n * here / both)


@triton.jit
def store_moments(mean, m2, at, h, units, mean_ptr, m2_ptr):
    tl.store(mean_ptr + at * units + h, mean, mask=h < units)
    tl.store(m2_ptr + at * units + h, m2, mask=h < units)


@triton.jit
def second_from_history(
    tile,
    folded,
    random,
    p0_ptr,
    units0,
    w1_ptr,
    p1_ptr,
    eps,
    NA: tl.constexpr,
    NB: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    WIDE: tl.constexpr,
    PREC: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FAST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """z of the second layer."""
    rows: tl.constexpr = tile[4].shape[0]
    mean = tl.zeros((rows,), tl.float32)  # row Dice only
    inverse = mean
    if ACT == DICE_ROW:
        mean, inverse = first_row_statistics(tile, folded, p0_ptr, units0, eps, BC, BD, BH, WIDE, PREC, NORM)
    return second_layer(
        tile, folded, mean, inverse, random, p0_ptr, w1_ptr, p1_ptr,
        NA, NB, BC, BD, BH, WIDE, PREC, ACT, NORM, FAST, DROPOUT,
    )  # fmt: skip


@triton.jit
def second_activated(
    tile,
    folded,
    random,
    p0_ptr,
    units0,
    w1_ptr,
    p1_ptr,
    units1,
    eps,
    z1_ptr,
    first,
    pos,
    ok,
    START: tl.constexpr,
    NA: tl.constexpr,
    NB: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    WIDE: tl.constexpr,
    PREC: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FAST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """The activations of the second layer, its z made again (START 0) or read."""
    if START == 0:
        za, zb = second_from_history(
            tile, folded, random, p0_ptr, units0, w1_ptr, p1_ptr, eps,
            NA, NB, BC, BD, BH, WIDE, PREC, ACT, NORM, FAST, DROPOUT,
        )  # fmt: skip
    else:
        za, zb = load_pieces(z1_ptr, first, pos, ok, units1, NA, NB)
    return activated_pieces(za, zb, random, pos, p1_ptr, units1, eps, NA, NB, ACT, NORM, FAST, DROPOUT)


@triton.jit
def moments_kernel(
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
    count_ptr,
    mean_ptr,
    m2_ptr,
    part_rows,
    BC: tl.constexpr,
    LP: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    NA: tl.constexpr,
    NB: tl.constexpr,
    ONE_TILE: tl.constexpr,
    LAYER: tl.constexpr,
    START: tl.constexpr,
    KEEP: tl.constexpr,
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
    """Program = (a tile's candidates, part of part_rows rows): count (programs,), mean and M2 (programs, units).

    LAYER: of which layer. START as in the forward kernel; KEEP: write z of layer LAYER; ONE_TILE: a part is no longer
    than a tile. Rows that take no part are not counted.
    """
    seg = (k_ptr, starts_ptr, lengths_ptr, mask_ptr, users_ptr, candidates, length, rows, user_stride, row_stride)
    folded = (c_ptr, ak_ptr, ap_ptr, hp)
    query = (q_ptr, q_stride)
    c0 = tl.program_id(0).to(tl.int64) * BC
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    begin = tl.program_id(1) * part_rows
    c, pos = tile_rows(c0, begin, BC, LP)
    user, start, first, total, count = locate(seg, c, RAGGED, LENGTHS, GROUPS)
    end = part_end(begin, part_rows, total, BC, LP)
    if BC == 1 and not PADS:
        end = tl.minimum(end, count.to(tl.int32))
    random = (seed_ptr, below, factor, first)
    n = tl.sum(tl.zeros((BC * LP,), tl.float32), 0)
    if LAYER == 1:
        mean_a = tl.zeros((NA,), tl.float32)
        m2_a = mean_a
        mean_b = mean_a
        m2_b = mean_a
        if NB > 0:
            mean_b = tl.zeros((NB,), tl.float32)
            m2_b = mean_b
        for l0 in tl.range(begin, end, LP):
            pos = tile_rows(c0, l0, BC, LP)[1]
            ok = taking_part(seg, user, pos, count, (pos < total) & (pos < end), MASK, PADS)
            tile = enter_tile(seg, start, c, pos, ok, query, dim, BC, BD, WIDE)
            za, zb = second_from_history(
                tile, folded, random, p0_ptr, units0, w1_ptr, p1_ptr, eps,
                NA, NB, BC, BD, BH, WIDE, PREC, ACT, NORM, FAST, DROPOUT,
            )  # fmt: skip
            if KEEP:
                store_pieces(z1_ptr, first, pos, ok, units1, za, zb, NA, NB)
            mean_a, m2_a = add_tile(n, mean_a, m2_a, za, ok)
            if NB > 0:
                mean_b, m2_b = add_tile(n, mean_b, m2_b, zb, ok)
            n += tl.sum(ok.to(tl.float32), 0)
        store_moments(mean_a, m2_a, at, tl.arange(0, NA), units1, mean_ptr, m2_ptr)
        if NB > 0:
            store_moments(mean_b, m2_b, at, NA + tl.arange(0, NB), units1, mean_ptr, m2_ptr)
    else:  # a chunk of units at a time, over all tiles
        width = hp if LAYER == 0 else hp2
        units = units0 if LAYER == 0 else units2
        ok = taking_part(seg, user, pos, count, (pos < total) & (pos < end), MASK, PADS)
        ya = tl.zeros((BC * LP, NA), tl.float32)  # the third layer only
        yb = ya
        if ONE_TILE:
            tile = enter_tile(seg, start, c, pos, ok, query, dim, BC, BD, WIDE)
            if LAYER == 2:
                ya, yb = second_activated(
                    tile, folded, random, p0_ptr, units0, w1_ptr, p1_ptr, units1, eps, z1_ptr, first, pos, ok,
                    START, NA, NB, BC, BD, BH, WIDE, PREC, ACT, NORM, FAST, DROPOUT,
                )  # fmt: skip
        for h0 in tl.range(0, width, BH):
            h = h0 + tl.arange(0, BH)
            n = tl.sum(tl.zeros((BC * LP,), tl.float32), 0)
            mean = tl.zeros((BH,), tl.float32)
            m2 = mean
            for l0 in tl.range(begin, end, LP):
                if not ONE_TILE:
                    pos = l0 + tl.arange(0, LP)
                    ok = taking_part(seg, user, pos, count, pos < end, MASK, PADS)
                    tile = enter_tile(seg, start, c, pos, ok, query, dim, BC, BD, WIDE)
                    if LAYER == 2:
                        ya, yb = second_activated(
                            tile, folded, random, p0_ptr, units0, w1_ptr, p1_ptr, units1, eps, z1_ptr, first, pos, ok,
                            START, NA, NB, BC, BD, BH, WIDE, PREC, ACT, NORM, FAST, DROPOUT,
                        )  # fmt: skip
                if LAYER == 0:
                    z = first_chunk(tile, folded, h, BC, BD, WIDE, PREC)
                else:
                    z = third_chunk(ya, yb, w2_ptr, p2_ptr, hp2, h, NA, NB, PREC)
                    if KEEP:
                        store_columns(z2_ptr, first, pos, ok, units2, z, h)
                mean, m2 = add_tile(n, mean, m2, z, ok)
                n += tl.sum(ok.to(tl.float32), 0)
            store_moments(mean, m2, at, h, units, mean_ptr, m2_ptr)
    tl.store(count_ptr + at, n)


def merge(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chan's rule over all tiles at once, float64: count (), mean (H,), M2 (H,)."""
    n = count.to(torch.float64).unsqueeze(1)
    total = n.sum()
    mean64 = mean.to(torch.float64)
    overall = (n * mean64).sum(0) / total.clamp(min=1)
    return total, overall, m2.to(torch.float64).sum(0) + (n * (mean64 - overall).square()).sum(0)


def moments(
    call: Call, kept: dict[int, Tensor], layer: int, keep: bool, pads_are_input: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(count () float64, mean (H,), M2 (H,), z (rows, H) or None): over all rows of a layer's z that take part.

    kept: z of earlier layers, by layer. z of the first layer is never kept: it is made again wherever it is needed.
    """
    tile, units = call.plan.forward, call.units[layer]
    parts, part_rows = 1, 1 << 30
    if tile.candidates == 1 and call.starts is None:
        parts, part_rows = max(tiling.ceil_div(call.length, tile.positions), 1), tile.positions
    blocks = call.blocks(tile)
    one_tile = call.starts is None
    count, mean, m2 = call.empty(blocks * parts), call.empty(blocks * parts, units), call.empty(blocks * parts, units)
    z = dict(kept)
    keep = keep and layer > 0
    if keep:
        z[layer] = call.empty_rows(units, pads_are_input)
    if blocks:
        with on_device(call.history):
            moments_kernel[(blocks, parts)](
                *call.segments,
                *call.first,
                *call.network(z),
                count,
                mean,
                m2,
                part_rows,
                **call.tile_flags(tile),
                NA=call.second[0],
                NB=call.second[1],
                ONE_TILE=one_tile,
                LAYER=layer,
                START=layer - 1 if layer - 1 in kept else 0,
                KEEP=keep,
                PADS=pads_are_input,
                **call.flags,
                **call.unit_flags,
            )
    total, overall, spread = merge(count, mean, m2)
    return total, overall.float(), spread.float(), z[layer] if keep else None

"""What all kernels share: where the rows of a tile lie, the folded first layer, the activations forward and backward.

A tile is ``BC`` candidates times ``LP`` positions. With one candidate a tile (``BC == 1``) its matrix
``A_k + A_p diag(q)`` is made from A_k and A_p, one chunk of ``BH`` hidden units at a time: it lives for one product.
With several, the product is ``k A_k + (q k) A_p``, twice as long, and no matrix is made.

Every load is widened to float32 at once; the operands of a product have the history's dtype, sums are float32.
Names in capitals are compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The numbering of din_fast/spec.py.
IDENTITY, RELU, SIGMOID, TANH, PRELU, DICE_ROW, DICE_BATCH = (tl.constexpr(i) for i in range(7))
SCORE_NONE, SCORE_SIGMOID, SCORE_PRELU = (tl.constexpr(i) for i in range(3))
POOL_SUM, POOL_MEAN, POOL_MEAN_VALID, POOL_NONE = (tl.constexpr(i) for i in range(4))
EMPTY_ZEROS, EMPTY_UNIFORM, EMPTY_NAN = (tl.constexpr(i) for i in range(3))

# Rows of a layer's table of parameters, float32, one column a hidden unit; operands.py fills it.
BIAS, CENTER, NORM_SCALE, NORM_SHIFT, GATE_SCALE, GATE_SHIFT, SLOPE, SCORE, E0, E1 = (
    tl.constexpr(i) for i in range(10)
)
PARAMETERS = 10

LOG2E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------- sigmoid and tanh
@triton.jit
def fast_tanh(x):
    """The tanh instruction of sm_75 and later, relative error 2^-11; no interpreter runs it."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """FAST: one special-function instruction, for half types on NVIDIA. Else two, and no division: where 2^-x
    overflows, 1/sqrt(inf) = 0 is right."""
    if FAST:
        p = 0.5 * fast_tanh(0.5 * x) + 0.5
    else:
        r = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
        p = r * r
    return p


@triton.jit
def tanh(x):
    """To a few roundings relative to itself: where x is small, and 1 - 2 / (e^2|x| + 1) loses digits, a polynomial
    (S. Moshier's Cephes, tanhf.c)."""
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    return tl.where(size < 0.625, p * s * x + x, tl.where(x < 0.0, -large, large))


@triton.jit
def score_prelu(s, slope):
    """The PReLU on the score."""
    return tl.where(s > 0.0, s, s * slope)


# ---------------------------------------------------------------- dropout
# din_fast/reference.py, dropout_factors, says what its random numbers are. A call's `random` is (pointer to the seed,
# below, factor, first): activations whose number is below `below` are dropped, the others times `factor`; `first` is
# the first row of the history. All is in uint32, whose overflow is meant.
@triton.jit
def mix(x):
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def dropout_rows(random, pos, LAYER: tl.constexpr, DROPOUT: tl.constexpr):
    """What the random numbers of a layer's rows begin with."""
    rows = pos
    if DROPOUT:
        seed_ptr, _, _, first = random
        seed = tl.load(seed_ptr)
        low = mix(seed.to(tl.uint32) ^ LAYER)
        high = mix((seed >> 32).to(tl.uint32) ^ low)
        row = first + pos
        rows = mix(row.to(tl.uint32) ^ low) ^ mix((row >> 32).to(tl.uint32) ^ high)
    return rows


@triton.jit
def dropout_factors(random, rows, h):
    """(rows, h): what dropout multiplies the activations by."""
    _, below, factor, _ = random
    unit = tl.mul((h + 1).to(tl.uint32), 0x9E3779B9, sanitize_overflow=False)
    number = mix(tl.add(rows[:, None], unit[None, :], sanitize_overflow=False))
    return tl.where(number < below, 0.0, factor)


# ---------------------------------------------------------------- segments and tiles
@triton.jit
def locate(seg, c, RAGGED: tl.constexpr, LENGTHS: tl.constexpr, GROUPS: tl.constexpr):
    """Candidate(s) c -> user, first element of its history, first of its rows in (rows, .) buffers, rows, valid rows.

    Starts and lengths come from the caller's device memory: they are clamped, so that nothing is read outside.
    """
    _, starts_ptr, lengths_ptr, _, users_ptr, candidates, length, rows, user_stride, row_stride = seg
    there = c < candidates
    user = c
    if GROUPS:
        user = tl.load(users_ptr + c, mask=there, other=0)
    if RAGGED:
        first = tl.minimum(tl.maximum(tl.load(starts_ptr + user, mask=there, other=0) // row_stride, 0), rows)
        total = tl.minimum(tl.maximum(tl.load(lengths_ptr + user, mask=there, other=0), 0), rows - first)
        start = first * row_stride
        count = total
    else:
        start = user * user_stride
        first = c * length
        total = tl.where(there, length, 0).to(tl.int64)
        count = total
        if LENGTHS:
            count = tl.minimum(tl.maximum(tl.load(lengths_ptr + user, mask=there, other=0), 0), total)
    return user, start, first, total, count


@triton.jit
def tile_rows(c0, l0, BC: tl.constexpr, LP: tl.constexpr):
    """Candidate and position of each row of a tile; one candidate is a scalar."""
    i = tl.arange(0, BC * LP)
    c = c0
    pos = l0 + i
    if BC > 1:
        c = c0 + i // LP
        pos = l0 + i % LP
    return c, pos


@triton.jit
def part_end(begin, part_rows, total, BC: tl.constexpr, LP: tl.constexpr):
    """Where a program's part of a history ends; several candidates a tile have one tile."""
    end = begin + LP
    if BC == 1:
        end = tl.minimum(begin + part_rows, total.to(tl.int32))
    return end


@triton.jit
def is_valid(seg, user, pos, count, MASK: tl.constexpr):
    """Whether a position counts in the scores."""
    mask_ptr = seg[3]
    length = seg[6]
    valid = pos < count
    if MASK:
        valid = valid & (tl.load(mask_ptr + user * length + pos, mask=valid, other=0) != 0)
    return valid


@triton.jit
def taking_part(seg, user, pos, count, inside, MASK: tl.constexpr, PADS: tl.constexpr):
    """Which rows go through the layers: all that there are where pads are input, else those that count."""
    ok = inside
    if not PADS:
        ok = ok & is_valid(seg, user, pos, count, MASK)
    return ok


@triton.jit
def sum_rows(x, BC: tl.constexpr, LP: tl.constexpr):
    """(rows,) -> (BC,), or (rows, columns) -> (BC, columns): the sum over each candidate's rows."""
    if len(x.shape) == 1:
        s = tl.sum(tl.reshape(x, (BC, LP)), 1)
    elif BC == 1:
        s = tl.sum(x, 0)[None, :]
    else:
        s = tl.sum(tl.reshape(x, (BC, LP, x.shape[1])), 1)
    return s


@triton.jit
def to_rows(x, BC: tl.constexpr, LP: tl.constexpr):
    """(BC,) -> one number a row; a single candidate's stays (1,)."""
    if BC > 1:
        x = tl.reshape(tl.broadcast_to(x[:, None], (BC, LP)), (BC * LP,))
    return x


@triton.jit
def count_valid(seg, c0, c, user, total, count, MASK: tl.constexpr, BC: tl.constexpr, LP: tl.constexpr):
    """(BC,) float32: valid positions of each candidate."""
    if MASK or BC > 1:
        n = tl.zeros((BC * LP,), tl.int32)
        stop = seg[6]
        if BC == 1:
            stop = count
        for l0 in tl.range(0, stop, LP):
            pos = tile_rows(c0, l0, BC, LP)[1]
            n += is_valid(seg, user, pos, count, MASK).to(tl.int32)
        found = sum_rows(n, BC, LP).to(tl.float32)
    else:
        found = tl.zeros((1,), tl.float32) + count.to(tl.float32)
    return found


@triton.jit
def pooling_scale(POOLING: tl.constexpr, found, total, BC: tl.constexpr, LP: tl.constexpr):
    """(BC,) the factor of the weighted sum: 1, 1 over all rows, or 1 over the valid ones."""
    if POOLING == POOL_MEAN_VALID:
        scale = 1.0 / tl.maximum(found, 1.0)
    elif POOLING != POOL_MEAN:
        scale = tl.full((BC,), 1.0, tl.float32)
    elif BC == 1:
        scale = tl.zeros((1,), tl.float32) + 1.0 / tl.maximum(total, 1).to(tl.float32)
    else:
        scale = 1.0 / tl.maximum(tl.max(tl.reshape(total, (BC, LP)), 1), 1).to(tl.float32)
    return scale


# ---------------------------------------------------------------- the first layer
@triton.jit
def candidate_chunk(ak, ap, q):
    """A_k + A_p diag(q), (d, h). As a sum over a joined axis: Triton's layout pass would move a conversion above
    ``ak + ap * q``, and every warp would make all of it."""
    return tl.sum(tl.join(ak, ap * q[:, None]), 2)


@triton.jit
def load_rows(k_ptr, start, pos, row_stride, d, ok, dim):
    """The rows of a history at these positions, columns d; zeros where a row is not ok."""
    at = k_ptr + (start + pos.to(tl.int64) * row_stride)[:, None] + d[None, :]
    return tl.load(at, mask=ok[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def load_query(q_ptr, c, q_stride, d, ok, dim, BC: tl.constexpr):
    """q, float32: (d,) of one candidate, (rows, d) of several."""
    if BC == 1:
        q = tl.load(q_ptr + c * q_stride + d, mask=d < dim, other=0.0).to(tl.float32)
    else:
        at = q_ptr + (c * q_stride)[:, None] + d[None, :]
        q = tl.load(at, mask=ok[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)
    return q


@triton.jit
def enter_tile(seg, start, c, pos, ok, query, dim, BC: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """What :func:`first_chunk` needs of a tile: its k and q, or where they are (WIDE: loaded in slices, each time)."""
    k_ptr = seg[0]
    row_stride = seg[9]
    q_ptr, q_stride = query
    d = tl.arange(0, BD)
    k = 0.0
    q = 0.0
    if not WIDE:
        k = load_rows(k_ptr, start, pos, row_stride, d, ok, dim)
        q = load_query(q_ptr, c, q_stride, d, ok, dim, BC)
        if BC > 1:
            q = (k.to(tl.float32) * q).to(k.dtype)
    return k, q, k_ptr, start, pos, row_stride, ok, q_ptr, q_stride, c, dim


@triton.jit
def first_chunk(tile, folded, h, BC: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr):
    """z of the first layer, (rows, h): A_q q + b1, made before, and the product with k."""
    k, q, k_ptr, start, pos, row_stride, ok, q_ptr, q_stride, c, dim = tile
    c_ptr, ak_ptr, ap_ptr, hp = folded
    d = tl.arange(0, BD)
    if WIDE:
        z = tl.zeros((pos.shape[0], h.shape[0]), tl.float32)
        for d0 in tl.range(0, dim, BD, num_stages=2):  # copied to shared memory while the last one is multiplied
            e = d0 + d
            k_slice = load_rows(k_ptr, start, pos, row_stride, e, ok, dim)
            q_slice = load_query(q_ptr, c, q_stride, e, ok, dim, BC)
            w = e[:, None] * hp + h[None, :]
            ak_slice = tl.load(ak_ptr + w, mask=(e < dim)[:, None], other=0.0)
            ap_slice = tl.load(ap_ptr + w, mask=(e < dim)[:, None], other=0.0)
            a = candidate_chunk(ak_slice, ap_slice, q_slice).to(k_slice.dtype)
            z = tl.dot(k_slice, a, z, input_precision=PREC)
    else:
        at = d[:, None] * hp + h[None, :]
        ak = tl.load(ak_ptr + at, mask=(d < dim)[:, None], other=0.0)
        ap = tl.load(ap_ptr + at, mask=(d < dim)[:, None], other=0.0)
        if BC == 1:
            z = tl.dot(k, candidate_chunk(ak, ap, q).to(k.dtype), input_precision=PREC)
        else:
            z = tl.dot(k, ak.to(k.dtype), input_precision=PREC)
            z = tl.dot(q, ap.to(k.dtype), z, input_precision=PREC)
    if BC == 1:
        z += tl.load(c_ptr + c * hp + h)[None, :]
    else:
        z += tl.load(c_ptr + (c * hp)[:, None] + h[None, :], mask=ok[:, None], other=0.0)
    return z


# ---------------------------------------------------------------- activations
@triton.jit
def parameter(p_ptr, hp, row, h):
    """One row of a layer's table, (1, h)."""
    return tl.load(p_ptr + row * hp + h)[None, :]


@triton.jit
def normed(z, p_ptr, hp, h, NORM: tl.constexpr):
    """z through the layer's BatchNorm."""
    if NORM:
        z = (z - parameter(p_ptr, hp, CENTER, h)) * parameter(p_ptr, hp, NORM_SCALE, h)
        z += parameter(p_ptr, hp, NORM_SHIFT, h)
    return z


@triton.jit
def gate(z, n, mean, inverse, p_ptr, hp, h, ACT: tl.constexpr, FAST: tl.constexpr):
    """Dice's p; mean and inverse are those of a row (row Dice)."""
    if ACT == DICE_ROW:
        x = (n - mean[:, None]) * inverse[:, None]
    else:
        x = (z - parameter(p_ptr, hp, CENTER, h)) * parameter(p_ptr, hp, GATE_SCALE, h)
        x += parameter(p_ptr, hp, GATE_SHIFT, h)
    return sigmoid(x, FAST)


@triton.jit
def activation(z, mean, inverse, p_ptr, hp, h, ACT: tl.constexpr, NORM: tl.constexpr, FAST: tl.constexpr):
    """The activation of a chunk of one layer."""
    n = normed(z, p_ptr, hp, h, NORM)
    if ACT == RELU:
        y = tl.where(n < 0.0, 0.0, n)  # NaN stays NaN
    elif ACT == SIGMOID:
        y = sigmoid(n, FAST)
    elif ACT == TANH:
        y = tanh(n)
    elif ACT == PRELU:
        y = tl.where(n > 0.0, n, n * parameter(p_ptr, hp, SLOPE, h))
    elif ACT >= DICE_ROW:
        slope = parameter(p_ptr, hp, SLOPE, h)
        y = n * (gate(z, n, mean, inverse, p_ptr, hp, h, ACT, FAST) * (1.0 - slope) + slope)
    else:
        y = n
    return y


@triton.jit
def activation_gradient(
    z, da, mean, inverse, mean_dx, dot_dx, p_ptr, hp, h, ACT: tl.constexpr, NORM: tl.constexpr, FAST: tl.constexpr
):
    """(y, d n, d x of the gate, d slope, d z but for the answer of batch statistics).

    Dice: y = n f, f = slope + (1 - slope) p:  dn = da f, dx = da n (1 - slope) p (1 - p), d slope = da n (1 - p).
    Row Dice's x depends on all n of its row: dn += inverse (dx - mean of dx - x sum(dx x)), the sums made before
    (mean_dx, dot_dx; inverse = 1 / sqrt(sum (n - mean)^2 + H eps)).
    """
    n = normed(z, p_ptr, hp, h, NORM)
    dx = tl.zeros_like(z)
    d_slope = tl.zeros_like(z)
    if ACT == RELU:
        y = tl.where(n < 0.0, 0.0, n)
        dn = tl.where(n > 0.0, da, 0.0)
    elif ACT == SIGMOID:
        y = sigmoid(n, FAST)
        dn = da * y * (1.0 - y)
    elif ACT == TANH:
        y = tanh(n)
        dn = da * (1.0 - y * y)
    elif ACT == PRELU:
        slope = parameter(p_ptr, hp, SLOPE, h)
        y = tl.where(n > 0.0, n, n * slope)
        dn = tl.where(n > 0.0, da, da * slope)
        d_slope = tl.where(n > 0.0, 0.0, da * n)
    elif ACT >= DICE_ROW:
        slope = parameter(p_ptr, hp, SLOPE, h)
        p = gate(z, n, mean, inverse, p_ptr, hp, h, ACT, FAST)
        f = p * (1.0 - slope) + slope
        y = n * f
        d_slope = da * n * (1.0 - p)
        dx = d_slope * p * (1.0 - slope)
        dn = da * f
        if ACT == DICE_ROW:
            x = (n - mean[:, None]) * inverse[:, None]
            dn += inverse[:, None] * (dx - mean_dx[:, None] - x * dot_dx[:, None])
    else:
        y = n
        dn = da
    dz = dn
    if NORM:
        dz = dn * parameter(p_ptr, hp, NORM_SCALE, h)
    if ACT == DICE_BATCH:
        dz += dx * parameter(p_ptr, hp, GATE_SCALE, h)
    return y, dn, dx, d_slope, dz


@triton.jit
def answered(dz, z, ok, p_ptr, hp, h, ANSWER: tl.constexpr):
    """dz with what flows through the batch statistics, which all rows have a part in; zero where there is no row."""
    if ANSWER:
        answer = (z - parameter(p_ptr, hp, CENTER, h)) * parameter(p_ptr, hp, E1, h) + parameter(p_ptr, hp, E0, h)
        dz = dz - answer
    return tl.where(ok[:, None], dz, 0.0)


@triton.jit
def first_row_statistics(
    tile,
    folded,
    p_ptr,
    units,
    eps,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    WIDE: tl.constexpr,
    PREC: tl.constexpr,
    NORM: tl.constexpr,
):
    """Row Dice on the first layer: mean and 1 / sqrt(sum of squares + H eps) of each row, by Chan's rule."""
    hp = folded[3]
    rows: tl.constexpr = tile[4].shape[0]
    mean = tl.zeros((rows,), tl.float32)
    m2 = tl.zeros((rows,), tl.float32)
    for h0 in tl.range(0, hp, BH):
        h = h0 + tl.arange(0, BH)
        n = normed(first_chunk(tile, folded, h, BC, BD, WIDE, PREC), p_ptr, hp, h, NORM)
        mean, m2 = add_chunk(mean, m2, n, h, h0, units, BH)
    return mean, tl.rsqrt(m2 + units * eps)


@triton.jit
def add_chunk(mean, m2, n, h, h0, units, BH: tl.constexpr):
    """Chan's rule: mean and M2 of each row over h0 units, and then over the units of this chunk too."""
    inside = (h < units)[None, :]
    before = h0 * 1.0
    count = tl.minimum(units - h0, BH) * 1.0
    chunk_mean = tl.sum(tl.where(inside, n, 0.0), 1) / count
    d = tl.where(inside, n - chunk_mean[:, None], 0.0)
    delta = chunk_mean - mean
    both = before + count
    return mean + delta * (count / both), m2 + tl.sum(d * d, 1) + delta * delta * (before * count / both)


# ---------------------------------------------------------------- further layers: the second whole, NA and NB units
@triton.jit
def load_columns(z_ptr, first, pos, ok, units, h):
    """Columns h of the rows of a (rows, units) buffer; zeros beyond the units."""
    at = z_ptr + (first + pos)[:, None] * units + h[None, :]
    return tl.load(at, mask=ok[:, None] & (h < units)[None, :], other=0.0)


@triton.jit
def store_columns(z_ptr, first, pos, ok, units, z, h):
    at = z_ptr + (first + pos)[:, None] * units + h[None, :]
    tl.store(at, z, mask=ok[:, None] & (h < units)[None, :])


@triton.jit
def load_pieces(z_ptr, first, pos, ok, units, NA: tl.constexpr, NB: tl.constexpr):
    """Whole rows of a (rows, units) buffer, in pieces; the second stands for nothing where NB is 0."""
    za = load_columns(z_ptr, first, pos, ok, units, tl.arange(0, NA))
    zb = za
    if NB > 0:
        zb = load_columns(z_ptr, first, pos, ok, units, NA + tl.arange(0, NB))
    return za, zb


@triton.jit
def store_pieces(z_ptr, first, pos, ok, units, za, zb, NA: tl.constexpr, NB: tl.constexpr):
    store_columns(z_ptr, first, pos, ok, units, za, tl.arange(0, NA))
    if NB > 0:
        store_columns(z_ptr, first, pos, ok, units, zb, NA + tl.arange(0, NB))


@triton.jit
def add_bias(z, p_ptr, hp, AT: tl.constexpr, N: tl.constexpr):
    return z + parameter(p_ptr, hp, BIAS, AT + tl.arange(0, N))


@triton.jit
def weight_tile(w_ptr, h, ld: tl.constexpr, AT: tl.constexpr, N: tl.constexpr):
    """Rows h, columns AT.. of a layer's transposed weight, (inputs, units), padded."""
    return tl.load(w_ptr + h[:, None] * ld + (AT + tl.arange(0, N))[None, :])


@triton.jit
def second_layer(
    tile,
    folded,
    mean,
    inverse,
    random,
    p0_ptr,
    w1_ptr,
    p1_ptr,
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
    """z of the second layer from the history: each chunk of the first is activated and multiplied in at once."""
    hp = folded[3]
    dtype = w1_ptr.dtype.element_ty
    rows: tl.constexpr = tile[4].shape[0]
    za = tl.zeros((rows, NA), tl.float32)
    zb = za
    if NB > 0:
        zb = tl.zeros((rows, NB), tl.float32)
    dropout = dropout_rows(random, tile[4], 0, DROPOUT)
    for h0 in tl.range(0, hp, BH):
        h = h0 + tl.arange(0, BH)
        z = first_chunk(tile, folded, h, BC, BD, WIDE, PREC)
        y = activation(z, mean, inverse, p0_ptr, hp, h, ACT, NORM, FAST)
        if DROPOUT:
            y = y * dropout_factors(random, dropout, h)
        y = y.to(dtype)
        za = tl.dot(y, weight_tile(w1_ptr, h, NA + NB, 0, NA), za, input_precision=PREC)
        if NB > 0:
            zb = tl.dot(y, weight_tile(w1_ptr, h, NA + NB, NA, NB), zb, input_precision=PREC)
    za = add_bias(za, p1_ptr, NA + NB, 0, NA)
    if NB > 0:
        zb = add_bias(zb, p1_ptr, NA + NB, NA, NB)
    return za, zb


@triton.jit
def piece_row_statistics(za, zb, p_ptr, units, eps, NA: tl.constexpr, NB: tl.constexpr, NORM: tl.constexpr):
    """Row Dice on a layer that is whole in registers: mean and 1 / sqrt(sum of squares + H eps) of each row."""
    h = tl.arange(0, NA)
    inside = (h < units)[None, :]
    na = normed(za, p_ptr, NA + NB, h, NORM)
    total = tl.sum(tl.where(inside, na, 0.0), 1)
    if NB > 0:
        hb = NA + tl.arange(0, NB)
        inside_b = (hb < units)[None, :]
        nb = normed(zb, p_ptr, NA + NB, hb, NORM)
        total += tl.sum(tl.where(inside_b, nb, 0.0), 1)
    mean = total / units
    d = tl.where(inside, na - mean[:, None], 0.0)
    m2 = tl.sum(d * d, 1)
    if NB > 0:
        d = tl.where(inside_b, nb - mean[:, None], 0.0)
        m2 += tl.sum(d * d, 1)
    return mean, tl.rsqrt(m2 + units * eps)


@triton.jit
def activated_pieces(
    za,
    zb,
    random,
    pos,
    p_ptr,
    units,
    eps,
    NA: tl.constexpr,
    NB: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FAST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """The activations of the second layer, which is whole in registers."""
    ha = tl.arange(0, NA)
    mean = tl.sum(za, 1)  # row Dice only
    inverse = mean
    if ACT == DICE_ROW:
        mean, inverse = piece_row_statistics(za, zb, p_ptr, units, eps, NA, NB, NORM)
    ya = activation(za, mean, inverse, p_ptr, NA + NB, ha, ACT, NORM, FAST)
    dropout = dropout_rows(random, pos, 1, DROPOUT)
    if DROPOUT:
        ya = ya * dropout_factors(random, dropout, ha)
    yb = ya
    if NB > 0:
        hb = NA + tl.arange(0, NB)
        yb = activation(zb, mean, inverse, p_ptr, NA + NB, hb, ACT, NORM, FAST)
        if DROPOUT:
            yb = yb * dropout_factors(random, dropout, hb)
    return ya, yb


@triton.jit
def third_chunk(ya, yb, w_ptr, p_ptr, hp, h, NA: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr):
    """z of a chunk of the third layer from the activations of the second. By chunks, since its whole weight would be
    too large for shared memory."""
    dtype = w_ptr.dtype.element_ty
    ha = tl.arange(0, NA)
    z = tl.dot(ya.to(dtype), tl.load(w_ptr + ha[:, None] * hp + h[None, :]), input_precision=PREC)
    if NB > 0:
        hb = NA + tl.arange(0, NB)
        z = tl.dot(yb.to(dtype), tl.load(w_ptr + hb[:, None] * hp + h[None, :]), z, input_precision=PREC)
    return z + parameter(p_ptr, hp, BIAS, h)


@triton.jit
def piece_score(
    za,
    zb,
    random,
    pos,
    p_ptr,
    units,
    eps,
    NA: tl.constexpr,
    NB: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FAST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """The score of each row, but for its bias, from a last layer that is whole in registers."""
    ya, yb = activated_pieces(za, zb, random, pos, p_ptr, units, eps, NA, NB, ACT, NORM, FAST, DROPOUT)
    s = tl.sum(ya * parameter(p_ptr, NA + NB, SCORE, tl.arange(0, NA)), 1)
    if NB > 0:
        s += tl.sum(yb * parameter(p_ptr, NA + NB, SCORE, NA + tl.arange(0, NB)), 1)
    return s

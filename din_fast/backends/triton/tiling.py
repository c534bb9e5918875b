"""Which kernels' tiles for a call: a pure function of shape, dtype and device limits.

No timing at a first call (din_fast/tune.py takes times when asked to), and nothing that depends on how many
multiprocessors a device has: the same bits on every device of a kind. The sizes were chosen without a GPU, by what the
compiler makes of them: a rule for every size and chip, and tiles.json for the sizes in use where another tile is better
on a chip in the model of time (``python -m bench.gpu_tiles --write``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

MAX_DIM = 512
MAX_FIRST_UNITS = 1024
MAX_UNITS = 256
CHUNK = 16  # hidden units of the first layer made at a time
SHORT = 32  # histories up to this share a tile with others
LONG = 2048  # histories from this are cut into parts where there are few of them
PART_TILES = 4  # tiles of a part at least
PROGRAMS = 512  # enough to fill any device
GROUPS = 256  # partial sums of the weights' gradients
MAX_ROWS, MAX_WARPS = 256, 8  # of a tile that is tried
TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Shape:
    """What the tiles depend on.

    Attributes:
        candidates: C. length: L, or, ragged, the mean length.
        dim: D. hidden_units: of the layers, one at least.
        half: bfloat16 or float16, else float32. tf32: whether float32 products use TF32.
        matrix: whether Triton has the device's matrix unit multiply half types.
        ragged: lengths are known on the device only. row_dice: needs whole rows of a layer.
        grouped: candidates may share a history, which ones is known on the device only.
    """

    candidates: int
    length: int
    dim: int
    hidden_units: tuple[int, ...]
    half: bool = True
    tf32: bool = False
    matrix: bool = True
    ragged: bool = False
    row_dice: bool = False
    grouped: bool = False


@dataclass(frozen=True)
class Limits:
    """What tiles depend on of a device.

    Attributes:
        shared_memory: bytes that a program may have.
        chip: ``sm_90``, ``gfx942``; "" where it is not known.
    """

    shared_memory: int = 99 * 1024
    chip: str = ""


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's tile.

    Attributes:
        candidates, positions: BC and LP; rows of a tile are their product. Powers of two.
        units: BH, hidden units of the first layer a chunk.
        columns: BD, columns of k held or loaded at a time; wide: D is cut into slices of them.
        warps: of a program.
    """

    candidates: int
    positions: int
    units: int
    columns: int
    wide: bool
    warps: int

    @property
    def rows(self) -> int:
        return self.candidates * self.positions


@dataclass(frozen=True)
class Plan:
    """Tiles of a call, and how its rows are cut.

    Attributes:
        name: ``f1`` (one hidden layer), ``f2`` (two or three), ``f3`` (row Dice), ``rows`` (short histories, several
            candidates a tile), ``split`` (long histories, cut into parts that are merged).
        forward, backward: tiles of the forward and the moments, and of the backward's kernels.
        parts, part_rows: of a history in the forward; 1 part where it is not cut.
        groups, group_parts: the weights' gradients are summed by groups of candidates times parts of their histories.
        pieces: the width of each layer after the first as one or two powers of two.
    """

    name: str
    forward: Tile
    backward: Tile
    parts: int
    part_rows: int
    groups: int
    group_parts: int
    pieces: tuple[tuple[int, int], ...]


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pieces(units: int) -> tuple[int, int]:
    """A layer's width as one or two powers of two from 16: 40 -> (32, 16), 80 -> (64, 16), 64 -> (64, 0)."""
    whole = power_of_two(units, 16)
    first = whole // 2
    if first < 16:
        return whole, 0
    rest = power_of_two(units - first, 16)
    return (first, rest) if first + rest < whole else (whole, 0)


def padded(units: int) -> int:
    """The first layer's width in whole chunks."""
    return ceil_div(units, CHUNK) * CHUNK


def too_large(dim: int, hidden_units: Sequence[int]) -> str | None:
    """What is beyond the sizes that the kernels are built for, or None."""
    if dim > MAX_DIM:
        return f"history: expected dim of at most {MAX_DIM} on the triton backend, got {dim}"
    for i, units in enumerate(hidden_units):
        most = MAX_UNITS if i else MAX_FIRST_UNITS
        if units > most:
            return f"hidden_units: expected at most {most} in layer {i} on the triton backend, got {units}"
    return None


def _products(shape: Shape) -> str:
    """What products are made of: operands in a half type, TF32, or float32 outside the matrix unit."""
    if shape.half and shape.matrix:
        return "half"
    return "tf32" if shape.tf32 else "float32"


def _columns(shape: Shape) -> tuple[int, bool]:
    """BD, and whether D is cut into slices: without the matrix unit, or beyond 128, a whole row spills."""
    whole = power_of_two(shape.dim, 16)
    if _products(shape) == "float32" and whole >= 64:
        return (16 if whole == 64 else 32), True
    if whole > 128:
        return 64, True
    return whole, False


def _widest(shape: Shape) -> int:
    """The widest layer after the first, as it is held in registers; 0 where there is none."""
    return max((sum(pieces(u)) for u in shape.hidden_units[1:]), default=0)


def key(shape: Shape) -> str:
    """What the tiles of a whole history's rows depend on, as tiles.json names it."""
    products = _products(shape)
    more = " of half" if shape.half and products != "half" else ""
    more += " row Dice" if shape.row_dice else ""
    more += " long" if shape.length >= LONG else ""
    return f"D {shape.dim} {list(shape.hidden_units)} {products}{more}"


@lru_cache(1)
def _table() -> Mapping[str, Mapping[str, Mapping[str, tuple[int, int]]]]:
    """By chip and :func:`key`: positions and warps of ``forward``, ``backward``, where the rule's are not the best."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def forget() -> None:
    """Read the table again at the next call."""
    _table.cache_clear()


def _listed(chip: str) -> str:
    """The chip in the table whose tiles a chip gets: its own, or its predecessor's (sm_89 has the registers and the
    instructions of sm_86)."""
    if not chip.startswith("sm_"):
        return chip
    number = int(chip[3:])
    older = [
        n for n in (int(c[3:]) for c in _table() if c.startswith("sm_")) if n // 10 == number // 10 and n <= number
    ]
    return f"sm_{max(older)}" if older else chip


def _whole_rows(shape: Shape, chip: str, part: str) -> tuple[int, int]:
    """Positions and warps of a tile of one candidate, for ``forward`` or ``backward``: the table's, else the rule's."""
    found = _table().get(_listed(chip), {}).get(key(shape), {}).get(part)
    if found is not None:
        return found[0], found[1]
    rule = _forward_rows if part == "forward" else _backward_rows
    return rule(shape, _products(shape), power_of_two(shape.dim, 16) <= 64, _widest(shape))


def _forward_tile(shape: Shape, rows: bool, chip: str) -> Tile:
    columns, wide = _columns(shape)
    widest = _widest(shape)
    if rows:
        positions = power_of_two(shape.length)
        total = 64 if columns <= 32 else 32
        candidates = max(total // positions, 16 // positions, 1)
        return Tile(candidates, positions, CHUNK, columns, False, 2 if widest <= 64 else 4)
    positions, warps = _whole_rows(shape, chip, "forward")
    return Tile(1, min(positions, power_of_two(shape.length, 16)), CHUNK, columns, wide, warps)


def _backward_tile(shape: Shape, rows: bool, forward: Tile, chip: str) -> Tile:
    columns, wide = _columns(shape)
    if rows:
        return forward
    positions, warps = _whole_rows(shape, chip, "backward")
    return Tile(1, min(positions, power_of_two(shape.length, 16)), CHUNK, columns, wide, warps)


# Positions of a tile, and warps, after what bench/gpu_tiles.py ranked best in its model on sm_80: many rows a warp,
# until registers run out.
def _forward_rows(shape: Shape, products: str, narrow: bool, widest: int) -> tuple[int, int]:
    if widest > 128:
        return (64 if products == "tf32" and narrow else 32), (4 if products == "half" else 8)
    if widest > 64:
        return 32, (2 if products == "tf32" else 4)
    if products == "half":
        return (128 if widest == 0 and narrow and not shape.row_dice else 64), 2
    if products == "float32":
        return (128 if narrow and widest <= 48 and not _masked(shape) else 64), 4
    if widest == 0 and narrow and not shape.row_dice:
        return 64, 2
    many = narrow and widest <= 48 and not shape.row_dice and shape.length < LONG
    return (128 if many else 64), 4


def _backward_rows(shape: Shape, products: str, narrow: bool, widest: int) -> tuple[int, int]:
    if widest > 128:
        return 32, (4 if products == "half" else 8)
    if products == "float32":
        if narrow and 48 < widest <= 64:
            return 64, 8
        return (64 if narrow and 0 < widest <= 48 and not shape.row_dice else 32), 4
    if widest > 64:
        return (64 if products == "half" and narrow else 32), (2 if narrow else 4)
    if products == "half":
        return (64, 4 if _masked(shape) else 2) if narrow else (128, 8)
    if not narrow:
        return 32, 4
    return (128 if widest <= 48 and not shape.row_dice and not _masked(shape) else 64), 4


def _masked(shape: Shape) -> bool:
    """Whether rows of the history are loaded number by number."""
    return shape.dim % 16 > 0


def plan(shape: Shape, limits: Limits | None = None) -> Plan:
    """The plan of a call; where a device has little shared memory, with tiles of fewer rows.

    Raises:
        ValueError: a size beyond MAX_DIM, MAX_FIRST_UNITS or MAX_UNITS, or beyond the device's shared memory.
    """
    message = too_large(shape.dim, shape.hidden_units)
    if message is not None:
        raise ValueError(message)
    limits = limits or Limits()
    short = _is_short(shape)
    forward = _fit(shape, _forward_tile(shape, short, limits.chip), limits.shared_memory)
    backward = _backward_tile(shape, short, forward, limits.chip)
    return cut(shape, forward, _fit(shape, backward, limits.shared_memory))


def cut(shape: Shape, forward: Tile, backward: Tile) -> Plan:
    """The plan of a call with these tiles: how its rows are cut."""
    parts, part_rows = 1, 1 << 30
    if not shape.ragged and shape.length >= LONG and shape.candidates < PROGRAMS:
        tiles = ceil_div(shape.length, forward.positions)
        per_part = max(ceil_div(tiles * shape.candidates, PROGRAMS), PART_TILES)
        parts, part_rows = ceil_div(tiles, per_part), per_part * forward.positions
    groups = min(ceil_div(shape.candidates, backward.candidates), GROUPS)
    group_parts = max(1, min(parts, GROUPS // max(groups, 1)))
    usual = "f3" if shape.row_dice else "f1" if len(shape.hidden_units) == 1 else "f2"
    name = "split" if parts > 1 else "rows" if _is_short(shape) else usual
    widths = tuple(pieces(u) for u in shape.hidden_units[1:])
    return Plan(name, forward, backward, parts, part_rows, groups, group_parts, widths)


def choices(shape: Shape, limits: Limits | None = None) -> tuple[list[Tile], list[Tile]]:
    """Tiles to try in place of a plan's, for the forward and for the backward, its own first: half and twice as many
    rows and warps. All are within the device's shared memory, and give the same results but for rounding."""
    usual = plan(shape, limits)
    return _around(shape, usual.forward, limits), _around(shape, usual.backward, limits)


def _around(shape: Shape, tile: Tile, limits: Limits | None) -> list[Tile]:
    limit = (limits or Limits()).shared_memory
    found = [tile]
    for rows, warps in product((1.0, 0.5, 2.0), repeat=2):
        near = replace(tile, warps=int(tile.warps * warps))
        if _is_short(shape):  # a candidate's positions are in one tile
            near = replace(near, candidates=int(tile.candidates * rows))
        else:
            near = replace(near, positions=int(tile.positions * rows))
        useful = near.candidates >= 1 and 16 <= near.rows <= MAX_ROWS and 1 <= near.warps <= MAX_WARPS
        if useful and near not in found and shared_memory(shape, near) <= limit:
            found.append(near)
    return found


def _is_short(shape: Shape) -> bool:
    """Whether histories share a tile with others."""
    return shape.length <= SHORT and not (shape.ragged or shape.grouped or _columns(shape)[1])


def _fit(shape: Shape, tile: Tile, limit: int) -> Tile:
    """The tile, with as many rows as shared memory allows."""
    while shared_memory(shape, tile) > limit:
        if tile.rows <= 16:
            raise ValueError(
                f"history, hidden_units: expected tiles of at most {limit} bytes of shared memory on this device, got "
                f"{shared_memory(shape, tile)} for dim {shape.dim} and hidden units {list(shape.hidden_units)}"
            )
        if tile.candidates > 1:
            tile = replace(tile, candidates=tile.candidates // 2)
        else:
            tile = replace(tile, positions=tile.positions // 2)
    return tile


def shared_memory(shape: Shape, tile: Tile) -> int:
    """Bytes of shared memory that a program takes at most: the operands of the products of the first layer, both ways
    round, and of the layer after it. tests/test_ahead_of_time.py holds what the compiler takes to this bound."""
    columns = slice_columns(shape, tile)
    first = 2 * tile.rows * columns + 2 * tile.units * columns + tile.rows * tile.units
    later = max(((tile.rows + tile.units) * sum(pieces(u)) for u in shape.hidden_units[1:]), default=0)
    return (2 if shape.half else 4) * (first + later)


def slice_columns(shape: Shape, tile: Tile) -> int:
    """Columns of k whose gradients a program of the backward makes."""
    return min(power_of_two(shape.dim, 16), 128) if tile.wide else tile.columns

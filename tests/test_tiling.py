"""The Triton kernels' tiles as data: which plan a call gets, and that its sizes are ones the kernels can have."""

from __future__ import annotations

import json
from itertools import product

import pytest

from din_fast.backends.triton import tiling
from din_fast.backends.triton.tiling import Limits, Shape, padded, pieces, plan


def shape(
    length: int = 100, dim: int = 64, hidden: tuple[int, ...] = (80,), candidates: int = 4096, **more: bool
) -> Shape:
    return Shape(candidates, length, dim, hidden, **more)


def test_without_a_matrix_unit_half_types_go_in_slices_as_float32_does() -> None:
    for dim in (64, 128):
        calls = [shape(dim=dim, hidden=(80, 40), half=half, matrix=False) for half in (True, False)]
        half, full = (plan(call, Limits(227 << 10)) for call in calls)
        assert half == full and half.forward.wide and half.backward.wide
        assert not plan(shape(dim=dim, hidden=(80, 40))).forward.wide


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (shape(), "f1"),
        (shape(hidden=(80, 40)), "f2"),
        (shape(hidden=(80, 40, 16)), "f2"),
        (shape(row_dice=True), "f3"),
        (shape(length=20), "rows"),
        (shape(length=33), "f1"),
        (shape(length=20, ragged=True), "f1"),  # the longest is not known on the host
        (shape(length=20, half=False), "f1"),  # float32 without the matrix unit: D in slices
        (shape(length=20, dim=16, half=False), "rows"),
        (shape(length=10_000, candidates=8), "split"),
        (shape(length=10_000), "f1"),  # enough samples to fill a device
    ],
)
def test_the_plan_of_a_call(call: Shape, name: str) -> None:
    assert plan(call).name == name


def test_candidates_that_share_a_history_share_no_tile() -> None:
    call = Shape(512, 20, 64, (80,), grouped=True)
    assert plan(call).name == "f1" and plan(call).forward.candidates == 1


@pytest.mark.parametrize(
    ("units", "found"),
    [(1, (16, 0)), (16, (16, 0)), (17, (32, 0)), (36, (32, 16)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)),
     (100, (128, 0)), (200, (256, 0)), (144, (128, 16)), (256, (256, 0))],
)  # fmt: skip
def test_a_width_is_one_or_two_powers_of_two(units: int, found: tuple[int, int]) -> None:
    assert pieces(units) == found


def test_the_first_layer_is_padded_to_whole_chunks_only() -> None:
    assert [padded(n) for n in (1, 16, 36, 80, 129)] == [16, 16, 48, 80, 144]


LENGTHS, DIMS = (1, 7, 20, 33, 100, 1000, 10_000), (1, 4, 10, 36, 64, 128, 200, 512)
HIDDEN = ((4,), (36,), (80, 40), (256, 128), (16, 8, 4), (1024, 256, 256))


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("half", [True, False])
def test_every_tile_is_one_that_triton_takes(half: bool, hidden: tuple[int, ...]) -> None:
    """Powers of two; no side of a product under 16; every row in a part, every column in a slice."""
    for length, dim, candidates, ragged, row in product(
        LENGTHS, DIMS, (1, 3, 600, 70_000), (False, True), (False, True)
    ):
        call = shape(length, dim, hidden, candidates, half=half, ragged=ragged, row_dice=row)
        found = plan(call, Limits(232_448))
        for tile in (found.forward, found.backward):
            assert all(n & (n - 1) == 0 for n in (tile.candidates, tile.positions, tile.units, tile.columns))
            assert min(tile.rows, tile.units, tile.columns) >= 16
            assert tile.candidates == 1 or (tile.positions >= length and not tile.wide)
            assert tile.wide or tile.columns >= dim
        assert found.parts == 1 or found.parts * found.part_rows >= length > (found.parts - 1) * found.part_rows
        assert 1 <= found.groups * found.group_parts <= tiling.GROUPS
        for units, (first, second) in zip(hidden[1:], found.pieces, strict=True):
            assert first + second >= units


def test_the_plan_is_a_function_of_its_arguments() -> None:
    assert plan(shape()) == plan(shape()) and plan(shape()) != plan(shape(dim=128))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (shape(dim=513), "dim of at most 512 on the triton backend, got 513"),
        (shape(hidden=(1025,)), "at most 1024 in layer 0 on the triton backend, got 1025"),
        (shape(hidden=(80, 257)), "at most 256 in layer 1 on the triton backend, got 257"),
    ],
)
def test_sizes_beyond_the_kernels(call: Shape, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan(call)


@pytest.mark.parametrize("length", [8, 100])
@pytest.mark.parametrize(("dim", "hidden"), [(128, (256, 128)), (512, (1024, 256, 256)), (64, (80, 40))])
def test_a_device_with_less_shared_memory_gets_tiles_of_fewer_rows(
    dim: int, hidden: tuple[int, ...], length: int
) -> None:
    """48 KiB a program is what every CUDA device has."""
    call = shape(length, dim, hidden, half=True)
    usual, small = plan(call), plan(call, Limits(48 * 1024))
    for tile, smaller in ((usual.forward, small.forward), (usual.backward, small.backward)):
        assert tiling.shared_memory(call, smaller) <= 48 * 1024
        assert smaller.rows <= tile.rows and smaller.columns == tile.columns
    narrow = plan(shape(100, 128, (256, 128), half=False), Limits(52_000))
    assert narrow.backward.rows == 16 and plan(shape(100, 128, (256, 128), half=False)).backward.rows == 32


def test_a_device_with_too_little_shared_memory() -> None:
    with pytest.raises(
        ValueError, match=r"expected tiles of at most 1000 bytes .* got \d+ for dim 64 and hidden units"
    ):
        plan(shape(), Limits(1000))


def test_a_chip_has_the_tiles_of_the_table_where_the_rules_are_not_the_best() -> None:
    call = shape(hidden=(80, 40), half=False, tf32=True)
    assert tiling.key(call) == "D 64 [80, 40] tf32"
    rule = plan(call)
    for chip in ("sm_100", "sm_103"):  # the newer one of the same generation has no tiles of its own
        found = plan(call, Limits(99 * 1024, chip))
        assert (found.forward.positions, found.forward.warps) == (64, 2) != (rule.forward.positions, rule.forward.warps)
    for chip in ("", "sm_75", "sm_999", "gfx90a"):
        assert plan(call, Limits(99 * 1024, chip)) == rule
    other = shape(hidden=(80, 41), half=False, tf32=True)
    assert plan(other, Limits(99 * 1024, "sm_100")) == plan(other)


def test_the_table_has_tiles_that_the_kernels_can_have() -> None:
    table = json.loads(tiling.TABLE.read_text())
    assert table
    for sizes in table.values():
        for size, parts in sizes.items():
            assert size.startswith("D ") and parts and parts.keys() <= {"forward", "backward"}
            for positions, warps in parts.values():
                assert 16 <= positions <= tiling.MAX_ROWS and 1 <= warps <= tiling.MAX_WARPS
                assert positions & (positions - 1) == 0 and warps & (warps - 1) == 0

"""Tuned tiles, without a GPU: which are tried, which win, and what the backend makes of the file.

That results do not depend on the tiles is tested in tests/interpreter, where kernels run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from din_fast import tune
from din_fast.backends.triton import tiling, tuned
from din_fast.backends.triton.tiling import Limits, Shape, Tile, choices, plan, shared_memory

CPU = torch.device("cpu")
CALL = Shape(512, 100, 64, (80, 40))
LIMITS = Limits()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that the backend is told to read; it is not there yet."""
    monkeypatch.setattr(tuned, "_told", set())
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "new" / "tiles.json"))
    tuned.forget()
    yield tmp_path / "new" / "tiles.json"
    tuned.forget()


def another(shape: Shape = CALL) -> tuned.Pair:
    """The last of the choices, which is not the usual one."""
    forward, backward = choices(shape, LIMITS)
    return forward[-1], backward[-1]


# ---------------------------------------------------------------- which tiles


@pytest.mark.parametrize("memory", [48 * 1024, 99 * 1024, 227 * 1024])
@pytest.mark.parametrize("half", [True, False])
def test_tiles_to_try_are_ones_that_the_kernels_take(half: bool, memory: int) -> None:
    """Powers of two around the usual tile, which comes first; 16 rows at least; within the device's memory."""
    limits = Limits(memory)
    for length, dim, hidden, row in product(
        (1, 7, 20, 100, 5000), (4, 36, 64, 128), ((4,), (80, 40), (256, 128)), (0, 1)
    ):
        shape = Shape(300, length, dim, hidden, half=half, row_dice=bool(row))
        try:
            usual = plan(shape, limits)
        except ValueError:  # beyond this device
            continue
        for tiles, first in zip(choices(shape, limits), (usual.forward, usual.backward), strict=True):
            assert tiles[0] == first and len(set(tiles)) == len(tiles) <= 9
            for tile in tiles:
                assert all(n & (n - 1) == 0 for n in (tile.candidates, tile.positions, tile.warps))
                assert 16 <= tile.rows <= 256 and 1 <= tile.warps <= 8
                assert tile.candidates == 1 or tile.positions >= length
                assert (tile.units, tile.columns, tile.wide) == (first.units, first.columns, first.wide)
                assert tile == first or shared_memory(shape, tile) <= memory


def test_there_is_a_choice() -> None:
    forward, backward = choices(CALL, Limits(227 * 1024))
    assert {t.rows for t in forward} == {32, 64, 128} and {t.warps for t in forward} == {1, 2, 4}
    assert len(backward) > 3
    short = replace(CALL, length=20)
    assert {t.candidates for t in choices(short, LIMITS)[0]} == {1, 2} and plan(short).name == "rows"


def test_a_plan_with_other_tiles_is_cut_by_them() -> None:
    long = Shape(4, 5000, 16, (36,))
    usual, forward = plan(long), replace(plan(long).forward, positions=32)
    found = tiling.cut(long, forward, usual.backward)
    assert found.name == "split" and found.part_rows % 32 == 0
    assert found.parts * found.part_rows >= 5000 > (found.parts - 1) * found.part_rows
    assert tiling.cut(long, usual.forward, usual.backward) == usual


# ---------------------------------------------------------------- the file


def test_a_saved_choice_is_used_for_its_shape_alone(file: Path) -> None:
    assert tuned.plan(CALL, LIMITS, CPU) == plan(CALL, LIMITS)
    pair = another()
    tuned.save(file, CALL, CPU, pair)
    found = tuned.plan(CALL, LIMITS, CPU)
    assert (found.forward, found.backward) == pair and found != plan(CALL, LIMITS)
    larger = replace(CALL, candidates=513)
    assert tuned.plan(larger, LIMITS, CPU) == plan(larger, LIMITS)
    tuned.save(file, larger, CPU, another(larger))
    assert len(json.loads(file.read_text())["tiles"]) == 2 and list(file.parent.iterdir()) == [file]
    assert tuned.plan(CALL, LIMITS, CPU) == found


def test_a_choice_is_for_one_gpu_and_the_versions_that_made_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake")
    cuda = torch.device("cuda", 0)
    assert re.match(r"NVIDIA Fake, din_fast \S+, triton \S+, \(512, 100, 64, \(80, 40\),", tuned.key(CALL, cuda))
    tuned.save(file, CALL, cuda, another())
    assert tuned.plan(CALL, LIMITS, cuda).forward == another()[0]
    assert tuned.plan(CALL, LIMITS, CPU) == plan(CALL, LIMITS)
    for name, value in (("__version__", "0"), ("triton.version", lambda: "0")):
        with monkeypatch.context() as m:
            m.setattr(f"din_fast.backends.triton.tuned.{name}", value)
            tuned.forget()
            assert tuned.plan(CALL, LIMITS, cuda) == plan(CALL, LIMITS)
    tuned.forget()


def test_on_the_cpu_no_file_is_read_unless_the_variable_is_set(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake")
    cuda = torch.device("cuda", 0)
    assert tuned.cache_path() == file.parent / ".cache" / "din_fast" / "tiles.json"
    for device in (CPU, cuda):
        tuned.save(tuned.cache_path(), CALL, device, another())
    assert tuned.plan(CALL, LIMITS, CPU) == plan(CALL, LIMITS)
    assert tuned.plan(CALL, LIMITS, cuda).forward == another()[0]


def _choice(**changes: Any) -> str:
    forward, backward = (asdict(tile) for tile in another())
    return json.dumps(
        {"format": tuned.FORMAT, "tiles": {tuned.key(CALL, CPU): {"forward": forward | changes, "backward": backward}}}
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "\udcff",
        '{"tiles": {}}',
        json.dumps({"format": tuned.FORMAT, "tiles": 3}),
        json.dumps({"format": tuned.FORMAT, "tiles": {tuned.key(CALL, CPU): 7}}),
        json.dumps({"format": tuned.FORMAT, "tiles": {tuned.key(CALL, CPU): {"forward": {}}}}),
        _choice(positions=4096),
        _choice(positions="64"),
        _choice(colour="red"),
    ],
)
def test_a_broken_or_foreign_file_is_ignored_with_one_warning(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning, match=r"din_fast uses its usual tiles: .*tiles\.json") as told:
        assert tuned.plan(CALL, LIMITS, CPU) == plan(CALL, LIMITS)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.forget()
        assert tuned.plan(CALL, LIMITS, CPU) == plan(CALL, LIMITS)


def test_a_number_of_another_type_is_mended(file: Path) -> None:
    """1.0 is 1 in JSON, but not in a kernel."""
    file.parent.mkdir()
    file.write_text(_choice(candidates=1.0))
    assert type(tuned.plan(CALL, LIMITS, CPU).forward.candidates) is int


# ---------------------------------------------------------------- the times


def _tiles(n: int) -> list[Tile]:
    return [replace(plan(CALL).forward, warps=1 << i) for i in range(n)]


def test_the_fastest_tile_wins_unless_it_is_noise() -> None:
    one, two, three = _tiles(3)
    assert tune.fastest({one: 1.0, two: 0.9, three: 0.95}) == two
    assert tune.fastest({one: 1.0, two: 0.99}) == one


def test_medians_of_turns_leave_out_what_does_not_compile() -> None:
    one, two, three = _tiles(3)
    times = {one: iter([99.0, 1.0, 2.0, 9.0]), three: iter([99.0, 4.0, 3.0, 1.0])}
    order = []

    def time(tile: Tile) -> float:
        order.append(tile)
        if tile == two:
            raise OutOfResources(2, 1, "registers")
        return next(times[tile])

    assert tune.medians([one, two, three], time, 3) == {one: 2.0, three: 3.0}
    assert order == [one, two, three, *[one, three] * 3]
    with pytest.raises(OutOfResources):
        tune.medians([two, one], time, 3)


def test_tiles_are_chosen_one_after_the_other() -> None:
    """On calls that only ask for their plan: the forward's by the forward, the backward's with that one."""
    forwards, backwards = choices(CALL, LIMITS)
    asked: list[tuned.Pair] = []
    lines: list[str] = []

    def call() -> None:
        found = tuned.plan(CALL, LIMITS, CPU)
        asked.append((found.forward, found.backward))

    def milliseconds(run: Any) -> float:
        run()
        return 1.0 if asked[-1] in ((forwards[2], backwards[0]), (forwards[2], backwards[1])) else 2.0

    shape, device, tiles = tune.tune(call, call, milliseconds, lines.append, rounds=1)
    assert (shape, device, tiles) == (CALL, CPU, (forwards[2], backwards[0]))
    assert asked[0] == (forwards[0], backwards[0])
    assert set(asked) == {(f, backwards[0]) for f in forwards} | {(forwards[2], b) for b in backwards}
    assert [line for line in lines if line.startswith("*")] == [
        f"* forward    1 x {forwards[2].positions:3} rows, {forwards[2].warps} warps    1.0000 ms",
        f"* backward   1 x {backwards[0].positions:3} rows, {backwards[0].warps} warps    1.0000 ms",
    ]
    assert tuned.plan(CALL, LIMITS, CPU) == plan(CALL, LIMITS)


def test_a_call_that_no_tile_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match="forward: expected a call of the triton backend, got none"):
        tune.tune(lambda: None, lambda: None)


# ---------------------------------------------------------------- the command


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    command = [sys.executable, "-m", "din_fast.tune", "--batch", "8", "--length", "20", "--dim", "16"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"no tiles were timed: torch sees neither CUDA nor ROCm\n", done.stderr)

"""bench/gpu_model.py counts what a kernel does as often as it runs; bench/gpu_tiles.py ranks tiles by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_tiles
from bench.ahead_of_time import Compiler
from bench.gpu_model import BOUNDS, GPUS, Work, bounds, macs, shared_bytes, source_loops
from bench.gpu_report import Row, Size, Task, compile_all
from bench.gpu_tiles import Search, Trial
from bench.machine_code import CHIPS
from din_fast.backends.triton.tiling import CHUNK, Tile

NOTHING = Work(0, 0, 0, 0, 0, 0, 0, 0, 1)


# ---------------------------------------------------------------- instructions
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("HMMA.16816.F32.BF16", 2048),
        ("HMMA.1688.F32.TF32", 1024),
        ("HMMA.1684.F32.TF32", 512),
        ("HGMMA.64x16x16.F32.BF16", 16 * 16 * 16),  # a quarter: four warps share it
        ("v_mfma_f32_16x16x16_bf16", 4096),
        ("v_mfma_f32_32x32x8_f16", 8192),
        ("UTCHMMA", None),
    ],
)
def test_multiplications_of_the_matrix_unit(name: str, found: int | None) -> None:
    assert macs(name) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("LDS.128", 16),
        ("STS.U16", 2),
        ("LDS", 4),
        ("LDSM.16.MT88.4", 16),
        ("SHFL.BFLY", 4),
        ("ds_read_b128", 16),
        ("ds_bpermute_b32", 4),
        ("LDG.E.128", 0),
    ],
)
def test_bytes_of_shared_memory(name: str, found: int) -> None:
    assert shared_bytes(name) == found


# ---------------------------------------------------------------- bounds
def test_all_chips_are_known() -> None:
    assert set(GPUS) == set(CHIPS)


@pytest.mark.parametrize(
    ("done", "what", "kind", "microseconds"),
    [
        (replace(NOTHING, memory=2039e3), "memory", "bfloat16", 1),
        (replace(NOTHING, l2=7200e3), "L2", "bfloat16", 1),
        (replace(NOTHING, matrix=1024 * 108 * 1410), "matrix", "bfloat16", 1),
        (replace(NOTHING, matrix=1024 * 108 * 1410), "matrix", "tf32", 2),
        (replace(NOTHING, matrix=1024 * 108 * 1410), "matrix", "float32", 0),  # not done there
        (replace(NOTHING, instructions=4 * 108 * 1410), "issue", "tf32", 1),
        (replace(NOTHING, fma=2 * 108 * 1410), "float32", "tf32", 1),
        (replace(NOTHING, special=108 * 1410 / 2), "special", "tf32", 1),
        (replace(NOTHING, l1=128 * 108 * 1410), "L1", "tf32", 1),
        (replace(NOTHING, clocks=1410, waves=3), "latency", "tf32", 3),
    ],
)
def test_what_each_bound_takes_on_an_a100(done: Work, what: str, kind: str, microseconds: float) -> None:
    found = bounds(done, 80, kind, 32)
    assert tuple(found) == BOUNDS
    assert found[what] == pytest.approx(microseconds)
    assert all(found[other] == 0 for other in BOUNDS if other != what)


# ---------------------------------------------------------------- compiled
@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int | str, Row]]:
    """The kernel of a call without gradient, D 64, [80, 40], 64 histories of 100, by chip."""
    with pytest.MonkeyPatch.context() as environment, Compiler() as compiler:
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        size = Size(64, (80, 40), batch=64, training=False)
        tasks = [Task(size, "bfloat16", 80), Task(size, "bfloat16", "gfx942"), Task(size, "tf32", 90)]
        yield {f.task.capability: f.inference[0] for f in compile_all(tasks, compiler, lambda what: None)}


def padded(row: Row) -> int:
    """Positions with those that fill the last tile."""
    positions = int(row.tile.split("x")[1])
    return 64 * -(-100 // positions) * positions


@pytest.mark.parametrize("chip", [80, "gfx942"])
def test_products_are_counted_as_often_as_they_run(forward: dict[int | str, Row], chip: int | str) -> None:
    """Loops inside loops, on both vendors: exactly the multiplications of both layers (40 units in pieces of 32 and 16)
    and of the pooling, where the weight is 16 rows."""
    row = forward[chip]
    assert row.work is not None
    assert row.work.matrix == padded(row) * (64 * 80 + 80 * (32 + 16) + 16 * 64)


def test_special_functions_are_counted_as_often_as_they_run(forward: dict[int | str, Row]) -> None:
    """One tanh a hidden unit in half types; a square root and an exponential in float32."""
    for chip, each in ((80, 1), (90, 2)):
        row = forward[chip]
        assert row.work is not None
        assert row.work.special * 32 == pytest.approx(padded(row) * (80 + 48) * each, rel=1e-3)


def test_bytes(forward: dict[int | str, Row]) -> None:
    """Device memory: the history, once; what goes through L2 is that and the candidates' part, but no weights."""
    row = forward[80]
    assert row.work is not None
    history = 64 * 100 * 64 * 2
    assert history < row.work.memory < 1.4 * history
    assert history < row.work.l2 < 4 * history < row.work.l1


def test_every_loop_of_the_kernels_is_found() -> None:
    found = source_loops()
    assert {f.file for f in found} >= {"arithmetic.py", "forward.py", "backward.py", "statistics.py"}
    assert {f.variable for f in found} >= {"l0", "h0", "d0", "c1", "i"}


# ---------------------------------------------------------------- tiles
TASK = Task(Size(16, (36,)), "bfloat16", 80)
KEY = "D 16 [36] half"


def trial(rows: int, time: float, bad: int = 0, own: bool = False) -> Trial:
    return Trial(Tile(1, rows, CHUNK, 16, False, 2), own, time, bad)


def found(*trials: Trial) -> Search:
    return Search(TASK, "forward", KEY, sorted(trials, key=lambda t: (t.given_up, t.rank)))


def test_the_best_tile_passes_and_is_modelled_fastest() -> None:
    fast, slow, spills = trial(64, 10), trial(32, 12, own=True), trial(128, 5, bad=3)
    ranked = found(spills, slow, fast)
    assert ranked.trials == [fast, slow, spills]
    assert "1x64, 2 warps" in str(ranked.not_best())
    assert found(replace(fast, own=True), replace(slow, own=False)).not_best() is None
    assert found(fast, trial(32, 10.5, own=True)).not_best() is None  # the model cannot tell them apart
    assert found(fast, trial(128, 5, bad=1, own=True)).not_best() is not None


def test_the_best_is_written_where_it_is_not_taken(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    table.write_text("{}")
    gpu_tiles.write([found(trial(64, 10, own=True), trial(32, 12))], table)
    assert json.loads(table.read_text()) == {"sm_80": {}}
    gpu_tiles.write([found(trial(64, 10), trial(32, 12, own=True))], table)
    gpu_tiles.write(
        [replace(found(trial(64, 10), trial(32, 12, own=True)), part="backward", key="D 8 [36] tf32")], table
    )
    assert json.loads(table.read_text()) == {
        "sm_80": {KEY: {"forward": [64, 2]}, "D 8 [36] tf32": {"backward": [64, 2]}}
    }


def test_tiles_are_compiled_and_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another tile is compiled, and given up as soon as it is worse than what din_fast takes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_tiles, "ROWS_AND_WARPS", ((16, 2),))
    assert gpu_tiles.main(["--sizes", "D 16 [36]", "--types", "bfloat16", "--chips", "sm_80"]) == 0
    told = capsys.readouterr().out
    assert "1x128, 2 warps *" in told and "1x16, 2 warps" in told and "2 tiles, 0 are not the best" in told
    assert "> " in told

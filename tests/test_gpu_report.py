"""bench/machine_code.py reads machine code; bench/gpu_report.py compiles kernels and holds them to its gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from bench import gpu_report
from bench.ahead_of_time import Compiler, captured, compile_launch
from bench.gpu_model import BOUNDS, Work
from bench.gpu_report import (
    CALLS,
    MAIN,
    MOST_OUTSIDE,
    Found,
    Row,
    Size,
    Task,
    calls_table,
    different,
    failures,
    gate,
    names,
    pin,
    read_pinned,
    report,
    table,
)
from bench.machine_code import (
    CHIPS,
    Code,
    Place,
    Source,
    amdgcn,
    is_matrix,
    is_special,
    is_spill,
    least_spills,
    load_bits,
    number,
    occupancy,
    sass,
    summary,
)
from din_fast.backends.triton import tiling

HISTORY = Source("k.py", 10, 12)
SASS = """
.text.some_kernel:
\t//## File "/a/k.py", line 3
        /*0000*/                   STL [R1], R2 ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
\t//## File "/a/k.py", line 11
        /*0020*/               @P1 LDG.E.128 R4, desc[UR4][R2.64] ;
\t//## File "/a/k.py", line 30 inlined at "/a/j.py", line 7
\t//## File "/a/j.py", line 7
        /*0030*/                   LDL.64 R6, [R1] ;
.L_x_1:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R6, R4 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/               @P3 CALL.REL.NOINC `(.L_x_2) ;
        /*0090*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*00a0*/                   FADD R1, R1, R1 ;
.L_x_3:
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""
AMD = """
some_kernel:
\t.loc\t1 5 3                          ; k.py:5:3
\ts_cbranch_scc1 .LBB0_3
; %bb.1:
\t.loc\t1 12 3 is_stmt 0               ; k.py:12:3 @[ j.py:7:5 ]
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t1 13 3                         ; k.py:13:3
\tv_mfma_f32_16x16x16_bf16 v[2:5], v[2:3], v[6:7], 0
\tv_exp_f32_e32 v1, v1
\tbuffer_load_ushort v0, v107, s[68:71], 0 offen
\tscratch_load_dword v1, off, s33 offset:4 ; 4-byte Folded Reload
\ts_cbranch_scc0 .LBB0_2
.LBB0_3:
\tscratch_store_dword off, v1, s33
\ts_endpgm
.Lfunc_end0:
    .vgpr_count:     77
\ts_nothing_of_this
"""
GOOD = Code(96, 1024, 2, 100, 90, (90,), 0, 16, {"HMMA.16816": 4}, 3, {128: 1}, {128: 2})


BOUND = dict.fromkeys(BOUNDS, 0.0) | {"issue": 2.0, "L1": 3.0}
WORK = Work(1e6, None, 2e6, 0, 0, 8e6, 4e6, 0, 1)


def made(capability: int | str = 80, kind: str = "bfloat16", products: bool = True, code: Code | None = GOOD) -> Row:
    return Row(capability, "D 64 [8]", kind, "forward", "1x64", products, True, code=code, work=WORK, bounds=BOUND)


# ---------------------------------------------------------------- text
def test_sass_is_read() -> None:
    found = sass(SASS)
    assert [i.loops for i in found] == [(), (), (0,), (0,), *[(0, 1)] * 4, (0,), (0,), (), (), ()]
    assert (found[2].name, found[2].at, found[2].predicated) == ("LDG.E.128", (Place("k.py", 11),), True)
    assert found[3].at == (Place("k.py", 30), Place("j.py", 7))  # a function that line 7 called
    assert [i.again for i in found if i.again is not None] == [1, 0]
    code = summary(found, 255, 512, 2, HISTORY)
    assert (code.instructions, code.looped, code.loops) == (13, 8, (8, 4))
    assert (code.spills_looped, code.spills_outside, code.special) == (1, 1, 1)
    assert (code.matrix, code.loads, code.history) == ({"HMMA.16816": 1}, {16: 1}, {128: 1})


def test_amdgcn_is_read() -> None:
    found = amdgcn(AMD)
    assert [i.loops for i in found] == [(), (), *[(0,)] * 5, (), ()]
    assert found[1].at == (Place("k.py", 12), Place("j.py", 7)) and found[6].again == 0
    code = summary(found, number(r"\.vgpr_count:", AMD), 0, 1, HISTORY)
    assert (code.registers, code.loops, code.spills_looped, code.spills_outside) == (77, (5,), 1, 1)
    assert (code.matrix, code.special) == ({"v_mfma_f32_16x16x16": 1}, 1)
    assert (code.loads, code.history) == ({16: 1}, {128: 1})


def test_a_cold_block_behind_the_loop_that_jumps_back_is_no_loop() -> None:
    text = """
        /*0000*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0010*/                   EXIT ;
.L_x_1:
        /*0020*/                   STL [R1], R2 ;
        /*0030*/                   BRA `(.L_x_0) ;
"""
    assert all(i.loops == () for i in sass(text))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.U8", 8),
        ("LDG.E.64.CONSTANT", 64),
        ("LDGSTS.E.BYPASS.128", 128),
        ("LDS.128", None),
        ("global_load_dwordx2", 64),
        ("global_load_lds_dword", 32),
        ("buffer_load_sbyte", 8),
        ("s_load_dwordx4", None),
    ],
)
def test_widths_of_loads(name: str, bits: int | None) -> None:
    assert load_bits(name) == bits


def test_kinds_of_instructions() -> None:
    matrix = ["HMMA.1688.F32.TF32", "HGMMA.64x16x16.F32.BF16", "UTCHMMA", "v_mfma_f32_32x32x8_f16"]
    assert all(map(is_matrix, matrix)) and not any(map(is_matrix, ["FFMA", "HFMA2.MMA", "v_fma_f32"]))
    assert all(map(is_special, ["MUFU.TANH", "v_rsq_f32_e32"])) and not is_special("v_add_f32_e32")
    assert all(map(is_spill, ["STL.128", "LDL", "scratch_load_dwordx4"])) and not is_spill("LDG.E")


def test_a_missing_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected REG: and a number, got 'STACK:1'"):
        number("REG:", "STACK:1")


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "share", "limit"),
    [
        (80, 96, 0, 2, 20 / 64, "registers"),
        (80, 255, 0, 2, 8 / 64, "registers"),
        (80, 32, 20 << 10, 2, 14 / 64, "shared memory"),
        (80, 16, 0, 1, 32 / 64, "programs"),
        (86, 32, 0, 4, 48 / 48, "warps"),
        (75, 64, 65 << 10, 4, 0, "shared memory"),
        ("gfx942", 128, 0, 4, 16 / 32, "registers"),
    ],
)
def test_occupancy(chip: int | str, registers: int, shared: int, warps: int, share: float, limit: str) -> None:
    found = occupancy(CHIPS[chip], registers, shared, warps)
    assert (found.share, found.limit) == (share, limit)


# ---------------------------------------------------------------- the gate
@pytest.mark.parametrize(
    ("row", "what"),
    [
        (made(code=replace(GOOD, spills_looped=1)), "local loads and stores in loops"),
        (made(code=replace(GOOD, spills_outside=17)), "local loads and stores outside loops"),
        (made(86, code=replace(GOOD, shared=100 << 10)), "bytes of shared memory"),
        (made(code=replace(GOOD, matrix={})), "products without the matrix unit"),
        (made("gfx942", kind="float16", code=replace(GOOD, matrix={})), "products without the matrix unit"),
        (made(code=replace(GOOD, history={64: 1, 128: 1})), "narrow loads of the history"),
        (replace(made(), streams=True), "loads of the history that are waited for"),
        (made(code=None), "does not compile"),
    ],
)
def test_the_gate_tells_what_fails(row: Row, what: str) -> None:
    (reason,) = gate([made(), row], {})
    assert reason.startswith(row.key) and what in reason
    assert list(failures(row)) == [what]


def test_what_the_gate_lets_pass() -> None:
    none = replace(GOOD, matrix={})
    rows = [made(), made(75, "float16", code=none), made(kind="float32", code=none), made(products=False, code=none)]
    assert gate(rows, {}) == []
    assert gate([replace(made(chip), streams=True) for chip in (75, "gfx942")], {}) == []  # cannot copy so
    assert gate([replace(made(code=replace(GOOD, copies=1)), streams=True)], {}) == []
    assert gate([replace(made(), wide=False, code=replace(GOOD, history={16: 4}))], {}) == []


def test_pins(tmp_path: Path) -> None:
    """A pinned row may not get worse, nor fail in another way; others' pins stay."""
    path = tmp_path / "pins.json"
    assert read_pinned(path) == {}
    bad, other = made(code=replace(GOOD, spills_looped=5)), made(90, code=replace(GOOD, spills_looped=7))
    pin([bad, other], path)
    assert gate([bad, other], read_pinned(path)) == []
    (worse,) = gate([made(code=replace(GOOD, spills_looped=6))], read_pinned(path))
    assert "6 local loads and stores in loops, pinned 5" in worse
    assert len(gate([made(code=replace(GOOD, spills_looped=5, spills_outside=20))], read_pinned(path))) == 1
    pin([made()], path)
    assert set(read_pinned(path)) == {other.key}


def found_of(*rows: Row) -> Found:
    return Found(Task(Size(64, (8,)), rows[0].kind, rows[0].capability), [], list(rows))


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bad = made(90, code=replace(GOOD, spills_looped=5))
    text = report([found_of(made()), found_of(bad)], "some command", "This run: some sizes.")
    assert "some command" in text and triton.__version__ in text and "No GPU has run these kernels" in text
    cells = "forward | 1x64, 2 | 96 | 31%, registers | 1.0 | 0, 16 | HMMA.16816 x 4 | 3 | 128 x 1 | 128 x 2 | 100, 90 |"
    assert cells + " 3, L1 |" in table([made()])[2]
    assert "- sm_90, D 64 [8], bfloat16, forward: 5 local loads and stores in loops" in text

    monkeypatch.setattr(gpu_report, "run", lambda todo, console: [found_of(made()), found_of(bad)])
    files = ["--quick", "--out", str(tmp_path / "r.md"), "--pins", str(tmp_path / "p.json")]
    assert gpu_report.main(files) == 1
    assert bad.key in capsys.readouterr().out
    assert gpu_report.main([*files, "--pin"]) == 0
    assert "the main sizes, sm_80, sm_90" in (tmp_path / "r.md").read_text()


def test_a_call_is_the_sum_of_its_kernels() -> None:
    """Modelled time, the bounds, and per position: two kernels of 1e6 instructions of 32 lanes, 409600 positions."""
    (line,) = calls_table([found_of(made(), made())])[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    told = dict(zip(CALLS, cells, strict=True))
    assert (told["call"], told["modelled us"], told["issue us"], told["L1 us"]) == ("without gradient", "6", "4", "6")
    assert (told["binds most"], told["matrix"]) == ("L1, 100%", "?")
    assert (told["a position: issue"], told["float32"]) == ("156", "312")
    assert (told["L2 bytes"], told["memory bytes"]) == ("39", "20")


def test_a_kernel_stands_once_a_chip() -> None:
    """Another size in the same type that makes the same code is not told again."""
    again = replace(made(), size="D 64 [9]", kernel="forward 2")
    other = replace(made(), size="D 64 [9]", code=replace(GOOD, special=4))
    assert different([found_of(made(), again), found_of(other, made(90))]) == [made(), other, made(90)]


# ---------------------------------------------------------------- compiled
@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new cache for Triton: it neither reads nor writes the user's."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_a_tile_that_spills_fails(cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(64, (36,), batch=4, training=False)
    huge = tiling.Tile(1, 256, tiling.CHUNK, 64, False, 1)
    monkeypatch.setattr(tiling, "_forward_tile", lambda shape, rows, chip: huge)
    (launch,) = gpu_report.calls(size, "bfloat16", 80).inference
    compiled = compile_launch(launch, 80)
    found = gpu_report.row(compiled, size, "bfloat16", "forward")
    assert found.tile == "1x256" and found.code is not None
    assert MOST_OUTSIDE < least_spills(compiled.kernel) <= found.code.spills_looped + found.code.spills_outside
    assert failures(found)["local loads and stores in loops"] > 100
    assert any("local loads and stores in loops" in reason for reason in gate([found], {}))


def test_a_subset_passes(cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main size on sm_90 and two small ones: no kernel fails that is not pinned."""
    if not gpu_report.judged():
        pytest.skip("the pins are of another triton than this, which is reported and not judged")
    monkeypatch.setattr(gpu_report, "KINDS", {90: ("bfloat16",), 80: ("tf32",), "gfx942": ("bfloat16",)})
    told: list[str] = []
    todo = gpu_report.tasks(MAIN[:1], [90]) + gpu_report.tasks(MAIN[3:], [80, "gfx942"])
    with Compiler() as compiler:
        rows = different(gpu_report.compile_all(todo, compiler, told.append))
    assert gate(rows, read_pinned()) == []
    assert len(told) == 3 and {r.capability for r in rows} == {80, 90, "gfx942"}
    assert {"moments", "forward", "layer", "history", "score_gradient"} <= {r.kernel for r in rows}
    for r in rows:
        assert r.code is not None
        assert r.code.instructions > r.code.looped >= 0 and 0 < r.code.registers <= 512
        assert set(r.bounds) == set(BOUNDS) and r.modelled > 0, r.key
        assert r.products == bool(r.code.matrix)
        if r.kernel in ("moments", "history", "score_gradient"):
            assert sum(r.code.history.values()) > 0, r.key


def test_a_call_that_raises_is_a_row_that_fails() -> None:
    """float32 at D 128, [512, 256] has no tile of 64 KiB."""
    todo = [gpu_report.Task(Size(128, (512, 256), batch=2), "float32", 75)]
    with Compiler() as compiler:
        (found,) = different(gpu_report.compile_all(todo, compiler, lambda what: None))
    assert "65536 bytes of shared memory" in str(found.error)
    assert failures(found) == {"does not compile": 1}


def test_names_count_a_kernels_launches() -> None:
    called = gpu_report.calls(Size(16, (16, 8), batch=2), "float32", 86)
    assert names(called.training)[:3] == ["moments", "moments 2", "forward"]
    assert names(called.inference) == ["forward"]
    assert captured(lambda: None) == []

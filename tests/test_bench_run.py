"""The benchmark's command: no speed without parity, the rows, the comparison, the figures, the README's tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import (
    cases,
    compare,
    contenders,
    limits,
    memory,
    models,
    parity,
    peak,
    peers,
    plot,
    readme,
    report,
    scaling,
    timing,
)
from bench.contenders import CANDIDATES, FORWARD, TRAINING, Case
from bench.parity import Check
from bench.report import Row
from tests.test_bench import Broken, broken_group, contenders_build

PEAK = peak.Peak(threads=2, clock=3.0, gflops=100.0, lanes=8, dice=5.0, memory=20.0)
TINY: tuple[int, int, int, tuple[int, ...]] = (5, 9, 6, (7, 5))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Tiny shapes, eager in place of compiled contenders, short turns, a peak and a memory that are not measured."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    monkeypatch.setattr(timing, "alternate", partial(timing.alternate, seconds=0.001))
    monkeypatch.setattr(timing, "ATTEMPTS", 1)
    monkeypatch.setattr(command, "THREADS", 1)
    monkeypatch.setattr(parity, "check", lambda case, group, seeds, tick: check(case, group, 2, tick))
    monkeypatch.setattr(peak, "measure", lambda threads: replace(PEAK, threads=threads))
    monkeypatch.setattr(memory, "megabytes", lambda case, mode, providers, *rest: dict.fromkeys(providers, 2.0))
    monkeypatch.setattr(cases, "SHAPES", dict.fromkeys(cases.SHAPES, TINY))
    monkeypatch.setattr(cases, "CONFIGURATIONS", ((4, (5, 3)),))
    monkeypatch.setattr(cases, "SERVE", Case("rechub", 4, 9, 6, (7, 5)))
    monkeypatch.setattr(cases, "SWEEP", Case("fuxictr", *TINY))
    monkeypatch.setattr(cases, "SWEPT", {"batch": (2, 4), "length": (8, 16), "dim": (3, 6)})
    monkeypatch.setattr(cases, "SWEPT_CANDIDATES", (2, 4))
    monkeypatch.setattr(models, "measure", partial(models.measure, size=16, length=7))
    monkeypatch.setattr(models, "check", partial(models.check, size=16, length=7))


check = parity.check


def bench(out: Path, *arguments: str, backend: str = "reference") -> list[Row]:
    """The rows of a run that must be green."""
    assert command.main([*arguments, "--backend", backend, "--out", str(out)]) == 0
    return report.read_csv(out)


@pytest.mark.parametrize("mode", [FORWARD, TRAINING, CANDIDATES])
def test_red_parity_tells_no_speed(
    mode: str, tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contenders, "build", partial(broken_group, "output"))
    out = tmp_path / "rows.csv"
    assert command.main(["--quick", "--modes", mode, "--backend", "reference", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert " RED," in printed and "no speed is told" in printed
    assert "milliseconds" not in printed and "times din_fast" not in printed
    assert not out.exists()


def test_another_contender_whose_parity_is_red_is_left_out(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(case: Case, *backends: str) -> list[contenders.Contender]:
        host, *others = contenders_build(case, *backends)
        broken = [replace(c, run=Broken(c.run, "output")) if c.provider == "folded, eager" else c for c in others]
        return [host, *broken]

    monkeypatch.setattr(contenders, "build", build)
    rows = bench(tmp_path / "rows.csv", "--quick", "--modes", FORWARD)
    printed = capsys.readouterr().out
    assert " RED," in printed and "left out, as their parity is red: folded, eager" in printed
    providers = {row.provider for row in rows if row.metric == report.MILLISECONDS}
    assert "folded, eager" not in providers and {"din_fast", "fuxictr, eager", "folded, torch.compile"} <= providers


def test_a_red_case_hides_the_speed_of_the_cases_before_it(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(case: Case, *backends: str) -> list[contenders.Contender]:
        broken = case.preset == "rechub"
        return broken_group("output", case, *backends) if broken else contenders_build(case, *backends)

    monkeypatch.setattr(contenders, "build", build)
    out = tmp_path / "rows.csv"
    assert command.main(["--quick", "--threads", "1", "2", "--backend", "reference", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert ") green," in printed and ") RED," in printed and "milliseconds" not in printed
    assert not out.exists()


def test_a_red_model_tells_no_speed(
    backend: str, tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def everything(model: Any, *rest: Any) -> parity.Results:
        found = whole(model, *rest)
        if next(model.parameters()).dtype == torch.float32 and found["training output"].numel():
            calls.append(model)
            if len(calls) % 2 == 0:  # the fused one
                found["gradient " + next(n for n, _ in model.named_parameters())] *= 1.01
        return found

    calls: list[Any] = []
    whole = models.everything
    monkeypatch.setattr(models, "everything", everything)
    out = tmp_path / "rows.csv"
    assert command.main(["--quick", "--modes", "models", "--backend", backend, "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "torch-rechub DIN RED," in printed and "milliseconds" not in printed and not out.exists()


def test_a_quick_run_writes_all_columns_and_metrics(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "rows.csv"
    rows = bench(out, "--quick")
    printed = capsys.readouterr().out
    assert printed.count(" green,") == 5 and "RED" not in printed and "uses no reference backend" in printed
    timed = [row for row in rows if row.metric == report.MILLISECONDS]
    assert len(timed) == (2 * 2 * 2 + 1) * 5  # presets, shapes, modes, and the candidates; contenders
    assert {(row.x_name, row.x_value) for row in timed} == {("shape", "s3"), ("shape", "s5"), ("serve", "64")}
    assert {row.backend for row in timed if row.provider == "din_fast"} == {"reference"}
    assert all(0 < row.p20 <= row.value <= row.p80 for row in timed)
    with out.open(newline="") as f:
        assert all(all(line[name] for name in line if name != "backend") for line in csv.DictReader(f) if line["mode"])


def metrics_of(rows: list[Row], x_name: str, mode: str) -> dict[str, Row]:
    """din_fast's rows of the first case of that kind, by metric."""
    chosen = [row for row in rows if (row.x_name, row.mode, row.provider) == (x_name, mode, "din_fast")]
    return {row.metric: row for row in chosen if row.shape == chosen[0].shape and row.preset == chosen[0].preset}


def test_the_full_run_has_everything(backend: str, tiny: None, tmp_path: Path) -> None:
    rows = bench(tmp_path / "rows.csv", backend=backend)
    assert {row.x_name for row in rows} == {"", "shape", "configuration", "small batch", "serve", "model"}
    assert {row.preset for row in rows} == {"", *peers.PACKAGES}
    fuxictr = {row.x_value for row in rows if row.preset == "fuxictr" and row.x_name == "shape"}
    recbole = {row.x_value for row in rows if row.preset == "recbole"}
    assert fuxictr == {"s1", "s2", "s3", "s4", "s5"} and recbole == {"s3", "s5"}
    assert {row.backend for row in rows if row.provider == "din_fast"} == {backend}
    case = Case("fuxictr", *TINY)
    for mode in (FORWARD, TRAINING):
        found = metrics_of(rows, "shape", mode)
        seconds = 1e-3 * found[report.MILLISECONDS].value
        work, moved = cases.flops(case, mode), cases.moved_bytes(case, mode)
        assert found[report.SAMPLES].value == pytest.approx(case.batch / seconds, rel=1e-4)
        assert found[report.BANDWIDTH].value == pytest.approx(1e-9 * moved / seconds, rel=1e-4)
        assert found[report.FMA_SHARE].value == pytest.approx(work / seconds / (1e9 * PEAK.gflops), rel=1e-4)
        assert found[report.SAMPLES].p20 <= found[report.SAMPLES].value <= found[report.SAMPLES].p80
        assert found[report.MEBIBYTES].value == 2.0
    told = {row.metric: row for row in rows if row.x_name == "model" and row.provider == "din_fast"}
    assert set(told) == {report.MILLISECONDS, report.SAMPLES, report.UNIT_SHARE}
    assert 0 < told[report.UNIT_SHARE].value < 1


def test_several_backends_and_numbers_of_threads(backend: str, tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    arguments = ["--quick", "--modes", FORWARD, "--threads", "1", "2", "--backend", backend, "reference"]
    assert command.main([*arguments, "--out", str(out)]) == 0
    rows = [row for row in report.read_csv(out) if row.backend]
    assert {(row.provider, row.backend, row.threads) for row in rows} == {
        (name, of, threads)
        for name, of in (("din_fast", backend), ("din_fast, reference", "reference"))
        for threads in (1, 2)
    }


def test_a_sweep_adds_to_the_rows(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    before = bench(out, "--quick")
    rows = bench(out, "--sweep", "--threads", "2", "1")
    assert {row.key for row in before} <= {row.key for row in rows}
    assert len({row.key for row in rows}) == len(rows)
    assert {row.x_name for row in rows} - {row.x_name for row in before} == {
        *("batch", "length", "dim", "candidates", "threads")
    }
    providers = {row.provider for row in rows if row.x_name == "length"}
    assert providers == {"fuxictr, eager", "folded, torch.compile", "din_fast"}
    printed = capsys.readouterr().out
    assert "exponent of the time" in printed and "threads at s3" in printed
    assert {line[2] for line in scaling.threads(rows)} == {"1", "2"}


def test_rows_of_another_machine_are_not_added_to(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    bench(out, "--quick", "--modes", FORWARD)
    monkeypatch.setattr(report, "processor", lambda: "Another")
    for option in ("--sweep", f"--compare={out}"):
        with pytest.raises(SystemExit) as stopped:
            command.main([option, "--backend", "reference", "--out", str(out)])
        assert stopped.value.code == 2
        assert "the processor differs" in capsys.readouterr().err


def test_a_comparison_with_what_was_just_measured(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    rows = bench(out, "--quick", "--modes", FORWARD)
    report.write_csv(tmp_path / "old.csv", [replace(row, value=row.value / 1000) for row in rows])
    bench(out, "--quick", "--modes", FORWARD, "--compare", str(tmp_path / "old.csv"))
    printed = capsys.readouterr().out
    assert "4 of 4 rows of din_fast differ by more than 5%" in printed and "slower" in printed
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        command.main(["--compare", str(tmp_path / "other.csv"), "--backend", "reference"])
    assert "expected the columns" in capsys.readouterr().err


def test_the_command_refuses_a_backend_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("din_fast.backends.native.why_not", lambda: "no compiler was found")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--quick"])
    assert stopped.value.code == 2
    assert "no compiler was found" in capsys.readouterr().err


# ---------------------------------------------------------------- rows that were not measured


def row(provider: str, value: float, **fields: Any) -> Row:
    """A row of s3 with the native backend for din_fast."""
    told = Row(
        provider=provider,
        preset="fuxictr",
        mode=FORWARD,
        metric=report.MILLISECONDS,
        shape="(512, 100, 64, [80, 40])",
        x_name="shape",
        x_value="s3",
        value=value,
        p20=0.9 * value,
        p80=1.1 * value,
        rounds=7,
        disturbed=1,
        backend="native" if provider == "din_fast" else "",
        instruction_set="avx2",
        threads=2,
        processor="A processor",
        versions="din_fast=0.1.0 torch=2.13.0",
        timestamp="2026-01-01T00:00:00+00:00",
    )
    return replace(told, **fields)


def some_rows() -> list[Row]:
    """All kinds of rows; din_fast is 6 and 2 times as fast at s3, 1.2 times as fast as the folded form at s5."""
    found = []
    for name, ms in {"s3": (6.0, 4.0, 2.0, 1.0), "s5": (24.0, 8.0, 1.2, 1.0)}.items():
        for provider, value in zip(plot.LADDER, ms, strict=True):
            found += [row(provider, value, x_value=name), row(provider, 3 * value, x_value=name, mode=TRAINING)]
    for x_name in ("batch", "length", "dim", "candidates"):
        mode = CANDIDATES if x_name == "candidates" else TRAINING
        for provider, power in {"fuxictr, eager": 1.5, "folded, torch.compile": 1.0, "din_fast": 0.5}.items():
            for x in (2, 8, 32):
                told = {"x_name": x_name, "x_value": str(x), "mode": mode, "shape": f"{x_name} {x}"}
                found.append(row(provider, 3.0 * x**power, **told))
                found.append(row(provider, float(x), metric=report.MEBIBYTES, **told))
    for provider, took in (("original", 10.0), ("din_fast", 4.0)):
        told = {"x_name": "model", "x_value": "torch-rechub DIN", "mode": models.TRAINING, "preset": "rechub"}
        metrics = {report.MILLISECONDS: took, report.SAMPLES: 1e4 / took, report.UNIT_SHARE: took / 12}
        found += [row(provider, value, metric=metric, **told) for metric, value in metrics.items()]
    for count, took in ((1, 1.9), (2, 1.0)):
        found.append(row("din_fast", took, x_name="threads", x_value=str(count), threads=count))
    return found


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    report.write_csv(tmp_path / "rows.csv", some_rows())
    assert report.read_csv(tmp_path / "rows.csv") == some_rows()


def test_of_rows_of_one_thing_the_new_one_stays() -> None:
    old, other, new = row("din_fast", 1.0), row("din_fast", 2.0, mode=TRAINING), row("din_fast", 3.0, disturbed=0)
    assert report.merged([old, other], [new]) == [new, other]


def test_a_comparison_finds_what_became_slower() -> None:
    old = [row("din_fast", 1.0), row("din_fast", 3.0, mode=TRAINING), row("fuxictr, eager", 6.0)]
    new = [row("din_fast", 1.06), row("din_fast", 3.1, mode=TRAINING), row("fuxictr, eager", 60.0)]
    assert compare.changes(old, new) == [(old[0], new[0])]
    assert compare.changes(old, [row("din_fast", 0.9)]) == [(old[0], row("din_fast", 0.9))]
    assert compare.changes(old, [row("din_fast", 2.0, threads=1)]) == []
    assert compare.changes(old, [row("din_fast", 2.0, metric=report.SAMPLES)]) == []


@pytest.mark.parametrize(
    ("here", "sets", "reason"),
    [
        ("A processor", {"native": "avx2"}, None),
        ("Another", {"native": "avx2"}, "the processor differs: A processor there, Another here"),
        ("A processor", {"native": "avx512"}, "the instruction set of native differs: avx2 there, avx512 here"),
        ("A processor", {"reference": "avx2"}, "it has no rows of din_fast on reference"),
    ],
)
def test_rows_of_another_machine_are_refused(here: str, sets: dict[str, str], reason: str | None) -> None:
    assert compare.objection(some_rows(), here, sets) == reason


def test_exponents() -> None:
    assert scaling.exponents(some_rows()) == [
        ("training", "fuxictr, eager", "1.50", "1.50", ""),
        ("training", "folded, torch.compile", "1.00", "1.00", ""),
        ("training", "din_fast", "0.50", "0.50", ""),
        ("candidates", "fuxictr, eager", "", "", "1.50"),
        ("candidates", "folded, torch.compile", "", "", "1.00"),
        ("candidates", "din_fast", "", "", "0.50"),
    ]
    assert scaling.threads(some_rows())[-1] == ("forward", "din_fast", "2", "1.00", "1.90")


def test_the_readme_is_rewritten_between_its_marks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = "# A title\n\ntext\n", "\n\nmore \\1 text\n"
    path = tmp_path / "README.md"
    path.write_text(f"{before}{readme.MARKS[0]}\nstale\n{readme.MARKS[1]}{after}")
    report.write_csv(tmp_path / "rows.csv", some_rows())
    readme.main(["--rows", "rows.csv"])
    once = path.read_text()
    assert once.startswith(before + readme.MARKS[0]) and once.endswith(readme.MARKS[1] + after) and "stale" not in once
    readme.main(["--rows", "rows.csv"])
    assert path.read_text() == once
    assert "![" not in once
    plot.main(["--rows", "rows.csv"])
    readme.main(["--rows", "rows.csv"])
    assert "](ladder.png)" in path.read_text() and "](sweeps.png)" in path.read_text()
    path.write_text("no marks")
    with pytest.raises(ValueError, match="nothing was written"):
        readme.main(["--rows", "rows.csv"])
    assert path.read_text() == "no marks"


def test_what_the_readme_tells() -> None:
    text = readme.text(some_rows(), [])
    assert "| 1 | 6 (x 6.00) | 4 (x 4.00) |  | 2 (x 2.00) |" in text
    # The geometric means: of 6 and 24, of 2 and 1.2.
    assert f"| fuxictr, s3, s5 | forward | 12.00 | {math.sqrt(2.4):.2f} |" in text
    assert "(shape s5): x 1.20" in text and "(shape s3)" not in text
    assert "(batch 2): x 1.41" in text and "not faster" not in text
    assert "| torch-rechub DIN | (512, 100, 64, [80, 40]) | training | 10.0 -> 4.0 | 2.50 |" in text
    slower = [replace(r, value=2 * r.value) if r.provider == "din_fast" else r for r in some_rows()]
    assert "(shape s3): x 1.00, not faster" in readme.text(slower, [])


def test_the_repository_s_readme_has_the_marks() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [text.count(mark) for mark in readme.MARKS] == [1, 1]


def test_figures_are_drawn_of_rows_alone(tmp_path: Path) -> None:
    without_sweeps = [row for row in some_rows() if row.x_name not in plot.SWEEPS]
    for rows, drawn in ((some_rows(), {"ladder", "sweeps"}), (without_sweeps, {"ladder"})):
        report.write_csv(tmp_path / "rows.csv", rows)
        plot.main(["--rows", str(tmp_path / "rows.csv")])
        assert {name for name, path in plot.paths(tmp_path).items() if path.exists()} == drawn
        for name in drawn:
            assert plot.paths(tmp_path)[name].read_bytes().startswith(b"\x89PNG")
            plot.paths(tmp_path)[name].unlink()


# ---------------------------------------------------------------- work, peak, memory, models


def test_flops_and_bytes_by_hand() -> None:
    case = Case("fuxictr", 3, 5, 2, (4, 3))
    # A position: 2 * 4 + 4 * 3 + 3 for the layers, 2 for the pooling; a candidate's matrix: 2 * 4.
    forward = 2 * (3 * 5 * (8 + 12 + 3 + 2) + 3 * 8)
    assert cases.flops(case, FORWARD) == cases.flops(case, CANDIDATES) == forward == 798
    assert cases.flops(case, TRAINING) == 3 * forward
    assert cases.moved_bytes(case, FORWARD) == 4 * (3 * 5 * 2 + 3 * 2)
    assert cases.moved_bytes(case, TRAINING) == 4 * (2 * 3 * 5 * 2 + 3 * 2)
    assert cases.moved_bytes(case, CANDIDATES) == 4 * (5 * 2 + 3 * 2)


def test_the_floor_is_the_operations_and_activations_at_the_machine_s_rates() -> None:
    case = contenders.Case("fuxictr", 3, 5, 2, (4, 6))
    assert contenders.Case.of("fuxictr", case.shape) == case
    products = 2 * 3 * (5 * (2 * 4 + 4 * 6 + 6 + 2) + 2 * 4)
    assert limits.floor(case, FORWARD, 100.0, 5.0) == pytest.approx(1e-6 * (products / 100 + 3 * 5 * 10 / 5))
    assert limits.floor(case, TRAINING, 100.0, 5.0) == pytest.approx(1e-6 * (3 * products / 100 + 2 * 3 * 5 * 10 / 5))


def test_what_the_passes_of_a_training_step_move() -> None:
    rows = 3 * 16  # 5 positions, in rows of 16
    assert cases.traffic(contenders.Case("fuxictr", 3, 5, 2, (4,))) == 4 * rows * (6 * 2 + 5 * 4)
    assert cases.traffic(contenders.Case("fuxictr", 3, 5, 2, (4, 6))) == 4 * rows * (6 * 2 + 5 * 10 + 3 * 4)


def test_the_peak_s_loop_compiles_and_runs() -> None:
    if peak.compiler() is None:
        pytest.skip("no C++ compiler was found")
    found = peak.measure(1)
    assert isinstance(found, peak.Peak), found
    assert found.gflops > 0 and 0.3 < found.clock < 10 and found.lanes in (8, 16) and found.threads == 1
    assert 0.01 < found.dice < found.gflops and 0.1 < found.memory < 1000


def test_the_width_of_the_data_path() -> None:
    assert peak.judge(2, 3.0, 190.0, 192.0, 9.0, 20.0) == peak.Peak(2, 3.0, 192.0, 8, 9.0, 20.0)
    full = peak.judge(2, 3.0, 190.0, 380.0, 9.0, 20.0)
    assert full == peak.Peak(2, 3.0, 380.0, 16, 9.0, 20.0) and full.share == pytest.approx(380 / 384)
    assert "under 90%" not in str(full) and "under 90%" in str(peak.judge(2, 3.0, 150.0, 150.0, 9.0, 20.0))


def test_without_a_compiler_the_share_is_left_out(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    monkeypatch.setattr(peak, "compiler", lambda: None)
    monkeypatch.setattr(peak, "measure", measure_peak)
    rows = bench(tmp_path / "rows.csv", "--quick", "--modes", FORWARD, backend=backend)
    assert "no C++ compiler was found" in capsys.readouterr().out
    metrics = {row.metric for row in rows}
    assert report.FMA_SHARE not in metrics and report.BANDWIDTH in metrics
    assert not [row for row in rows if row.provider == report.MACHINE]


measure_peak: Callable[[int], peak.Peak | str] = peak.measure


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "compiler", lambda: "false")
    assert peak.measure(1) == "FMA peak: not measured, as false failed: no message"


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
def test_memory_of_a_fresh_process(mode: str, backend: str) -> None:
    if not memory.STATUS.exists():
        pytest.skip("the peak of a process's memory is told by Linux's /proc only")
    case = Case("fuxictr", 64, 100, 32, (16,))
    names = ["fuxictr, eager", "folded, eager", "din_fast"]
    found = memory.megabytes(case, mode, names, [backend], threads=1)
    concatenated = case.batch * case.length * 4 * case.dim * 4 / 2**20  # q, k, q-k and q*k side by side
    assert list(found) == names
    assert found["fuxictr, eager"] > concatenated > found["din_fast"] >= 0


def test_memory_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert math.isnan(memory.megabytes(Case("fuxictr", *TINY), FORWARD, ["din_fast"], ["native"], 1)["din_fast"])


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.name)
def test_a_fused_model_is_the_original(model: models.Model, backend: str) -> None:
    told: list[str] = []
    checks = models.check(model, backend, 2, told.append, size=16, length=7)
    assert all(c.green for c in checks) and {c.provider for c in checks} == {models.ORIGINAL, "din_fast"}
    assert told == [models.ORIGINAL, "din_fast"] * 2
    assert {"evaluation output", "training output"} < {c.tensor for c in checks}
    original = models.units(model.build())
    fused = models.units(models.fused(model.build(), backend))
    assert len(fused) == len(original) > 0
    assert all(type(ours) is not type(theirs) for ours, theirs in zip(fused, original, strict=True))


def test_hooks_tell_the_units_share(backend: str) -> None:
    model = models.fused(models.MODELS[0].build(), backend)
    ids, label = models.batch(8, 5, 0)
    score = models.MODELS[0].score(ids)
    optimizer = torch.optim.Adam(model.parameters())
    with models.watched(models.units(model)) as seconds:
        models.training_step(model.train(), optimizer, score, label)
        assert len(seconds) == 4 and min(seconds) > 0  # two units, forward and backward
        seconds.clear()
        models.scoring(model.eval(), score)
        assert len(seconds) == 2
    models.training_step(model.train(), optimizer, score, label)
    assert len(seconds) == 2  # the hooks are gone
    models.check_backend(model, backend)
    with pytest.raises(RuntimeError, match="expected the backend reference"):
        models.check_backend(model, "reference")


def test_a_task_keeps_the_modes_that_are_asked_for() -> None:
    task = cases.at("fuxictr", "s3", memory=(FORWARD, TRAINING))
    assert cases.only([task], [TRAINING]) == [replace(task, modes=(TRAINING,), memory=(TRAINING,))]
    assert cases.only([task], [CANDIDATES]) == []


def test_the_parity_line_names_the_worst() -> None:
    checks = [Check("a", "training output", "max", 1.0, 1.0, 2.0), Check("a", "gradient x", "rms", 3.0, 1.0, 2.0)]
    assert report.parity_line("what", checks).startswith("parity what RED, worst error of what is allowed: a: 3.0e+00")

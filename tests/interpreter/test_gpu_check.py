"""The check of a GPU, walked through on the CPU: every check is there, parity is checked really, nothing fails.

And what else is for a GPU alone: tuned tiles give the same results as the usual ones.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import gpu_check
from din_fast import FusedActivationUnit, tune
from din_fast.backends.triton import tiling, tuned
from tests import truth
from tests.interpreter.honest import GUARD
from tests.truth import check_parity


def test_a_dry_run(tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "dry.json"
    before = GUARD.launches
    assert gpu_check.main(["--dry-run", "--out", str(out)]) == 0
    assert GUARD.launches > before
    told = json.loads(out.read_text())
    assert told["dry_run"] is True and told["gpu"] == "dry run" and told["quick"] is False
    assert {"din_fast", "torch", "triton", "python"} < set(told["versions"])

    found = {c["name"]: c for c in told["checks"]}
    wanted = [c.name for c in gpu_check.checks(gpu_check.Run(gpu_check.DryRun()))]
    assert list(found) == wanted and len(set(wanted)) == len(wanted)
    parity = [c for name, c in found.items() if name.startswith("parity")]
    assert len(parity) == len(gpu_check.SUBJECTS) * len(gpu_check.NUMBERS)
    assert {c["status"] for c in parity} == {"pass"}
    assert {plan for plan in ("f1", "f2", "f3", "rows", "split")} <= {s.plan for s in gpu_check.SUBJECTS}
    not_run = {name for name, c in found.items() if c["status"] == "not run"}
    assert not_run == {
        "compute-sanitizer memcheck",
        "compute-sanitizer racecheck",
        "CUDA graph of an evaluation",
        "another device is current",
        "torch.compile, reduce-overhead",
        "peak memory of a training step",
    }
    assert {found[name]["detail"] for name in not_run} == {"dry run"}
    assert {c["status"] for name, c in found.items() if name not in not_run} == {"pass"}

    timings = told["timings"]
    assert {t["provider"] for t in timings} == {"fuxictr, eager", "torch-rechub, eager", "folded, eager", "din_fast"}
    assert all(0 < t["p20"] <= t["milliseconds"] <= t["p80"] for t in timings)
    printed = capsys.readouterr().out
    assert "two runs of the backward" in printed and f"results: {out}" in printed.replace("\n", "")


def test_what_the_sanitizer_runs(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit in every type."""
    monkeypatch.setattr(gpu_check, "SUBJECTS", gpu_check.SUBJECTS[:1])
    before = GUARD.launches
    assert gpu_check.main(["--dry-run", "--subset"]) == 0
    assert GUARD.launches - before >= 3 * len(gpu_check.NUMBERS)


class TwoDevices(gpu_check.DryRun):
    """The CPU as a GPU that has another beside it."""

    def require(self) -> None:
        pass


def test_torch_compile_and_another_device(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the checks that a dry run leaves out can run on the CPU."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    run = gpu_check.Run(TwoDevices())
    assert gpu_check.check_compile(run) == "4 calls, two sets of inputs"
    assert gpu_check.check_other_device(run) == "equal bits" and current == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(gpu_check.NotRun, match="there is one GPU"):
        gpu_check.check_other_device(run)


def test_a_wrong_kernel_fails_and_the_others_still_run(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(unit: nn.Module, inputs: truth.Inputs) -> dict[str, Tensor]:
        found = step(unit, inputs)
        if isinstance(unit, FusedActivationUnit):
            found["grad history"][0, 0, 0] += 1
        return found

    step = truth.step
    monkeypatch.setattr(truth, "step", spoiled)
    monkeypatch.setattr(gpu_check, "SUBJECTS", gpu_check.SUBJECTS[:1])
    out = tmp_path / "dry.json"
    assert gpu_check.main(["--dry-run", "--out", str(out), "--quick"]) == 1
    found = {c["name"]: c for c in json.loads(out.read_text())["checks"]}
    assert found["parity f1, float32"]["status"] == found["parity f1, float16"]["status"] == "fail"
    assert "! grad history" in found["parity f1, float32"]["detail"]
    assert found["parity f1, bfloat16"] | {"seconds": 0} == {
        "name": "parity f1, bfloat16",
        "status": "not run",
        "detail": "--quick",
        "seconds": 0,
    }
    assert found["two runs of the backward, equal bits"]["status"] == "pass"


# ---------------------------------------------------------------- the tiles of din_fast/tune.py


@pytest.fixture
def tiles_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "tiles.json"))
    tuned.forget()
    yield tmp_path / "tiles.json"
    tuned.forget()


@pytest.mark.parametrize(
    ("subject", "dtype"), [("f1", torch.float32), ("f2", torch.float16), ("f3", torch.float32), ("rows", torch.float32)]
)
def test_results_do_not_depend_on_the_tiles(
    subject: str, dtype: torch.dtype, tiles_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule, with the tiles of a file that are furthest from the usual ones, both ways."""
    monkeypatch.setattr(truth, "SEEDS", 3)
    (found,) = (s for s in gpu_check.SUBJECTS if s.name == subject)
    case = found.case(dry_run=True, training=True)
    with tuned.trying(None) as trial:
        check_parity(case, "triton", dtype)
    assert trial.seen is not None
    shape, limits, device = trial.seen
    forwards, backwards = (sorted(tiles, key=lambda t: t.rows) for tiles in tiling.choices(shape, limits))
    for pair in ((forwards[0], backwards[-1]), (forwards[-1], backwards[0])):
        assert pair[0].rows != pair[1].rows
        tuned.save(tiles_file, shape, device, pair)
        before = len(GUARD.log)
        check_parity(case, "triton", dtype)
        assert len(GUARD.log) > before
        plan = tuned.plan(shape, limits, device)
        assert (plan.forward, plan.backward) == pair


def test_tune_times_the_calls_of_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    """As the command does, but for the clock: each tile runs, and the usual one stays where none is faster."""
    sizes = ["--batch", "3", "--length", "5", "--dim", "4", "--hidden-units", "6"]
    args = tune.parser().parse_args([*sizes, "--preset", "fuxictr", "--softmax"])
    forward, step = tune.calls(args, torch.device("cpu"))

    def milliseconds(call: Callable[[], object]) -> float:
        call()
        return 1.0

    shape, _, pair = tune.tune(forward, step, milliseconds, print, rounds=1)
    assert (shape.candidates, shape.length, shape.dim, shape.hidden_units) == (3, 5, 4, (6,))
    usual = tiling.plan(shape)
    assert pair == (usual.forward, usual.backward)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(map(len, tiling.choices(shape))) > 2
    with pytest.raises(RuntimeError, match="got none"):
        tune.tune(lambda: None, step)

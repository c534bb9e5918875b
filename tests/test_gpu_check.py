"""The check of a GPU, without one: what it says and writes, its compute-sanitizer, its notebook."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import contenders, gpu_check
from bench.gpu_check import NUMBERS, Check, NotRun, Run, carry_out, left_out, readme, result_path
from din_fast import FusedActivationUnit
from din_fast.backends.triton import tiling
from tests import truth

ROOT = Path(__file__).parent.parent


class Fake(gpu_check.DryRun):
    """A GPU that is not there."""

    dry_run = False
    name, capability = "NVIDIA Fake 80GB", "7.5"

    def __init__(self) -> None:
        pass

    def require(self) -> None:
        pass

    def require_number(self, number: gpu_check.Number) -> None:
        if number.dtype == torch.bfloat16:
            raise NotRun("compute capability 7.5 has no bfloat16")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so_in_one_line(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    told = capsys.readouterr()
    assert told.out == "" and re.fullmatch(r"no GPU: .*--dry-run.*\n", told.err)


def test_a_dry_run_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run"])
    assert "expected --out FILE" in capsys.readouterr().err


def test_a_dry_run_starts_itself_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads TRITON_INTERPRET when it is imported."""
    calls: list[tuple[list[str], str]] = []

    def run(command: list[str], env: dict[str, str]) -> Any:
        calls.append((command, env["TRITON_INTERPRET"]))
        return SimpleNamespace(returncode=5)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_check.main(["--dry-run", "--out", "x.json"]) == 5
    command = [sys.executable, "-m", "bench.gpu_check", "--dry-run", "--out", "x.json"]
    assert calls == [(command, "1")]


def test_the_result_of_a_check() -> None:
    def not_run() -> str:
        raise NotRun("no")

    def wrong() -> str:
        raise AssertionError("off by 1")

    def broken() -> str:
        raise RuntimeError("out of memory")

    found = [carry_out(Check("x", f), None) for f in (lambda: "well", not_run, wrong, broken)]
    assert [(r.status, r.detail) for r in found] == [
        ("pass", "well"),
        ("not run", "no"),
        ("fail", "off by 1"),
        ("fail", "RuntimeError: out of memory"),
    ]
    reason = carry_out(Check("x", broken), "--quick")
    assert (reason.status, reason.detail) == ("not run", "--quick")


def test_what_quick_and_minutes_leave_out() -> None:
    run = Run(Fake(), quick=True, minutes=9)
    kept = [c.name for c in gpu_check.checks(run) if left_out(run, c, 0) is None]
    assert not any("bfloat16" in name or "tf32" in name or "sanitizer" in name for name in kept)
    assert "parity split, float16" in kept and "times of many candidates, float16" in kept
    check = Check("x", lambda: "")
    assert left_out(run, check, 539) is None and left_out(run, check, 541) == "9 minutes were over"
    assert [n.name for n in gpu_check.numbers_here(run)] == ["float32", "float32 tf32", "float16"]
    assert run.half() is Run(Fake()).half() is NUMBERS[3]


@pytest.mark.parametrize("memory", [64 * 1024, 99 * 1024, 227 * 1024])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.name)
def test_every_unit_gets_its_plan_at_the_sizes_of_a_gpu(number: gpu_check.Number, memory: int) -> None:
    """On a T4, a 4090 and an H100, by their shared memory."""
    for subject in gpu_check.SUBJECTS:
        case = subject.case(dry_run=False, training=True)
        users, length, dim = case.shape
        half, several = number.dtype != torch.float32, case.candidates or 1
        shape = tiling.Shape(
            users * several,
            length,
            dim,
            case.spec.hidden_units,
            half,
            number.precision == "tf32",
            row_dice=case.spec.activation == "dice_row",
            grouped=several > 1,
        )
        assert tiling.plan(shape, tiling.Limits(memory)).name == subject.plan, subject.name


def test_the_numbers_of_an_old_gpu_and_of_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, names in (((7, 5), ["float32", "float16"]), ((9, 0), [n.name for n in NUMBERS])):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, c=capability: c >= (8, 0) or including_emulation,
        )
        run = Run(gpu_check.Gpu())
        assert [n.name for n in gpu_check.numbers_here(run)] == names
        assert run.gpu.capability == ".".join(map(str, capability))
        with contextlib.nullcontext() if capability >= (8, 0) else pytest.raises(NotRun, match=r"capability 7\.5 has"):
            run.gpu.require_number(NUMBERS[2])


def test_the_clock_and_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On events and counters that are not there: what is called, in which order, and what is subtracted."""
    order: list[str] = []
    allocated = iter([100, 250])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: object) -> float:
            assert order[-1] == "wait"
            return 1.5

    def call() -> None:
        order.append("call")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: order.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(allocated))
    gpu = gpu_check.Gpu()
    assert gpu.milliseconds(call, 2) == [1.5, 1.5]
    assert order == ["call", "event", "call", "event", "event", "call", "event", "wait"]
    order.clear()
    assert gpu.peak_bytes(call) == 150 and order == ["call", "wait", "reset", "call", "wait"]


class Graph:
    """A CUDA graph on the CPU: a replay makes the last call again and puts the result where the first one is."""

    unit: FusedActivationUnit
    works = True

    def replay(self) -> None:
        if self.works:
            arguments, out = self.calls[0]
            out.copy_(self.unit(*arguments[0], **arguments[1]))

    def __init__(self) -> None:
        self.calls: list[tuple[Any, torch.Tensor]] = []
        self.unit.register_forward_hook(
            lambda unit, args, kwargs, out: self.calls.append(((args, kwargs), out)), with_kwargs=True
        )


@pytest.mark.parametrize("works", [True, False])
def test_a_graph_that_is_replayed_with_new_inputs(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a graph and streams that are not there: what is captured is compared with a call, and may differ."""
    case = gpu_check.SUBJECTS[1].case(True, False)
    unit = truth.fused_unit(case.spec, case.shape[2], "native").eval()
    drawn = [truth.draw(case, seed, torch.float32) for seed in (0, 1)]
    monkeypatch.setattr(Graph, "unit", unit, raising=False)
    monkeypatch.setattr(Graph, "works", works)
    monkeypatch.setattr(gpu_check, "evaluation", lambda run: (unit, drawn))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run = Run(Fake())
    with contextlib.nullcontext() if works else pytest.raises(AssertionError, match="the replay differs"):
        assert gpu_check.check_graph(run) == "replayed with new inputs"
    assert unit.last_backend == "native"


SUMMARY = "========= ERROR SUMMARY: {} errors"


@pytest.mark.parametrize(
    ("code", "line", "status"),
    [
        (0, SUMMARY.format(0), "pass"),
        (9, SUMMARY.format(2), "fail"),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", "fail"),
        (1, "Traceback", "fail"),
        (0, "nothing was checked", "fail"),
    ],
)
def test_compute_sanitizer(code: int, line: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of its name that writes down how it was called."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\necho "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING" > {tmp_path}/called\necho "{line}"\nexit {code}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = Run(Fake())
    found = carry_out(Check("x", lambda: gpu_check.check_sanitizer(run, "memcheck")), None)
    assert found.status == status, found.detail
    assert line.strip("= ") in found.detail
    called = f"--tool memcheck --error-exitcode 9 {sys.executable} -m bench.gpu_check --subset 1\n"
    assert (tmp_path / "called").read_text() == called


def test_without_compute_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    found = carry_out(Check("x", lambda: gpu_check.check_sanitizer(Run(Fake()), "memcheck")), None)
    assert (found.status, found.detail) == ("not run", "compute-sanitizer is not installed")


@pytest.mark.parametrize(("peaks", "status"), [([8, 2], "pass"), ([2, 8], "fail")])
def test_peak_memory_must_be_below_the_framework_s(
    peaks: list[int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Fake())
    monkeypatch.setattr(gpu_check, "BENCH", gpu_check.TINY_BENCH)
    monkeypatch.setattr(run.gpu, "peak_bytes", lambda call: peaks.pop(0) << 20)
    group = [c for c in contenders.build(gpu_check.TINY_BENCH[0], "reference") if "compile" not in c.provider]
    monkeypatch.setattr(contenders, "build", lambda case, backend: group)
    found = carry_out(Check("x", lambda: gpu_check.check_memory(run)), None)
    assert found.status == status
    assert re.search(r"fuxictr, eager \d MiB, din_fast \d MiB", found.detail)


def test_the_name_of_the_file() -> None:
    assert result_path("NVIDIA H100 80GB HBM3") == Path("results/gpu/nvidia-h100-80gb-hbm3.json")
    assert result_path("AMD Instinct MI300X (gfx942)").name == "amd-instinct-mi300x-gfx942.json"


def test_the_table_of_the_readme(tmp_path: Path) -> None:
    assert readme(tmp_path) == "none yet"
    run = Run(Fake())
    run.results = [carry_out(Check("x", lambda: ""), why) for why in (None, None, "--quick")]
    for provider, ms in (("fuxictr, eager", 6.0), ("folded, torch.compile", 2.5), ("din_fast", 2.0)):
        run.timings.append(gpu_check.Row(provider, "fuxictr", "(4, 5)", "float16", "forward", ms, ms, ms, 3))
    run.gpu.versions = lambda: {"cuda": "13.0"}  # type: ignore[method-assign]
    (tmp_path / "fake.json").write_text(json.dumps(gpu_check.document(run)))
    (tmp_path / "dry.json").write_text(json.dumps({"dry_run": True}))
    lines = readme(tmp_path).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {7}
    assert lines[2].startswith("| NVIDIA Fake 80GB | checks: 2 passed, 0 failed, 1 not run | | torch ")
    assert lines[3] == (
        "| NVIDIA Fake 80GB | forward | float16 | fuxictr (4, 5) | 2 | fuxictr, eager x 3.00, "
        "folded, torch.compile x 1.25 |"
    )


def test_readme_prints_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "readme", lambda: "none yet")
    assert gpu_check.main(["--readme"]) == 0 and capsys.readouterr().out == "none yet\n"


# ---------------------------------------------------------------- examples/gpu_check.ipynb


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "examples" / "gpu_check.ipynb").read_text(encoding="utf-8"))
    return found


def sources(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_one_of_format_4_without_outputs(notebook: dict[str, Any]) -> None:
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == common | code and cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"]) and cell["metadata"] == {}
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_the_python_of_the_notebook_finds_the_checkout_and_asks_for_an_address(
    notebook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its lines but those of the shell, in the folder examples, then elsewhere."""
    python = ["\n".join(s for s in cell.splitlines() if s[:1] not in ("!", "%")) for cell in sources(notebook)]
    assert python[0] == 'REPOSITORY = ""'
    monkeypatch.chdir(ROOT / "examples")
    names: dict[str, Any] = {}
    for source in python[:-1]:
        exec(source, names)
    assert Path.cwd() == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY: expected the address"):
        exec(python[1], names)
    (tmp_path / "gpu_check.json").write_text("{}")
    exec(python[-1], names)


def test_the_notebook_clones_the_address(
    notebook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "origin").mkdir()
    user = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "--quiet"], [*user, "commit", "--quiet", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path / "origin", check=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    exec(sources(notebook)[1], {"REPOSITORY": f"file://{tmp_path}/origin"})
    assert Path.cwd() == tmp_path / "work" / "din-fast" and Path(".git").is_dir()


def test_the_commands_of_the_notebook_exist(notebook: dict[str, Any]) -> None:
    lines = [line for cell in sources(notebook) for line in cell.splitlines() if line[:1] in ("!", "%")]
    assert lines.pop(0) == "%env DIN_FAST_BUILD=none"
    commands = [shlex.split(line.removeprefix("!{sys.executable} ")) for line in lines]
    assert all(line.startswith("!{sys.executable} -m ") for line in lines)
    *installs, check = commands
    assert check[:2] == ["-m", "bench.gpu_check"]
    args = gpu_check.command_line().parse_args(check[2:])
    assert args.quick and not args.dry_run and args.out == Path("gpu_check.json")
    assert all(command[:3] == ["-m", "pip", "install"] for command in installs)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert installs[1][-1] == ".[bench]" and re.search(r"^bench = \[", project, re.MULTILINE)
    assert (ROOT / installs[2][-1]).is_file()
    torch_wanted = next(word for word in installs[0] if word.startswith("torch=="))
    assert f"TORCH ?= {torch_wanted}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")

"""``python -m bench.gpu_check``: what only a GPU can tell, as named checks, in results/gpu/<name of the GPU>.json.

Parity comes first: every plan of the Triton kernels in every type, by the rule of tests/truth.py, the plain unit being
on the same device. Then equal bits, compute-sanitizer, CUDA graphs, another current device, torch.compile, peak memory,
and last the times. A check passes, fails, or is not run for a reason that is told.

``--dry-run`` walks the same way at tiny sizes on the CPU, in Triton's interpreter: parity is checked there, what needs
a GPU is not run. It is for checkouts: the rule and the peers live beside the package.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import din_fast
from bench import cases, contenders, parity, peers, timing
from bench.contenders import Case, Contender
from din_fast import FusedActivationUnit, UnitSpec, preset, reference, tune
from din_fast.backends import triton
from din_fast.backends.triton import tiling, tuned
from tests import truth

FOLDER = Path("results/gpu")
ROOT = Path(__file__).parent.parent
QUICK_MINUTES = 9.0
DRY = "dry run"
SANITIZER = "compute-sanitizer"
SANITIZER_FAILED = 9  # the exit code asked of it
SANITIZER_SECONDS = 1800
TF32_ROUNDOFF = 2.0**-11
Status = Literal["pass", "fail", "not run"]


class NotRun(Exception):
    """Why a check cannot run here, in a few words."""


# ---------------------------------------------------------------- devices


class Gpu:
    """The first GPU, with its clock and its memory's."""

    dry_run = False
    device = torch.device("cuda", 0)
    long, part_tiles = tiling.LONG, tiling.PART_TILES

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name(self.device)
        self.capability = ".".join(map(str, torch.cuda.get_device_capability(self.device)))

    def require(self) -> None:
        """Called by a check that needs a GPU."""

    def require_number(self, number: Number) -> None:
        """Raise NotRun where this GPU does not have a type."""
        if number.dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise NotRun(f"compute capability {self.capability} has no bfloat16")
        if number.precision == "tf32":
            if torch.version.hip is not None:
                raise NotRun("the kernels use TF32 on CUDA only")
            if torch.cuda.get_device_capability(self.device) < (8, 0):
                raise NotRun(f"compute capability {self.capability} has no TF32")

    def milliseconds(self, call: Callable[[], object], calls: int) -> list[float]:
        """Of each of some calls, between CUDA events; one call before them is not timed."""
        call()
        return tune.event_times(call, calls, self.device)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """How far a call raises the memory allocated by torch; a call before it is not counted."""
        call()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def versions(self) -> dict[str, str]:
        hip = torch.version.hip
        return {"hip": hip} if hip is not None else {"cuda": str(torch.version.cuda)}


class DryRun(Gpu):
    """The CPU in a GPU's place, in Triton's interpreter: its clock, and no more."""

    dry_run = True
    device = torch.device("cpu")
    name, capability = DRY, "none"
    long, part_tiles = 100, 1  # the plan of long histories for short ones

    def __init__(self) -> None:
        from tests.interpreter import honest  # triton is imported with it

        honest.install()  # bfloat16 and TF32 round as on a GPU, and every address is checked
        torch.set_num_threads(1)  # tensors are tiny

    def require(self) -> None:
        raise NotRun(DRY)

    def require_number(self, number: Number) -> None:
        pass

    def milliseconds(self, call: Callable[[], object], calls: int) -> list[float]:
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
        return found

    def peak_bytes(self, call: Callable[[], object]) -> int:
        raise NotRun(DRY)

    def versions(self) -> dict[str, str]:
        return {}


# ---------------------------------------------------------------- what is checked


@dataclass(frozen=True)
class Number:
    """A type of the tensors, and how float32 products are made."""

    name: str
    dtype: torch.dtype
    precision: Literal["ieee", "tf32"] = "ieee"

    @contextmanager
    def set(self) -> Iterator[None]:
        """torch's own setting, which the kernels follow."""
        settings = torch.backends.cuda.matmul
        before = settings.fp32_precision
        settings.fp32_precision = self.precision
        try:
            yield
        finally:
            settings.fp32_precision = before


NUMBERS = (
    Number("float32", torch.float32),
    Number("float32 tf32", torch.float32, "tf32"),
    Number("bfloat16", torch.bfloat16),
    Number("float16", torch.float16),
)
QUICK_NUMBERS = ("float32", "float16")


@dataclass(frozen=True)
class Sizes:
    """B, L, D, the hidden layers, and M where each history has several candidates."""

    shape: tuple[int, int, int]
    hidden_units: tuple[int, ...]
    candidates: int | None = None


@dataclass(frozen=True)
class Subject:
    """A unit whose parity is checked, at the sizes of a GPU and at those of a dry run; plan: the one it must get."""

    name: str
    plan: str
    spec: Callable[[tuple[int, ...]], UnitSpec]
    full: Sizes
    tiny: Sizes

    def case(self, dry_run: bool, training: bool) -> truth.Case:
        sizes = self.tiny if dry_run else self.full
        masking = "both" if training else "mask"
        return truth.Case(self.spec(sizes.hidden_units), sizes.shape, masking, training, candidates=sizes.candidates)


# Activations without a kink: in half types the side of a kink on which a unit falls says more than the kernel's error.
SUBJECTS = (
    Subject("f1", "f1", partial(preset, "deepctr"), Sizes((64, 100, 64), (80,)), Sizes((2, 40, 8), (12,))),
    Subject(
        "f2",
        "f2",
        partial(preset, "fuxictr", softmax=True),
        Sizes((64, 100, 64), (80, 40)),
        Sizes((2, 40, 8), (12, 20)),
    ),
    Subject(
        "f3",
        "f3",
        partial(preset, "rechub", softmax=True),
        Sizes((64, 100, 64), (80,)),
        Sizes((2, 40, 8), (12,)),
    ),
    Subject(
        "rows",
        "rows",
        partial(preset, "rechub", softmax=True),
        Sizes((256, 20, 32), (36, 20)),
        Sizes((9, 4, 8), (12, 5)),
    ),
    Subject(
        "split",
        "split",
        partial(UnitSpec, activation="tanh", softmax=True),
        Sizes((4, 4096, 32), (36,)),
        Sizes((2, 130, 8), (12,)),
    ),
    Subject(
        "dropout",
        "f2",
        partial(UnitSpec, activation="silu", batch_norm=True, dropout=0.3),
        Sizes((64, 100, 64), (80, 40)),
        Sizes((2, 40, 8), (12, 5)),
    ),
    Subject(
        "statistics over valid positions",
        "f1",
        partial(UnitSpec, activation="dice_batch", batch_norm=True, batch_stats="valid"),
        Sizes((64, 100, 64), (80,)),
        Sizes((2, 40, 8), (12,)),
    ),
    Subject(
        "several candidates",
        "f1",
        partial(preset, "fuxictr"),
        Sizes((16, 100, 64), (80,), 20),
        Sizes((2, 40, 8), (12,), 2),
    ),
)
BENCH = tuple(
    Case(name, *shape) for name in ("fuxictr", "rechub") for shape in ((512, 100, 64, (80, 40)), (128, 1000, 32, (36,)))
)
TINY_BENCH = (Case("fuxictr", 3, 5, 4, (6, 3)),)
TINY_SERVE = Case("rechub", 6, 9, 4, (5,))
MODES = ("forward", "training step")


@dataclass(frozen=True)
class Row:
    """One contender's time a call, in milliseconds: the median, and the 20th and 80th percentile."""

    provider: str
    preset: str
    shape: str
    number: str
    mode: str
    milliseconds: float
    p20: float
    p80: float
    calls: int


@dataclass(frozen=True)
class Result:
    """What came of a check: detail says how well, or why not."""

    name: str
    status: Status
    detail: str
    seconds: float


@dataclass
class Run:
    """One run: where, how much, and what it has found."""

    gpu: Gpu
    quick: bool = False
    minutes: float | None = None  # checks that would begin later are not run
    results: list[Result] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)

    @property
    def rounds(self) -> tuple[int, int]:
        """Turns of each contender, and calls a turn."""
        return (1, 1) if self.gpu.dry_run else (3, 10) if self.quick else (7, 10)

    def seeds(self, number: Number) -> int:
        """As the tests; one is enough in a dry run where the rule leaves room."""
        ieee = number.name == "float32"
        return (3 if ieee else 1) if self.gpu.dry_run else truth.SEEDS if ieee and not self.quick else 3

    def half(self) -> Number:
        """The half type to time."""
        try:
            self.gpu.require_number(NUMBERS[2])
        except NotRun:
            return NUMBERS[3]
        return NUMBERS[3] if self.quick else NUMBERS[2]


# ---------------------------------------------------------------- parity


def to_device(inputs: truth.Inputs, device: torch.device) -> truth.Inputs:
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return replace(inputs, **{name: t.to(device) for name, t in tensors.items() if t is not None})


@contextmanager
def settings(gpu: Gpu, number: Number) -> Iterator[set[str]]:
    """torch's precision, and what counts as long; gives the names of the plans that calls get inside."""
    made: set[str] = set()
    stock = tiling.cut

    def cut(*args: Any) -> tiling.Plan:
        plan = stock(*args)
        made.add(plan.name)
        return plan

    with number.set(), mock.patch.multiple(tiling, cut=cut, LONG=gpu.long, PART_TILES=gpu.part_tiles):
        yield made


def units_and_inputs(
    case: truth.Case, number: Number, device: torch.device, seed: int
) -> tuple[reference.ActivationUnit, FusedActivationUnit, truth.Inputs, truth.Inputs]:
    """The plain and the fused unit with equal weights, and the inputs of each: plain takes mask and lengths as one."""
    inputs = truth.draw(case, seed, torch.float32).to(number.dtype)
    plain = reference.ActivationUnit(case.shape[2], case.spec)
    truth.randomise(plain, torch.Generator().manual_seed(seed))
    plain = plain.to(number.dtype).train(case.training)
    fused = truth.fused_unit(case.spec, case.shape[2], "triton", like=plain).to(device)
    one_mask = replace(inputs, mask=inputs.valid, lengths=None)
    return plain.to(device), fused, to_device(one_mask, device), to_device(inputs, device)


def check_parity(run: Run, subject: Subject, number: Number) -> str:
    """Hold a unit to the rule in training and evaluation: output, every gradient, running statistics."""
    run.gpu.require_number(number)
    worst = 0.0
    with settings(run.gpu, number) as plans:
        for training in (True, False):
            case = subject.case(run.gpu.dry_run, training)
            comparison = truth.Comparison(number.dtype)
            if number.precision == "tf32":
                comparison.roundoff = TF32_ROUNDOFF
            for seed in range(run.seeds(number)):
                plain, fused, its, ours = units_and_inputs(case, number, run.gpu.device, seed)
                right = truth.step(copy.deepcopy(plain).double(), its.to(torch.float64))
                comparison.add(right, truth.step(plain, its), truth.step(fused, ours))
            comparison.check()
            worst = max([worst, *(error / limit for *_, error, limit in comparison.rows() if limit)])
    assert plans == {subject.plan}, f"plan: expected {subject.plan}, got {sorted(plans)}"
    return f"the largest error is {worst:.0%} of the allowed"


def one_step(run: Run, subject: Subject, number: Number) -> dict[str, Tensor]:
    """Outputs and gradients of a training step."""
    _, fused, _, inputs = units_and_inputs(subject.case(run.gpu.dry_run, True), number, run.gpu.device, 0)
    with settings(run.gpu, number):
        return truth.step(fused, inputs)


def numbers_here(run: Run) -> list[Number]:
    """The types that the GPU has."""
    found = []
    for number in NUMBERS:
        try:
            run.gpu.require_number(number)
        except NotRun:
            continue
        found.append(number)
    return found


def check_equal_bits(run: Run) -> str:
    """The same step twice: no sum depends on which program comes first."""
    numbers = numbers_here(run)[:1] if run.gpu.dry_run else numbers_here(run)
    for subject in SUBJECTS:
        for number in numbers:
            first, second = one_step(run, subject, number), one_step(run, subject, number)
            differ = [name for name, t in first.items() if not torch.equal(t, second[name])]
            assert not differ, f"{subject.name}, {number.name}: two runs differ in {', '.join(differ)}"
    return f"{len(SUBJECTS)} units, {', '.join(n.name for n in numbers)}"


# ---------------------------------------------------------------- what only a GPU has


def run_subset(run: Run) -> None:
    """What runs under compute-sanitizer, which is slow: a step of every unit in every type, small as in a dry run."""
    run.gpu.long, run.gpu.part_tiles = DryRun.long, DryRun.part_tiles
    for subject in SUBJECTS:
        small = replace(subject, full=subject.tiny)
        for number in numbers_here(run):
            one_step(run, small, number)


def check_sanitizer(run: Run, tool: str) -> str:
    """memcheck sees addresses, racecheck shared memory; without torch's cache of memory, which hides the former."""
    run.gpu.require()
    if torch.version.hip is not None:
        raise NotRun(f"{SANITIZER} is for CUDA")
    program = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if program is None:
        raise NotRun(f"{SANITIZER} is not installed")
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_FAILED)]
    done = subprocess.run(
        [program, *options, sys.executable, "-m", "bench.gpu_check", "--subset"],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SANITIZER_SECONDS,
    )
    told = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    clean = done.returncode == 0 and any(re.search(r"SUMMARY: 0 ", line) for line in told)
    assert clean, f"exit code {done.returncode}\n" + "\n".join(done.stdout.splitlines()[-30:])
    return told[-1]


def evaluation(run: Run) -> tuple[FusedActivationUnit, list[truth.Inputs]]:
    """A unit in evaluation, and two sets of inputs for it."""
    case = SUBJECTS[1].case(run.gpu.dry_run, False)
    drawn = [units_and_inputs(case, NUMBERS[0], run.gpu.device, seed) for seed in (0, 1)]
    return drawn[0][1], [inputs for *_, inputs in drawn]


def check_graph(run: Run) -> str:
    """A captured forward, replayed with new inputs, gives the bits of a call."""
    run.gpu.require()
    unit, (inputs, others) = evaluation(run)
    with torch.no_grad():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            unit(inputs.history, inputs.target, mask=inputs.mask)  # compiles
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = unit(inputs.history, inputs.target, mask=inputs.mask)
        right = truth.call(unit, others)
        assert inputs.mask is not None and others.mask is not None
        for static, new in zip(
            (inputs.history, inputs.target, inputs.mask), (others.history, others.target, others.mask), strict=True
        ):
            static.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out, right), "the replay differs from a call"
    return "replayed with new inputs"


def check_other_device(run: Run) -> str:
    """Tensors on one GPU while another is the current one."""
    run.gpu.require()
    if torch.cuda.device_count() < 2:
        raise NotRun("there is one GPU")
    right = one_step(run, SUBJECTS[0], NUMBERS[0])
    with torch.cuda.device(1):
        found = one_step(run, SUBJECTS[0], NUMBERS[0])
    differ = [name for name, t in right.items() if not torch.equal(t, found[name])]
    assert not differ, f"differs in {', '.join(differ)}"
    return "equal bits"


def check_compile(run: Run) -> str:
    """torch.compile with CUDA graphs, with inputs that change."""
    run.gpu.require()
    unit, drawn = evaluation(run)
    compiled: Any = torch.compile(unit, mode="reduce-overhead")
    with torch.no_grad():
        for inputs in (*drawn, *drawn):
            found = compiled(inputs.history, inputs.target, mask=inputs.mask).clone()
            torch.testing.assert_close(found, truth.call(unit, inputs))
    return "4 calls, two sets of inputs"


def check_memory(run: Run) -> str:
    """The peak of a training step, which must be below the framework's eager one."""
    case = TINY_BENCH[0] if run.gpu.dry_run else BENCH[0]
    history, target, gradient = bench_inputs(run, case, NUMBERS[0])
    leaves = history.requires_grad_(), target.requires_grad_()
    peaks = {}
    group = contenders.build(case, "triton")

    def step(c: Contender) -> None:
        contenders.training_step(c, *leaves, gradient)
        for t in (*leaves, *c.unit.parameters()):
            t.grad = None  # else the next step would begin with more than this one

    for c in (group[0], group[-1]):
        c.unit.to(run.gpu.device)
        c.run.train()
        peaks[c.provider] = run.gpu.peak_bytes(partial(step, c)) / 2**20
    theirs, ours = peaks.values()
    told = f"{case.shape}: " + ", ".join(f"{name} {mb:.0f} MiB" for name, mb in peaks.items())
    assert ours < theirs, told
    return told


# ---------------------------------------------------------------- times


def bench_inputs(run: Run, case: Case, number: Number) -> tuple[Tensor, Tensor, Tensor]:
    drawn = contenders.inputs(case, torch.Generator().manual_seed(0))
    history, target, gradient = (t.to(run.gpu.device, number.dtype) for t in drawn)
    return history, target, gradient


def build_group(run: Run, case: Case, number: Number) -> tuple[list[Contender], Contender]:
    """The contenders on the device with one set of weights, and the framework's unit in float64."""
    start = peers.build(case.preset, case.dim, case.hidden_units)
    contenders.randomise(start, torch.Generator().manual_seed(1))
    start.to(number.dtype)
    right = contenders.plain(case, torch.float64)
    group = contenders.build(case, "triton")
    if run.gpu.dry_run:  # compiling for the CPU takes half a minute
        group = [c for c in group if "compile" not in c.provider]
    else:
        torch._dynamo.reset()
    for c in (right, *group):
        if c is not right:
            c.unit.to(number.dtype)
        peers.copy_weights(start, c.unit)
        c.unit.to(run.gpu.device)
    return group, right


def hold_to_rule(
    number: Number, right: Mapping[str, Tensor], plain: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> None:
    """The rule of tests/truth.py for what bench names otherwise, and shapes otherwise (slopes)."""
    comparison = truth.Comparison(number.dtype)
    if number.precision == "tf32":
        comparison.roundoff = TF32_ROUNDOFF

    def alike(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace("gradient ", "grad "): found[n].reshape(t.shape) for n, t in right.items()}

    comparison.add(alike(right), alike(plain), alike(ours))
    comparison.check()


def take_times(run: Run, case: Case, number: Number, mode: str, calls: Mapping[str, Callable[[], object]]) -> str:
    """Time contenders in turns; the last is din_fast. Returns its median, and how many times that the others take."""
    rounds, count = run.rounds
    took = {provider: timing.Timing() for provider in calls}
    for _ in range(rounds):
        for provider, call in calls.items():
            took[provider].milliseconds += run.gpu.milliseconds(call, count)
    for provider, t in took.items():
        p20, p50, p80 = (round(t.percentile(p), 5) for p in (20, 50, 80))
        calls_made = len(t.milliseconds)
        run.timings.append(Row(provider, case.preset, case.shape, number.name, mode, p50, p20, p80, calls_made))
    *others, (_, ours) = took.items()
    ratios = ", ".join(f"{provider} x {t.median / ours.median:.2f}" for provider, t in others)
    return f"{mode} {ours.median:.3f} ms ({ratios})"


def check_times(run: Run, case: Case, number: Number) -> str:
    """Parity of din_fast, then the times of all contenders."""
    run.gpu.require_number(number)
    history, target, gradient = bench_inputs(run, case, number)
    told = []
    with number.set():
        group, right = build_group(run, case, number)
        truths = parity.everything(right, history.double(), target.double(), gradient.double())
        plain, ours = (parity.everything(c, history, target, gradient) for c in (group[0], group[-1]))
        hold_to_rule(number, truths, plain, ours)
        del truths, plain, ours, right
        leaves = history.clone().requires_grad_(), target.clone().requires_grad_()
        for mode in MODES:
            calls: dict[str, Callable[[], object]] = {}
            for c in group:
                c.run.train(mode == MODES[1])
                forward = partial(contenders.forward, c, history, target)
                step = partial(contenders.training_step, c, *leaves, gradient)
                calls[c.provider] = forward if mode == MODES[0] else step
            told.append(take_times(run, case, number, mode, calls))
        group[-1].check_backend()
    return "; ".join(told)


def check_serving(run: Run, number: Number) -> str:
    """Many candidates over one history, which the others are given expanded, as a view; parity first."""
    case = TINY_SERVE if run.gpu.dry_run else cases.SERVE
    run.gpu.require_number(number)
    expanded, candidates = contenders.shared_inputs(case)
    target, one = (t.to(run.gpu.device, number.dtype) for t in (candidates, expanded[:1]))
    history = one.expand(case.batch, -1, -1)  # moved to a device, the view would be copied out
    with number.set():
        group, right = build_group(run, case, number)
        for c in (right, *group):
            c.run.eval()
        # The truth in slices: in float64 all at once it would take gigabytes.
        slices = zip(history.split(64), target.split(64), strict=True)
        truths = torch.cat([contenders.forward(right, h.double(), t.double()) for h, t in slices])
        plain, ours = (contenders.forward(c, history, target) for c in (group[0], group[-1]))
        hold_to_rule(number, {"output": truths}, {"output": plain}, {"output": ours})
        calls = {c.provider: partial(contenders.forward, c, history, target) for c in group}
        told = take_times(run, case, number, contenders.CANDIDATES, calls)
        group[-1].check_backend()
    return told


# ---------------------------------------------------------------- the run


@dataclass(frozen=True)
class Check:
    """run returns its detail, or raises: NotRun, or what went wrong; quick: whether it belongs to --quick."""

    name: str
    run: Callable[[], str]
    quick: bool = True


def checks(run: Run) -> list[Check]:
    """All checks, in order."""
    found = [
        Check(f"parity {s.name}, {n.name}", partial(check_parity, run, s, n), n.name in QUICK_NUMBERS)
        for s in SUBJECTS
        for n in NUMBERS
    ]
    found.append(Check("two runs of the backward, equal bits", partial(check_equal_bits, run)))
    for tool in ("memcheck", "racecheck"):
        found.append(Check(f"{SANITIZER} {tool}", partial(check_sanitizer, run, tool), quick=False))
    found += [
        Check("CUDA graph of an evaluation", partial(check_graph, run)),
        Check("another device is current", partial(check_other_device, run)),
        Check("torch.compile, reduce-overhead", partial(check_compile, run)),
        Check("peak memory of a training step", partial(check_memory, run)),
    ]
    timed = (NUMBERS[0], NUMBERS[1], run.half())
    for case in TINY_BENCH if run.gpu.dry_run else BENCH:
        for n in timed:
            quick = n.name in QUICK_NUMBERS and case.preset == "fuxictr"
            found.append(
                Check(f"times {case.preset} {case.shape}, {n.name}", partial(check_times, run, case, n), quick)
            )
    for n in timed:
        found.append(
            Check(f"times of many candidates, {n.name}", partial(check_serving, run, n), n.name in QUICK_NUMBERS)
        )
    return found


def left_out(run: Run, check: Check, since: float) -> str | None:
    """Why --quick leaves a check out: it is not one of its own, or the time is over."""
    if run.quick and not check.quick:
        return "--quick"
    if run.minutes is not None and since > 60 * run.minutes:
        return f"{run.minutes:g} minutes were over"
    return None


def carry_out(check: Check, reason: str | None) -> Result:
    """One check; whatever it raises is its result, so that the others still run."""
    start = time.perf_counter()
    status: Status = "pass"
    try:
        if reason is not None:
            raise NotRun(reason)
        detail = check.run()
    except NotRun as why:
        status, detail = "not run", str(why)
    except AssertionError as error:
        status, detail = "fail", str(error) or "an assertion without a message"
    except Exception as error:
        status, detail = "fail", f"{type(error).__name__}: {error}"
    return Result(check.name, status, detail, round(time.perf_counter() - start, 2))


def document(run: Run) -> dict[str, Any]:
    """What the results file holds."""
    return {
        "gpu": run.gpu.name,
        "compute_capability": run.gpu.capability,
        "dry_run": run.gpu.dry_run,
        "quick": run.quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "din_fast": din_fast.__version__,
            "torch": str(torch.__version__),
            "triton": str(triton.version()),
            "python": platform.python_version(),
            **run.gpu.versions(),
            **{package: installed(package) for package in peers.PACKAGES.values()},
        },
        "tuned_tiles": tuned.cache_path().exists(),
        "checks": [asdict(result) for result in run.results],
        "timings": [asdict(row) for row in run.timings],
    }


def installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def result_path(name: str) -> Path:
    """results/gpu/nvidia-h100-80gb-hbm3.json"""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def carry_out_all(run: Run, out: Path, console: Console) -> int:
    """All checks; the file is written after each, so that a crash leaves what came before it. Returns the exit code."""
    out.parent.mkdir(parents=True, exist_ok=True)
    found = checks(run)
    begin = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(found))
        for check in found:
            progress.update(task, description=escape(check.name))
            run.results.append(carry_out(check, left_out(run, check, time.perf_counter() - begin)))
            out.write_text(json.dumps(document(run), indent=1) + "\n", encoding="utf-8")
            progress.advance(task)
    console.print(result_table(run))
    console.print(f"results: {out}", highlight=False, markup=False)
    return int(any(result.status == "fail" for result in run.results))


def result_table(run: Run) -> Table:
    """A line per check, with the first line of what it tells."""
    table = Table(title=escape(run.gpu.name))
    for column in ("check", "result", "", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    colours = {"pass": "green", "fail": "bold red", "not run": "yellow"}
    for r in run.results:
        status = f"[{colours[r.status]}]{r.status}[/]"
        table.add_row(escape(r.name), status, escape(r.detail.partition("\n")[0]), f"{r.seconds:.1f}")
    return table


# ---------------------------------------------------------------- the README's table


def readme(folder: Path = FOLDER) -> str:
    """A Markdown table of the results files; dry runs are none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [d for d in found if not d["dry_run"]]
    if not found:
        return "none yet"
    lines = ["| GPU | | type | preset and shape | din_fast, ms | others, times that |", "|---|---|---|---|---|---|"]
    for d in found:
        lines += [_checks_line(d), *_timing_lines(d)]
    return "\n".join(lines)


def _checks_line(d: Mapping[str, Any]) -> str:
    statuses = [c["status"] for c in d["checks"]]
    told = {"pass": "passed", "fail": "failed", "not run": "not run"}
    counts = ", ".join(f"{statuses.count(status)} {word}" for status, word in told.items())
    versions = f"torch {d['versions']['torch']}, triton {d['versions']['triton']}, {d['date'][:10]}"
    return f"| {d['gpu']} | checks: {counts} | | {versions} | | |"


def _timing_lines(d: Mapping[str, Any]) -> list[str]:
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for t in d["timings"]:
        cases.setdefault((t["mode"], t["number"], t["preset"], t["shape"]), {})[t["provider"]] = t["milliseconds"]
    lines = []
    for (mode, number, name, shape), ms in cases.items():
        ours = ms[contenders.OURS]
        others = ", ".join(f"{p} x {v / ours:.2f}" for p, v in ms.items() if p != contenders.OURS)
        lines.append(f"| {d['gpu']} | {mode} | {number} | {name} {shape} | {ours:.3g} | {others} |")
    return lines


# ---------------------------------------------------------------- the command


def interpreted(arguments: Sequence[str]) -> int:
    """The same command in a process of its own with Triton's interpreter, which is asked for before triton is there."""
    command = [sys.executable, "-m", "bench.gpu_check", *arguments]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode


def why_no_gpu() -> str | None:
    """Why the checks cannot run here, in one line."""
    if not torch.cuda.is_available():
        return "no GPU: torch sees neither CUDA nor ROCm; --dry-run walks through the checks on the CPU"
    return triton.why_not(Gpu.device)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"float32 and float16, fewer times, no compute-sanitizer; begins no check after {QUICK_MINUTES:g} minutes",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--out", type=Path, help=f"the results file; default {FOLDER}/<name of the GPU>.json")
    parser.add_argument("--readme", action="store_true", help="print the table of all results files and stop")
    parser.add_argument("--subset", action="store_true", help=argparse.SUPPRESS)  # runs under compute-sanitizer
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0: all that ran passed, 1: a check failed, 2: no GPU."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = command_line()
    args = parser.parse_args(arguments)
    if args.readme:
        print(readme())
        return 0
    if args.dry_run and args.out is None and not args.subset:
        parser.error("--dry-run: expected --out FILE, since there is no GPU to name the file after")
    if args.dry_run and not triton.interpreting():
        return interpreted(arguments)
    reason = None if args.dry_run else why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    gpu = DryRun() if args.dry_run else Gpu()
    run = Run(gpu, args.quick, QUICK_MINUTES if args.quick else None)
    if args.subset:
        run_subset(run)
        return 0
    return carry_out_all(run, args.out or result_path(gpu.name), Console())


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.serve``: scoring many candidates for one user, whose history every framework has to expand.

Parity first, of the outputs against float64; then milliseconds of the forward, and how far it raises the peak of a
fresh process's memory, the output left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench import contenders, parity, peers, report, timing
from bench.__main__ import THREADS
from bench.contenders import OURS, Case, Contender

SERVE = Case("rechub", 512, 1000, 64, (80, 40))
MODE = "forward of candidates"
ROUNDS = 3  # a framework takes seconds a call


def shared_inputs(case: Case) -> tuple[Tensor, Tensor]:
    """One history for all candidates, as a view of stride 0, and the candidates."""
    g = torch.Generator().manual_seed(0)
    history = torch.randn(1, case.length, case.dim, generator=g)
    return history.expand(case.batch, -1, -1), torch.randn(case.batch, case.dim, generator=g)


def errors(case: Case, group: Sequence[Contender]) -> dict[str, tuple[float, float]]:
    """The largest error of each contender's output, and what the rule allows (tests/truth.py)."""
    history, target = shared_inputs(case)
    start = peers.build(case.preset, case.dim, case.hidden_units)
    contenders.randomise(start, torch.Generator().manual_seed(1))
    truth = contenders.plain(case, torch.float64)
    outputs = {}
    for c in (truth, *group):
        peers.copy_weights(start, c.unit)
        c.run.eval()
        dtype = torch.float64 if c is truth else torch.float32
        outputs[c.provider] = contenders.forward(c, history.to(dtype), target.to(dtype)).double()
        c.check_backend()
    right = outputs.pop(truth.provider)
    found = {name: float((out - right).abs().max()) for name, out in outputs.items()}
    allowed = 2 * found[group[0].provider] + 32 * parity.UNIT_ROUNDOFF * float(right.abs().max())
    return {name: (error, allowed) for name, error in found.items()}


def megabytes(case: Case, provider: str) -> float:
    """By how much one forward raises the peak of a process that did nothing before; Linux only, else NaN."""
    if not Path("/proc/self/status").exists():
        return float("nan")
    command = [sys.executable, "-m", "bench.serve", "--memory-of", provider, "--shape", *map(str, _numbers(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _numbers(case: Case) -> tuple[int, ...]:
    return case.batch, case.length, case.dim, *case.hidden_units


def _grow(case: Case, provider: str) -> float:
    """What :func:`megabytes` runs in the other process."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    (c,) = (c for c in contenders.build(case, "native") if c.provider == provider)
    c.run.eval()
    history, target = shared_inputs(case)
    contenders.forward(c, history[:4, :8], target[:4])  # libraries, thread pools
    before = status("VmRSS:")
    contenders.forward(c, history, target)
    c.check_backend()
    output = case.batch * case.dim * 4 / 2**20
    return (status("VmHWM:") - before) / 1024 - output


def run(case: Case, out: Path, console: Console, rounds: int = ROUNDS) -> int:
    """Measure, print a table, write the rows; 1 where parity is red."""
    console.print(report.heading("native"), highlight=False, markup=False)
    group = contenders.build(case, "native")
    found = errors(case, group)
    for name, (error, allowed) in found.items():
        console.print(f"parity {name}: {error:.1e} of {allowed:.1e}", highlight=False, markup=False)
    if not all(error <= allowed for error, allowed in found.values()):
        console.print("Parity is red: no speed is told.", style="bold red")
        return 1
    history, target = shared_inputs(case)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=rounds * len(group))
        calls = {c.provider: partial(contenders.forward, c, history, target) for c in group}
        timings = timing.alternate(calls, rounds, tick=lambda name: progress.update(task, advance=1, description=name))
    for c in group:
        c.check_backend()
    title = f"{case.batch} candidates over one history, L = {case.length}, D = {case.dim}, {list(case.hidden_units)}"
    table = Table(title=title)
    for column in (
        "contender",
        "milliseconds, median (20th to 80th percentile)",
        "times din_fast",
        "MB beyond in and out",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, t in timings.items():
        spread = f"{t.median:.1f} ({t.percentile(20):.1f} to {t.percentile(80):.1f})"
        memory = "-" if "compile" in name else f"{megabytes(case, name):.1f}"
        table.add_row(name, spread, f"{t.median / timings[OURS].median:.2f}", memory)
    console.print(table)
    report.write_csv(out, report.rows(case, {MODE: timings}, "native"))
    console.print(f"rows: {out}", highlight=False)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench/serve.csv"), help="where the rows go")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--shape", nargs="+", type=int, default=_numbers(SERVE), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    batch, length, dim, *hidden = args.shape
    case = Case(SERVE.preset, batch, length, dim, tuple(hidden))
    torch.set_num_threads(THREADS)
    if args.memory_of:
        print(_grow(case, args.memory_of))
        return 0
    return run(case, args.out, Console())


if __name__ == "__main__":
    sys.exit(main())

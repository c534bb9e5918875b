"""``python -m bench --quick``: parity, then milliseconds of din_fast and of the units that it replaces."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import contenders, parity, report, timing
from bench.contenders import Case, Contender
from din_fast import dispatch

THREADS = 2
ROUNDS = 7
QUICK = tuple(
    Case(preset, *shape)
    for preset in ("fuxictr", "rechub")
    for shape in ((512, 100, 64, (80, 40)), (128, 1000, 32, (36,)))
)


def _ticker(progress: Progress, total: int, what: str) -> Callable[[str], None]:
    """A bar of ``total`` steps in place of the last one; each step is announced with the contender's name."""
    for old in progress.task_ids:
        progress.remove_task(old)
    task = progress.add_task(escape(what), total=total)

    def tick(provider: str) -> None:
        progress.update(task, advance=1, description=escape(f"{what}: {provider}"))

    return tick


def time_modes(case: Case, group: Sequence[Contender], rounds: int, progress: Progress) -> report.Timings:
    """Time the forward and the training step of all contenders of a case, on one set of inputs."""
    history, target, gradient = contenders.inputs(case, torch.Generator().manual_seed(0))
    leaves = history.clone().requires_grad_(), target.clone().requires_grad_()
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {c.provider: partial(contenders.forward, c, history, target) for c in group},
        "training step": {c.provider: partial(contenders.training_step, c, *leaves, gradient) for c in group},
    }
    timings = {}
    for mode in report.MODES:
        for c in group:
            c.run.train(mode == "training step")
        tick = _ticker(progress, rounds * len(group), f"{case.preset} {case.shape} {mode}")
        timings[mode] = timing.alternate(calls[mode], rounds, tick=tick)
    for c in group:
        c.check_backend()
    return timings


def measure(case: Case, backend: str, rounds: int, console: Console) -> report.Timings | None:
    """Check parity, print it in one line, and time the contenders; None, and no time taken, where parity is red."""
    torch._dynamo.reset()
    group = contenders.build(case, backend)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        what = f"{case.preset} {case.shape} parity (the first round compiles)"
        checks = parity.check(case, group, tick=_ticker(progress, parity.SEEDS * len(group), what))
        console.print(report.parity_line(case, checks), highlight=False, markup=False)
        if not all(c.green for c in checks):
            console.print(report.red_table(case, checks))
            return None
        return time_modes(case, group, rounds, progress)


def run(cases: Sequence[Case], backend: str, out: Path, console: Console, rounds: int = ROUNDS) -> int:
    """Measure all cases, print the tables and write the rows; 1, without any speed, where a parity is red."""
    console.print(report.heading(backend), highlight=False, markup=False)
    found: list[tuple[Case, report.Timings]] = []
    for case in cases:
        timings = measure(case, backend, rounds, console)
        if timings is None:
            console.print("Parity is red: no speed is told.", style="bold red")
            return 1
        found.append((case, timings))
    for preset in dict.fromkeys(case.preset for case in cases):
        console.print(report.speed_table(preset, [f for f in found if f[0].preset == preset]))
    report.write_csv(out, [row for case, timings in found for row in report.rows(case, timings, backend)])
    console.print(f"rows: {out}", highlight=False)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", required=True, help="two shapes, two presets (all there is yet)"
    )
    parser.add_argument("--backend", choices=("native", "reference"), default="native", help="of din_fast")
    parser.add_argument("--out", type=Path, default=Path("results/bench/quick.csv"), help="where the rows go")
    args = parser.parse_args(arguments)
    reason = dispatch.why_not(args.backend, torch.device("cpu"))
    if reason is not None:
        parser.error(f"--backend {args.backend}: {reason}")
    torch.set_num_threads(THREADS)
    return run(QUICK, args.backend, args.out, Console())


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench``: parity, then what din_fast and the units that it replaces take, in time and memory.

20 to 40 minutes; ``--quick`` a few; ``--sweep`` adds to the rows how times and memory grow.
``python -m bench.plot`` and ``python -m bench.readme`` make figures and the README's tables of the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import cases, compare, contenders, memory, models, parity, peak, report, scaling, timing
from bench.cases import Task
from bench.contenders import CANDIDATES, FOLDED, MODES, OURS, Contender
from bench.parity import Check
from bench.report import Found, Row
from din_fast import dispatch

THREADS = 2
WIDTH = 160  # of tables that go into a file
MODELS_MODE = "models"
MODEL_ROUNDS, MODEL_SEEDS = 7, 2
ROWS, QUICK_ROWS = Path("results/bench/rows.csv"), Path("results/bench/quick.csv")


class Red(Exception):
    """Parity of din_fast failed: nothing about speed may be told."""


def _ticker(progress: Progress, total: int, what: str) -> Callable[[str], None]:
    """A bar of ``total`` steps in place of the last one; each step is announced with the contender's name."""
    for old in progress.task_ids:
        progress.remove_task(old)
    task = progress.add_task(escape(what), total=total)

    def tick(provider: str) -> None:
        progress.update(task, advance=1, description=escape(f"{what}: {provider}"))

    return tick


def group_of(task: Task, backends: Sequence[str]) -> list[Contender]:
    """The contenders of a task, the framework's eager unit first."""
    group = contenders.build(task.case, *backends)
    if not task.brief:
        return group
    return [c for i, c in enumerate(group) if i == 0 or c.provider == FOLDED or c.backend]


def tell_parity(what: str, checks: Sequence[Check], console: Console) -> set[str]:
    """Print it in one line; raise where din_fast is red. Another contender that is red is returned: no speed of it."""
    console.print(report.parity_line(what, checks), highlight=False, markup=False)
    red = {c.provider for c in checks if not c.green}
    if red:
        console.print(report.red_table(what, checks))
    if any(provider.startswith(OURS) for provider in red):
        raise Red
    if red:
        console.print(f"left out, as their parity is red: {', '.join(sorted(red))}", highlight=False, markup=False)
    return red


def measure(task: Task, backends: Sequence[str], place: str, console: Console) -> Found:
    """Parity of a task's contenders, then their times, then their memory, each in a fresh process."""
    torch._dynamo.reset()
    case, group = task.case, group_of(task, backends)
    what = f"{case.preset} {case.shape}"
    timings, grown = {}, {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        title = f"{place} {what} parity (the first round compiles)"
        tick = _ticker(progress, task.seeds * len(group), title)
        served = CANDIDATES in task.modes
        checks = parity.check_candidates(case, group, tick) if served else parity.check(case, group, task.seeds, tick)
        red = tell_parity(f"{what} {CANDIDATES}" if served else what, checks, console)
        group = [c for c in group if c.provider not in red]
        for mode in task.modes:
            given = contenders.mode_inputs(case, mode)
            calls = {c.provider: contenders.ready(c, mode, given) for c in group}
            tick = _ticker(progress, task.rounds * len(group), f"{place} {what} {mode}")
            with torch.set_grad_enabled(mode == contenders.TRAINING):
                timings[mode] = timing.alternate(calls, task.rounds, tick=tick)
            for c in group:
                c.check_backend()
        names = [c.provider for c in group]
        for mode in task.memory:
            _ticker(progress, 1, f"{place} {what} {mode}: memory")
            grown[mode] = memory.megabytes(case, mode, names, backends, torch.get_num_threads())
    return report.found(task, timings, {c.provider: c.backend or "" for c in group}, grown)


def measure_model(model: models.Model, backend: str, console: Console) -> Found:
    """Parity of a whole model, then its times."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tick = _ticker(progress, 2 * MODEL_SEEDS, f"{model.name} parity")
        tell_parity(model.name, models.check(model, backend, MODEL_SEEDS, tick), console)
        tick = _ticker(progress, 2 * len(models.MODES) * MODEL_ROUNDS, model.name)
        return models.measure(model, backend, MODEL_ROUNDS, tick)


def run(
    tasks: Sequence[Task], backends: Sequence[str], with_models: bool, console: Console
) -> tuple[list[Row], list[Table]]:
    """Measure all tasks, and whole models, with torch's number of threads; the rows, and tables to be printed.

    Raises:
        Red: a parity of din_fast is red; no speed was printed.
    """
    found_peak = peak.measure(torch.get_num_threads())
    console.print(report.heading(backends, found_peak), highlight=False, markup=False)
    of_peak = None if isinstance(found_peak, str) else found_peak
    found = [measure(t, backends, f"[{i}/{len(tasks)}]", console) for i, t in enumerate(tasks, start=1)]
    whole: list[Found] = []
    kernels = [b for b in backends if b != "reference"]
    if with_models and kernels:
        whole = [measure_model(model, kernels[0], console) for model in models.MODELS]
    elif with_models:
        console.print("whole models: left out, as din_fast.fuse uses no reference backend", markup=False)
    rows = [] if of_peak is None else report.machine_rows(of_peak)
    tables = []
    for preset in dict.fromkeys(f.preset for f in found):
        group = [f for f in found if f.preset == preset]
        of_preset = [row for f in group for row in report.rows(f, of_peak)]
        tables += [report.speed_table(preset, group), report.more_table(preset, of_preset)]
        rows += of_preset
    if whole:
        tables.append(report.model_table(whole))
        rows += [row for f in whole for row in report.rows(f, of_peak)]
    return rows, tables


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two shapes, two presets")
    size.add_argument("--sweep", action="store_true", help="batch, length, dim, candidates and threads, added to --out")
    every = (*MODES, MODELS_MODE)
    parser.add_argument("--modes", nargs="+", choices=every, default=every, help="(default: all)")
    choices = ("native", "reference")
    parser.add_argument("--backend", nargs="+", choices=choices, default=["native"], help=f"of {OURS} (default native)")
    parser.add_argument("--threads", nargs="+", type=int, help=f"one number after the other (default {THREADS})")
    parser.add_argument("--out", type=Path, help=f"the rows (default {ROWS}, of --quick {QUICK_ROWS})")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.csv", help=f"tell which rows of {OURS} differ by over 5 %%"
    )
    args = parser.parse_args(arguments)
    args.backend = list(dict.fromkeys(args.backend))
    for backend in args.backend:
        reason = dispatch.why_not(backend, torch.device("cpu"))
        if reason is not None:
            parser.error(f"--backend {backend}: {reason}")
    args.threads = args.threads or ([1, THREADS] if args.sweep else [THREADS])
    if min(args.threads) < 1:
        parser.error(f"--threads: expected at least 1, got {min(args.threads)}")
    args.out = args.out or (QUICK_ROWS if args.quick else ROWS)
    args.old = _rows_of_this_machine(parser, "--compare", args.compare, args.backend)
    # A sweep adds to the rows of a full run, which must be of the same machine.
    args.kept = _rows_of_this_machine(parser, "--out", args.out if args.sweep else None, args.backend)
    return args


def _rows_of_this_machine(
    parser: argparse.ArgumentParser, option: str, path: Path | None, backends: Sequence[str]
) -> list[Row]:
    """The rows of a file, or an error before anything is measured; none for an option that was not given."""
    if path is None or (option == "--out" and not path.exists()):
        return []
    try:
        rows = report.read_csv(path)
    except (OSError, ValueError) as error:
        parser.error(f"{option}: {error}")
    sets = {backend: report.instruction_set(backend) for backend in backends}
    reason = compare.objection(rows, report.processor(), sets)
    if reason is not None:
        parser.error(f"{option}: {path} cannot be compared with what runs here: {reason}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1, without any speed, where a parity of din_fast is red."""
    args = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    rows: list[Row] = []
    tables: list[Table] = []
    with_models = MODELS_MODE in args.modes and not args.sweep
    try:
        for threads in args.threads:
            torch.set_num_threads(threads)
            more_rows, more_tables = run(tasks_of(args, threads), args.backend, with_models, console)
            rows, tables = rows + more_rows, tables + more_tables
    except Red:
        console.print("Parity is red: no speed is told.", style="bold red")
        return 1
    tables += scaling.tables(rows)
    if args.old:
        tables.append(compare.table(compare.changes(args.old, rows), compare.compared(args.old, rows)))
    for table in tables:
        console.print(table)
    report.write_csv(args.out, report.merged(args.kept, rows))
    console.print(f"rows: {args.out}", highlight=False)
    return 0


def tasks_of(args: argparse.Namespace, threads: int) -> list[Task]:
    """What a command line measures with a number of threads: all of a sweep with the last one, s3 with each."""
    if args.sweep:
        tasks = [cases.scaling(threads), *(cases.sweep() if threads == args.threads[-1] else [])]
    else:
        tasks = cases.quick() if args.quick else cases.full()
    return cases.only(tasks, args.modes)


if __name__ == "__main__":
    sys.exit(main())

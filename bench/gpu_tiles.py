"""``python -m bench.gpu_tiles``: the tiles that tiling could choose, by the model of time of bench/gpu_model.py.

For a size in use, a type and a chip it compiles the kernels of the forward and of the backward with tiles of other rows
and warps. Of those that pass the gate of bench/gpu_report.py (or, where none does, spill least) the best has the lowest
modelled time. ``*`` is what din_fast takes; the exit code is 1 where it is not the best, nor within SLACK of it, unless
``--write`` puts the best into tiling's table. **A model, no measurement**: on a GPU, ``python -m din_fast.tune``
measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.ahead_of_time import WORKERS, Compiled, Compiler, Launch, gpu_name
from bench.gpu_report import KINDS, MAIN, MOST_OUTSIDE, OTHERS, Row, Task, calls, failures, row, tasks
from bench.machine_code import least_spills
from din_fast.backends.triton import tiling, tuned
from din_fast.backends.triton.tiling import Limits, Plan, Shape, Tile

ROWS_AND_WARPS = ((64, 4), (64, 2), (128, 4), (32, 4), (64, 8), (128, 8), (32, 2))
SLACK = 1.1  # what the model cannot tell apart
PARTS = ("forward", "backward")
FORWARD = ("moments_kernel", "forward_kernel")
_capture = Lock()  # launches are recorded in place of Triton's own: one call at a time


@dataclass(frozen=True)
class Trial:
    """A tile: its modelled microseconds, and how much of what is not allowed there is; both at least so much where
    another tile was already better (``given_up``). ``own``: what din_fast takes."""

    tile: Tile
    own: bool
    time: float
    bad: int
    given_up: bool = False

    @property
    def rank(self) -> tuple[int, float]:
        """The smallest is the best."""
        return self.bad, self.time


@dataclass(frozen=True)
class Search:
    """What was found for a part of a size in a type on a chip, the best first."""

    task: Task
    part: str
    key: str
    trials: list[Trial]

    def __str__(self) -> str:
        return f"{gpu_name(self.task.capability)} {self.task.size} {self.task.kind} {self.part}"

    @property
    def own(self) -> Trial:
        return next(t for t in self.trials if t.own)

    def not_best(self) -> str | None:
        """Why din_fast's own tile is not the best; None where it is, or within SLACK of it."""
        best, own = self.trials[0], self.own
        if own.bad > best.bad or own.time > SLACK * best.time:
            return f"{self}: {_told(own.tile)} is modelled at {own.rank}, {_told(best.tile)} at {best.rank}"
        return None


def _told(tile: Tile) -> str:
    return f"{tile.candidates}x{tile.positions}, {tile.warps} warps"


def usual(task: Task) -> tuple[Shape, Plan, Limits]:
    """What tiling chooses, and for what."""
    with _capture, tuned.trying(None) as trial:
        calls(task.size, task.kind, task.capability)
    assert trial.seen is not None
    shape, limit, _ = trial.seen
    return shape, tiling.plan(shape, limit), limit


def tiles(shape: Shape, own: Tile, limit: Limits) -> list[Tile]:
    """The plan's own, and what else there could be."""
    found = [own]
    for rows, warps in ROWS_AND_WARPS:
        tile = replace(own, positions=rows, warps=warps)
        if tile not in found and tiling.shared_memory(shape, tile) <= limit.shared_memory:
            found.append(tile)
    return found


def launches(task: Task, part: str, pair: tuple[Tile, Tile]) -> list[Launch]:
    """The kernels whose tiles are tried."""
    with _capture, tuned.trying(pair):
        called = calls(task.size, task.kind, task.capability)
    every = called.training + called.inference
    return [f for f in every if "BC" in f.arguments and (f.kernel.__name__ in FORWARD) == (part == "forward")]


def measure(tile: Tile, launched: Sequence[Launch], task: Task, compiler: Compiler, best: Trial | None) -> Trial | None:
    """The tile's trial, given up as soon as it is worse than the best; None where it does not compile."""
    trial = Trial(tile, best is None, 0.0, 0)
    for launch in launched:
        (compiled,) = compiler.compile_each([launch], task.capability)
        least = replace(trial, bad=trial.bad + spilled(compiled))
        if best is not None and least.rank > best.rank:
            return replace(least, given_up=True)
        found: Row = row(compiled, task.size, task.kind, launch.kernel.__name__)
        if found.code is None:
            return None
        bad = sum(failures(found).values())
        trial = replace(trial, time=trial.time + found.modelled, bad=trial.bad + bad)
        if best is not None and trial.rank > best.rank:
            return replace(trial, given_up=True)
    return trial


def spilled(compiled: Compiled) -> int:
    """What is not allowed of its spills at least, without reading its code."""
    found = least_spills(compiled.kernel) if compiled.error is None else 0
    return found if found > MOST_OUTSIDE else 0


def search(task: Task, part: str, compiler: Compiler) -> Search | None:
    """Try all tiles, din_fast's own first; None where there is nothing to choose."""
    try:
        shape, plan, limit = usual(task)
    except ValueError:  # no tile fits into the chip's shared memory
        return None
    if part == "backward" and not task.size.training:
        return None
    own = plan.forward if part == "forward" else plan.backward
    found: list[Trial] = []
    for tile in tiles(shape, own, limit):
        pair = (tile, plan.backward) if part == "forward" else (plan.forward, tile)
        best = min(found, key=lambda t: t.rank, default=None)
        trial = measure(tile, launches(task, part, pair), task, compiler, best)
        if trial is None and not found:
            return None  # din_fast's own does not compile: bench/gpu_report.py tells
        if trial is not None:
            found.append(trial)
    return Search(task, part, tiling.key(shape), sorted(found, key=lambda t: (t.given_up, t.rank)))


def table(found: Search) -> Table:
    """The tiles, the best first."""
    shown = Table("tile", "modelled us", "not allowed", title=str(found).replace("[", "\\["))
    for t in found.trials:
        least = "> " if t.given_up else ""
        shown.add_row(_told(t.tile) + (" *" if t.own else ""), f"{least}{t.time:.0f}", str(t.bad))
    return shown


def write(found: Iterable[Search], path: Path = tiling.TABLE) -> None:
    """Put the best tiles into tiling's table, where its own are not."""
    now = json.loads(path.read_text(encoding="utf-8"))
    for f in found:
        chip = now.setdefault(gpu_name(f.task.capability), {})
        if f.not_best():
            best = f.trials[0].tile
            chip.setdefault(f.key, {})[f.part] = [best.positions, best.warps]
    whole = path.with_suffix(".new")  # other searches read the table meanwhile
    whole.write_text(_json(now), encoding="utf-8")
    whole.replace(path)
    tiling.forget()


def _json(chips: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """A line for each size."""
    lines = []
    for chip, sizes in sorted(chips.items()):
        inner = [f"  {json.dumps(size)}: {json.dumps(tile)}" for size, tile in sorted(sizes.items())]
        lines.append(f" {json.dumps(chip)}: {{" + ("\n" + ",\n".join(inner) + "\n }" if inner else "}"))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    sizes = {str(size): size for size in MAIN + OTHERS}
    known = {gpu_name(chip): chip for chip in KINDS}
    usual_chips = [name for name in known if name != "sm_89"]  # it has the tiles of sm_86, and its code
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tiles", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=list(sizes), metavar="SIZE", help="default: all")
    parser.add_argument("--types", nargs="+", help="default: those of the report, one half type")
    parser.add_argument("--chips", nargs="+", choices=known, default=usual_chips, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="put better tiles into tiling's table")
    args = parser.parse_args(arguments)
    console = Console(width=120)
    todo = [
        (task, part)
        for task in tasks([sizes[name] for name in args.sizes], [known[name] for name in args.chips])
        if (task.kind in args.types if args.types else task.kind != "float16" or task.capability == 75)
        for part in PARTS
    ]
    done: list[Search] = []
    with (
        Compiler() as compiler,
        ThreadPoolExecutor(WORKERS) as threads,
        Progress(console=console, transient=True) as bar,
    ):
        searches = threads.map(lambda job: search(job[0], job[1], compiler), todo)
        for found in bar.track(searches, total=len(todo)):
            if found is None:
                continue
            console.print(table(found))
            done.append(found)
            if args.write:
                write([found])
    reasons = [reason for f in done if (reason := f.not_best())]
    lines = [*reasons, f"{len(done)} tiles, {len(reasons)} are not the best"]
    if args.write:
        lines.append(f"the best are now in {tiling.TABLE.name}: run it again")
    console.print("\n".join(lines), markup=False)
    return 1 if reasons and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())

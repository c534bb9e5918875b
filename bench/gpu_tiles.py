"""``python -m bench.gpu_tiles``: the tiles that tiling could choose, by the model of time of bench/gpu_model.py.

For a size in use and a type it compiles the kernels of the forward and of the backward with tiles of other rows and
warps, for several chips. Of those that pass the gate of bench/gpu_report.py on all of them (or, where none does, spill
least) the best has the lowest modelled time, as the geometric mean over the chips. ``*`` is what din_fast takes; the
exit code is 1 where it is not the best, nor within SLACK of it. **A model, no measurement**: on a GPU, ``python -m
din_fast.tune`` measures.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.ahead_of_time import WORKERS, Capability, Compiler, Launch, gpu_name
from bench.gpu_report import KINDS, MAIN, OTHERS, Size, Task, calls, failures, has_matrix_unit, rows_of
from bench.machine_code import CHIPS
from din_fast.backends.triton import tiling, tuned
from din_fast.backends.triton.tiling import Limits, Plan, Shape, Tile

ROWS_AND_WARPS = ((32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8))
SLACK = 1.1  # what the model cannot tell apart
FORWARD = ("moments_kernel", "forward_kernel")


@dataclass(frozen=True)
class Trial:
    """A tile of the forward or of the backward: on each chip the modelled microseconds, and what does not pass."""

    part: str
    tile: Tile
    own: bool
    time: dict[Capability, float]
    bad: dict[Capability, int]

    @property
    def rank(self) -> tuple[int, float]:
        """The smallest is the best."""
        return sum(self.bad.values()), math.exp(sum(map(math.log, self.time.values())) / len(self.time))


def usual(size: Size, kind: str, chips: Sequence[Capability]) -> tuple[Shape, Plan]:
    """What tiling chooses on chips with as much shared memory as all of these have."""
    limit = min(CHIPS[chip].program_shared for chip in chips)
    with tuned.trying(None) as trial:
        calls(size, kind, limit, has_matrix_unit(chips[0]))
    assert trial.seen is not None
    return trial.seen[0], tiling.plan(trial.seen[0], Limits(limit))


def tiles(shape: Shape, own: Tile, limit: int) -> list[Tile]:
    """The plan's own, and what else there could be."""
    found = [own]
    for rows, warps in ROWS_AND_WARPS:
        if own.candidates == 1:
            tile = replace(own, positions=rows, warps=warps)
        else:
            tile = replace(own, candidates=max(rows // own.positions, 1), warps=warps)
        if tile not in found and tiling.shared_memory(shape, tile) <= limit:
            found.append(tile)
    return found


def launches(size: Size, kind: str, part: str, pair: tuple[Tile, Tile], limit: int, matrix: bool) -> list[Launch]:
    """The kernels whose tiles are tried."""
    with tuned.trying(pair):
        called = calls(size, kind, limit, matrix)
    every = called.training + called.inference
    return [f for f in every if "BC" in f.arguments and (f.kernel.__name__ in FORWARD) == (part == "forward")]


def trials(size: Size, kind: str, chips: Sequence[Capability], compiler: Compiler) -> Iterator[Trial]:
    """All tiles of a size in a type."""
    shape, plan = usual(size, kind, chips)
    limit = min(CHIPS[chip].program_shared for chip in chips)
    for part, own in (("forward", plan.forward), ("backward", plan.backward)):
        if part == "backward" and not size.training:
            continue
        for tile in tiles(shape, own, limit):
            pair = (tile, plan.backward) if part == "forward" else (plan.forward, tile)
            launched = launches(size, kind, part, pair, limit, has_matrix_unit(chips[0]))
            with ThreadPoolExecutor(WORKERS) as threads:
                rows = {chip: rows_of(launched, Task(size, kind, chip), compiler, threads) for chip in chips}
            if any(r.code is None for found in rows.values() for r in found):
                continue  # it does not compile
            time = {chip: sum(r.modelled for r in found) for chip, found in rows.items()}
            bad = {chip: sum(sum(failures(r).values()) for r in found) for chip, found in rows.items()}
            yield Trial(part, tile, tile == own, time, bad)


def table(title: str, found: Sequence[Trial], chips: Sequence[Capability]) -> Table:
    """The tiles, the best first."""
    shown = Table("part", "tile, warps", *(gpu_name(chip) for chip in chips), title=title)
    for t in found:
        cells = [f"{t.time[chip]:.0f} us" + (f", {t.bad[chip]} bad" if t.bad[chip] else "") for chip in chips]
        shown.add_row(t.part, f"{t.tile.candidates}x{t.tile.positions}, {t.tile.warps}{' *' if t.own else ''}", *cells)
    return shown


def not_best(found: Sequence[Trial]) -> str | None:
    """Why din_fast's own tile is not the best of a part, found in order; None where it is, or within SLACK of it."""
    best, own = found[0], next(t for t in found if t.own)
    if own.rank[0] > best.rank[0] or own.rank[1] > SLACK * best.rank[1]:
        return f"{own.part}: {own.tile} is modelled at {own.rank}, {best.tile} at {best.rank}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    named = {str(size): size for size in MAIN + OTHERS}
    known = {gpu_name(chip): chip for chip in KINDS}
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tiles", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=named, default=list(named), metavar="SIZE", help="default: all")
    parser.add_argument("--types", nargs="+", default=["bfloat16", "tf32", "float32"], help="default: %(default)s")
    parser.add_argument("--chips", nargs="+", choices=known, default=["sm_80", "sm_90"], help="default: %(default)s")
    args = parser.parse_args(arguments)
    chips = [known[name] for name in args.chips]
    if len({has_matrix_unit(chip) for chip in chips}) > 1:
        parser.error("--chips: expected sm_75, where Triton uses no matrix unit, alone")
    console = Console(width=160)
    reasons = []
    todo = list(product(args.sizes, args.types))
    with Compiler() as compiler, Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for name, kind in bar.track(todo):
            found = sorted(trials(named[name], kind, chips, compiler), key=lambda t: (t.part, t.rank))
            console.print(table(f"{name} {kind}".replace("[", "\\["), found, chips))
            for part in dict.fromkeys(t.part for t in found):
                if reason := not_best([t for t in found if t.part == part]):
                    reasons.append(f"{name} {kind} {reason}")
    console.print(
        "\n".join([*reasons, f"{len(todo)} sizes and types, {len(reasons)} tiles are not the best"]), markup=False
    )
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())

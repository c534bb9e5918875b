"""How near din_fast comes to what the machine can do, of the rows that ``python -m bench`` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import cases
from bench.contenders import FOLDED, OURS, TRAINING, Case
from bench.report import DICE, MACHINE, MEMORY, MILLISECONDS, PEAK, Row

HEADINGS = (
    "batch, length, dim, hidden",
    "mode",
    "floor, ms",
    "memory, ms",
    "din_fast, ms",
    "floor of it",
    "times folded, at the floor",
    "measured",
)
NAMES = ("shape", "configuration", "serve")


def floor(case: Case, mode: str, gflops: float, dice: float) -> float:
    """Milliseconds: the operations of :func:`bench.cases.flops` at the FMA peak (GFLOP/s), and the activations at
    ``dice`` (10^9 a second); in training once forward and once backward, as nothing of them is kept."""
    activations = case.batch * case.length * sum(case.hidden_units) * (2 if mode == TRAINING else 1)
    return 1e-6 * (cases.flops(case, mode) / gflops + activations / dice)


def lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A line of a table for each shape and mode of preset fuxictr, of a run that measured the machine."""
    machine = {(row.threads, row.metric): row.value for row in rows if row.provider == MACHINE}
    timed = {
        (row.x_name, row.shape, row.mode, row.threads, row.provider): row.value
        for row in rows
        if row.metric == MILLISECONDS and row.preset == "fuxictr" and row.x_name in NAMES
    }
    for (name, shape, mode, threads, provider), ours in timed.items():
        folded = timed.get((name, shape, mode, threads, FOLDED))
        if provider != OURS or folded is None or (threads, PEAK) not in machine:
            continue
        least = floor(Case.of("fuxictr", shape), mode, machine[threads, PEAK], machine[threads, DICE])
        memory = machine.get((threads, MEMORY))  # older rows have none
        moved = 1e-6 * cases.traffic(Case.of("fuxictr", shape)) / memory if memory and mode == TRAINING else None
        share, most, reached = f"{least / ours:.0%}", f"{folded / least:.2f}", f"{folded / ours:.2f}"
        yield shape, mode, f"{least:.3g}", f"{moved:.3g}" if moved else "", f"{ours:.3g}", share, most, reached

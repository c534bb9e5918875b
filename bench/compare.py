"""What became slower or faster between two files of rows, on the same machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from bench.contenders import OURS
from bench.report import MEBIBYTES, MILLISECONDS, Row

NOTABLE = 0.05
# Of these less is better; the other metrics follow from the first.
COMPARED = (MILLISECONDS, MEBIBYTES)


def ours(rows: Iterable[Row]) -> list[Row]:
    """The rows of din_fast, on any backend."""
    return [row for row in rows if row.backend]


def objection(old: Iterable[Row], processor: str, instruction_sets: Mapping[str, str]) -> str | None:
    """Why rows of this processor cannot be compared with old ones; None where they can.

    Args:
        old: the rows of a file.
        processor: the name of the one that is here.
        instruction_sets: what runs here, by backend.
    """
    old = [row for row in ours(old) if row.backend in instruction_sets]
    if not old:
        return f"it has no rows of {OURS} on {', '.join(instruction_sets)}"
    for row in old:
        here = instruction_sets[row.backend]
        if row.processor != processor:
            return f"the processor differs: {row.processor} there, {processor} here"
        if row.instruction_set != here:
            return f"the instruction set of {row.backend} differs: {row.instruction_set} there, {here} here"
    return None


def changes(old: Iterable[Row], new: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Rows of din_fast, before and now, that differ by more than 5 %; the same in all that :attr:`Row.key` names."""
    before = {row.key: row for row in ours(old) if row.metric in COMPARED}
    pairs = [(before[row.key], row) for row in ours(new) if row.key in before]
    return [(then, now) for then, now in pairs if abs(now.value - then.value) > NOTABLE * then.value]


def table(changed: Sequence[tuple[Row, Row]], compared: int) -> Table:
    """A line for each change."""
    table = Table(title=f"{len(changed)} of {compared} rows of {OURS} differ by more than {NOTABLE:.0%}")
    for column in ("preset", "shape", "mode", "threads", "metric"):
        table.add_column(column)
    for column in ("before", "now", "change"):
        table.add_column(column, justify="right")
    for then, now in changed:
        word = "slower" if now.metric == MILLISECONDS else "more"
        if now.value < then.value:
            word = "faster" if now.metric == MILLISECONDS else "less"
        change = f"{now.value / then.value - 1:+.1%} {word}" if then.value else word
        case = escape(f"{now.x_name} {now.x_value} {now.shape}")
        told = (now.preset, case, f"{now.mode} {now.backend}", str(now.threads), now.metric)
        table.add_row(*told, f"{then.value:.4g}", f"{now.value:.4g}", change)
    return table


def compared(old: Iterable[Row], new: Iterable[Row]) -> int:
    """How many rows of din_fast are in both."""
    keys = {row.key for row in ours(old) if row.metric in COMPARED}
    return sum(row.key in keys for row in ours(new))

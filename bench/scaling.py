"""How times grow: the exponent of what a sweep varies, and what more threads bring."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from bench.report import MILLISECONDS, Row

EXPONENTS_OF = ("batch", "length", "candidates")


def series(
    rows: Sequence[Row], x_name: str, metric: str = MILLISECONDS
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The points (x, value) of a sweep in the order of x, by mode and provider."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.x_name == x_name and row.metric == metric:
            found.setdefault((row.mode, row.provider), []).append((float(row.x_value), row.value))
    return {name: sorted(points) for name, points in found.items()}


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The e of value ~ x ** e: least squares on the logarithms. At least two points."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def exponents(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells: mode, contender, and the exponent in each of :data:`EXPONENTS_OF`, "" where there is none."""
    by_name = {name: series(rows, name) for name in EXPONENTS_OF}
    lines = list(dict.fromkeys(line for found in by_name.values() for line in found))
    told: list[tuple[str, ...]] = []
    for line in lines:
        points = [by_name[name].get(line, []) for name in EXPONENTS_OF]
        told.append((*line, *(f"{exponent(p):.2f}" if len(p) > 1 else "" for p in points)))
    return told


def threads(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells: mode, contender, threads, milliseconds, and how many times faster than with the fewest threads."""
    told: list[tuple[str, ...]] = []
    for (mode, provider), points in series(rows, "threads").items():
        for count, ms in points:
            told.append((mode, provider, f"{count:.0f}", f"{ms:.2f}", f"{points[0][1] / ms:.2f}"))
    return told


EXPONENT_HEADINGS = ("mode", "contender", *EXPONENTS_OF)
THREAD_HEADINGS = ("mode", "contender", "threads", MILLISECONDS, "times faster")


def tables(rows: Sequence[Row]) -> list[Table]:
    """Both for the terminal, those that have lines."""
    found = []
    for title, headings, lines in (
        ("exponent of the time (least squares on the logarithms)", EXPONENT_HEADINGS, exponents(rows)),
        ("threads at s3", THREAD_HEADINGS, threads(rows)),
    ):
        table = Table(title=title)
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="left" if i < 2 else "right")
        for line in lines:
            table.add_row(*line)
        if lines:
            found.append(table)
    return found

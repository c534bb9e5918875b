"""``python -m bench.readme``: README.md's tables, between two marks, of the rows that ``python -m bench`` wrote.

Ratios are of medians of one run, between units that compute the same function. Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from pathlib import Path

from bench import limits, models, peers, plot, report, scaling
from bench.__main__ import ROWS
from bench.contenders import FOLDED, OURS
from bench.marks import rewrite
from bench.report import (
    BANDWIDTH,
    CLOCK,
    DICE,
    FMA_SHARE,
    MACHINE,
    MEBIBYTES,
    MILLISECONDS,
    PEAK,
    PEAK_SHARE,
    SAMPLES,
    UNIT_SHARE,
    Row,
)

MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")
WANTED = 1.5  # times the compiled folded form: what is below is listed
Group = Mapping[str, Row]  # by provider, what computes the same function in the same mode


def groups(rows: Iterable[Row], x_name: str, metric: str = MILLISECONDS) -> list[Group]:
    """The rows of a metric in groups of what can be compared, in the order of the file."""
    found: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        if row.x_name == x_name and row.metric == metric:
            key = (row.preset, row.x_value, row.shape, row.mode, row.threads)
            found.setdefault(key, {})[row.provider] = row
    return [group for group in found.values() if OURS in group]


def ratio(group: Group, provider: str) -> float | None:
    """How many times din_fast's time a provider takes."""
    return group[provider].value / group[OURS].value if provider in group else None


def eager(group: Group) -> str:
    """The name of the framework's eager unit."""
    return f"{peers.PACKAGES[group[OURS].preset]}, eager"


def geometric_mean(ratios: Sequence[float]) -> float:
    return exp(sum(map(log, ratios)) / len(ratios))


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown; nothing where there are no lines."""
    lines = list(lines)
    if not lines:
        return ""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *lines))


def _against(group: Group, provider: str, scale: float = 1.0) -> str:
    """A time, and in brackets how many times din_fast's it is."""
    times = ratio(group, provider)
    return "" if times is None else f"{_number(scale * group[provider].value)} (x {times:.2f})"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(found: Iterable[Group], scale: float = 1.0) -> str:
    lines = []
    for group in found:
        ours, package = group[OURS], peers.PACKAGES[group[OURS].preset]
        others = (f"{package}, eager", f"{package}, torch.compile", "folded, eager", FOLDED)
        cells = [_against(group, provider, scale) for provider in others]
        lines.append((ours.preset, _name(ours), ours.mode, _number(scale * ours.value), *cells))
    others = ("framework, eager", "framework, torch.compile", "folded, eager", FOLDED)
    return table(("preset", "batch, length, dim, hidden", "mode", OURS, *others), lines)


def _name(row: Row) -> str:
    return f"{row.x_value}: {row.shape}" if row.x_name == "shape" else row.shape


def where(rows: Sequence[Row]) -> str:
    """The machine, the versions and the FMA peak; which rounds were disturbed."""
    ours = next(row for row in rows if row.provider == OURS)
    timed = [row for row in rows if row.metric == MILLISECONDS]
    versions = ", ".join(version.replace("=", " ") for version in ours.versions.split())
    lines = [f"{ours.processor}, {ours.threads} threads, {OURS} {ours.backend} with {ours.instruction_set}; {versions}"]
    peak = {row.metric: row.value for row in rows if row.provider == MACHINE and row.threads == ours.threads}
    if peak:
        lines.append(
            f"FMA peak of these threads, measured: {peak[PEAK]:.0f} GFLOP/s at {peak[CLOCK]:.2f} GHz, "
            f"{peak[PEAK_SHARE]:.0%} of the theoretical one; {peak[DICE]:.1f} billion Dice a second"
        )
    disturbed, rounds = sum(row.disturbed for row in timed), sum(row.rounds for row in timed)
    lines.append(f"{disturbed} of {rounds} rounds were disturbed by other processes")
    return ". ".join(lines) + "."


def means(rows: Sequence[Row]) -> str:
    """Geometric means of the ratios over the shapes, of the preset that was measured at all of them."""
    by_mode: dict[tuple[str, str], list[Group]] = {}
    for group in groups(rows, "shape"):
        by_mode.setdefault((group[OURS].preset, group[OURS].mode), []).append(group)
    most = max((len(found) for found in by_mode.values()), default=0)
    lines = []
    for (preset, mode), found in by_mode.items():
        if len(found) < most:
            continue
        names = ", ".join(group[OURS].x_value for group in found)
        ratios = [[ratio(group, name) for group in found] for name in (eager(found[0]), FOLDED)]
        told = (f"{geometric_mean([r for r in of_one if r is not None]):.2f}" for of_one in ratios)
        lines.append((f"{preset}, {names}", mode, *told))
    return table(("geometric mean over", "mode", "times eager", "times folded, torch.compile"), lines)


def work(rows: Sequence[Row], x_name: str) -> str:
    """Samples a second, share of the FMA peak, bandwidth and memory, of din_fast; the others' memory."""
    by_metric = {
        metric: {_where(group): group for group in groups(rows, x_name, metric)}
        for metric in (SAMPLES, FMA_SHARE, BANDWIDTH, MEBIBYTES)
    }
    lines = []
    for at, group in by_metric[SAMPLES].items():
        ours = group[OURS]
        share, rate = (by_metric[m][at][OURS].value if at in by_metric[m] else None for m in (FMA_SHARE, BANDWIDTH))
        memory = by_metric[MEBIBYTES].get(at, {})
        names = (OURS, eager(group), f"{peers.PACKAGES[ours.preset]}, torch.compile", FOLDED)
        megabytes = [f"{memory[name].value:.1f}" if name in memory else "" for name in names]
        cells = (_number(ours.value), f"{share:.0%}" if share is not None else "", _number(rate or 0.0), *megabytes)
        lines.append((ours.preset, _name(ours), ours.mode, *cells))
    headings = ("preset", "batch, length, dim, hidden", "mode", SAMPLES, FMA_SHARE, BANDWIDTH, MEBIBYTES)
    return table((*headings, "MiB, eager", "MiB, torch.compile", f"MiB, {FOLDED}"), lines)


def _where(group: Group) -> tuple[object, ...]:
    row = group[OURS]
    return row.preset, row.x_value, row.shape, row.mode, row.threads


def whole_models(rows: Sequence[Row]) -> str:
    """Original and fused: milliseconds, samples a second, share of the units."""
    by_metric = {m: {_where(g): g for g in groups(rows, "model", m)} for m in (MILLISECONDS, SAMPLES, UNIT_SHARE)}
    lines = []
    for at, group in by_metric[MILLISECONDS].items():
        ours = group[OURS]
        cells = [f"{group[models.ORIGINAL].value:.1f} -> {ours.value:.1f}", f"{ratio(group, models.ORIGINAL):.2f}"]
        samples, share = by_metric[SAMPLES][at], by_metric[UNIT_SHARE][at]
        cells.append(f"{samples[models.ORIGINAL].value:.0f} -> {samples[OURS].value:.0f}")
        cells.append(f"{share[models.ORIGINAL].value:.0%} -> {share[OURS].value:.0%}")
        lines.append((ours.x_value, ours.shape, ours.mode.removeprefix("model "), *cells))
    headings = ("model", "batch, length, dim, hidden", "", MILLISECONDS, "times faster", SAMPLES, UNIT_SHARE)
    return table(headings, lines)


def slow_cases(rows: Sequence[Row]) -> str:
    """Where din_fast is not faster than the compiled folded form, or under 1.5 times as fast."""
    found = []
    for x_name in dict.fromkeys(row.x_name for row in rows):
        for group in groups(rows, x_name):
            times = ratio(group, FOLDED)
            if times is not None and times < WANTED:
                ours = group[OURS]
                verdict = f"x {times:.2f}" if times > 1 else f"x {times:.2f}, not faster"
                threads = f", {ours.threads} threads"
                found.append(f"- {ours.preset} {ours.shape}, {ours.mode}{threads} ({x_name} {ours.x_value}): {verdict}")
    return "\n".join(found) or "None."


def text(rows: Sequence[Row], figures: Sequence[str]) -> str:
    """All that stands between the marks; a part whose rows are not there is left out."""
    most = report.of_most_threads(rows)
    parts = [
        ("", where(most)),
        (
            "Milliseconds, medians; in brackets how many times din_fast's time that is. An empty cell is a contender "
            "whose own parity was red.",
            _times(groups(most, "shape")),
        ),
        ("", means(most)),
        (
            "Work of a second. The share is of the folded form's operations alone; the bandwidth is of the bytes that "
            "must be moved: history and output, in training the history's gradient, too (bench/cases.py). Memory is "
            "how far one call raises the peak of a fresh process.",
            work(most, "shape"),
        ),
        ("The frameworks' own configurations, milliseconds:", _times(groups(most, "configuration"))),
        ("", work(most, "configuration")),
        ("A single history, in microseconds:", _times(groups(most, "small batch"), scale=1000)),
        (
            "Many candidates over one history, which the others are given expanded, as a view; milliseconds:",
            _times(groups(most, "serve")),
        ),
        ("", work(most, "serve")),
        (
            "Whole models, as they are and fused. The units' share is told by hooks of the units, in steps of their "
            "own.",
            whole_models(most),
        ),
        (
            "Exponents of the time in the batch, the length and the number of candidates, from sweeps:",
            table(scaling.EXPONENT_HEADINGS, scaling.exponents(most)),
        ),
        ("Threads at s3:", table(scaling.THREAD_HEADINGS, scaling.threads(rows))),
        (
            "The floor: the unavoidable multiplications and additions at the FMA peak, and each activation once (in "
            "training twice) at the rate of the kernel's own arithmetic in the cache, as if nothing else took time. At "
            "the floor, the compiled folded form would take that many times as long. Memory: what the passes of a "
            "training step read and write (bench/cases.py, traffic), at the rate of a loop over arrays larger than "
            "caches.",
            table(limits.HEADINGS, limits.lines(most)),
        ),
        (f"Where {OURS} is under {WANTED} times as fast as the compiled folded form:", slow_cases(rows)),
    ]
    blocks = [f"{head}\n\n{body}" if head else body for head, body in parts if body]
    return "\n\n".join([*blocks, *figures])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="the CSV (default: %(default)s)")
    given = parser.parse_args(arguments)
    figures = [plot.markdown(path) for path in plot.paths(given.rows.parent).values() if path.exists()]
    rewrite(Path("README.md"), MARKS, text(report.read_csv(given.rows), figures))
    print(f"put the tables of {given.rows} into README.md")


if __name__ == "__main__":
    main()

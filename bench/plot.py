"""``python -m bench.plot``: figures of the rows that ``python -m bench`` and ``--sweep`` wrote; nothing is measured.

ladder.png: milliseconds from the framework's eager unit to din_fast at s3 and s5; sweeps.png: time and memory over the
length, the dim and the number of candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import peers, report, scaling
from bench.__main__ import ROWS
from bench.contenders import CANDIDATES, FOLDED, FORWARD, OURS, TRAINING
from bench.report import MEBIBYTES, MILLISECONDS, Row

PRESET = "fuxictr"
PACKAGE = peers.PACKAGES[PRESET]
LADDER = (f"{PACKAGE}, eager", f"{PACKAGE}, torch.compile", FOLDED, OURS)
COLOURS = dict(zip(LADDER, ("#7fb0dc", "#7a9a5b", "#e6a04a", "#1f4e8c"), strict=True))
LADDER_SHAPES = ("s3", "s5")
SWEEPS = {"length": TRAINING, "dim": TRAINING, "candidates": CANDIDATES}
WORDS = {
    "ladder": "milliseconds of the framework's unit, eager and compiled, of the folded form compiled, and of din_fast",
    "sweeps": "time and memory over the length, the dim and the number of candidates",
}


def paths(folder: Path) -> dict[str, Path]:
    """Where each figure goes."""
    return {name: folder / f"{name}.png" for name in WORDS}


def markdown(path: Path) -> str:
    """A figure as the README shows it."""
    return f"![{WORDS[path.stem]}]({path.as_posix()})"


def draw_ladder(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: a row of bars for each shape and mode."""
    figure = Figure(figsize=(10, 5), dpi=130, layout="constrained")
    axes = figure.subplots(len(LADDER_SHAPES), 2, squeeze=False)
    for line, name in zip(axes, LADDER_SHAPES, strict=True):
        for one, mode in zip(line, (FORWARD, TRAINING), strict=True):
            _ladder(one, rows, name, mode)
    figure.suptitle(f"milliseconds, preset {PRESET}; in brackets how many times {OURS} takes")
    figure.savefig(path)


def _ladder(axes: Axes, rows: Sequence[Row], name: str, mode: str) -> None:
    chosen = {
        row.provider: row
        for row in rows
        if (row.preset, row.x_name, row.x_value, row.mode, row.metric) == (PRESET, "shape", name, mode, MILLISECONDS)
    }
    steps = [provider for provider in LADDER if provider in chosen]
    values = [chosen[provider].value for provider in steps]
    axes.barh(range(len(steps)), values, color=[COLOURS[provider] for provider in steps])
    for place, value in enumerate(values):
        times = f" ({value / chosen[OURS].value:.1f})" if OURS in chosen else ""
        axes.annotate(f" {value:.3g}{times}", (value, place), va="center", fontsize=8)
    axes.set_yticks(range(len(steps)), steps)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_title(f"{mode}, {name} {next(iter(chosen.values())).shape}" if chosen else f"{mode}, {name}", fontsize=9)


def draw_sweeps(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: times above, memory below, logarithmic."""
    figure = Figure(figsize=(11, 6), dpi=130, layout="constrained")
    axes = figure.subplots(2, len(SWEEPS), squeeze=False)
    for line, metric in zip(axes, (MILLISECONDS, MEBIBYTES), strict=True):
        for one, (x_name, mode) in zip(line, SWEEPS.items(), strict=True):
            _sweep(one, rows, x_name, mode, metric)
    if axes[0][0].lines:
        axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"preset {PRESET}: time and memory")
    figure.savefig(path)


def _sweep(axes: Axes, rows: Sequence[Row], x_name: str, mode: str, metric: str) -> None:
    for (of_mode, provider), points in scaling.series(rows, x_name, metric).items():
        if of_mode == mode and provider in COLOURS:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=COLOURS[provider], label=provider)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log" if metric == MILLISECONDS else "symlog")  # din_fast's memory can be 0
    axes.set_xlabel(x_name)
    axes.set_ylabel(f"{metric}, {mode}")
    axes.grid(alpha=0.25)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="the CSV; figures go beside it (default: %(default)s)")
    given = parser.parse_args(arguments)
    rows = report.of_most_threads(report.read_csv(given.rows))
    where = paths(given.rows.parent)
    draw_ladder(rows, where["ladder"])
    written = [where["ladder"]]
    if any(row.x_name in SWEEPS for row in rows):
        draw_sweeps(rows, where["sweeps"])
        written.append(where["sweeps"])
    print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()

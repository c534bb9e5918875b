"""The picture of a demo run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.rows import FUSED, LABELS, RECHUB, SUM

COLOURS = {RECHUB: "#e6a04a", FUSED: "#1f4e8c", SUM: "#7a9a5b"}
TICKS = {RECHUB: "torch-rechub", FUSED: "din_fast", SUM: "sum pooling"}
# The first curve is broad and pale and the second thin and dashed, so that both are seen where they are one.
STROKES: dict[str, dict[str, Any]] = {
    RECHUB: {"linewidth": 5.0, "alpha": 0.75},
    FUSED: {"linewidth": 1.4, "linestyle": (0, (5, 2))},
    SUM: {"linewidth": 1.2, "alpha": 0.9},
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: the loss curves laid over each other, their difference, bars of time and of memory.

    Args:
        result: what :func:`examples.demo.run` returns.
        path: the file; its folder must exist.
    """
    figure = Figure(figsize=(11, 8), dpi=130, layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=[3, 1.3, 2.2])
    _losses(figure.add_subplot(grid[0, :]), result)
    _difference(figure.add_subplot(grid[1, :]), result)
    rows = result["rows"]
    _bars(
        figure.add_subplot(grid[2, 0]), "One training step", "ms", {n: r["step_ms"]["median"] for n, r in rows.items()}
    )
    _bars(
        figure.add_subplot(grid[2, 1]),
        "Its two units alone, forward + backward",
        "ms",
        {n: r["units_ms"]["median"] for n, r in rows.items()},
    )
    _bars(
        figure.add_subplot(grid[2, 2]),
        "Memory a training step adds at its peak",
        "MiB",
        {n: r["peak_memory_mib"] for n, r in rows.items()},
    )
    environment, settings = result["environment"], result["settings"]
    figure.suptitle(
        f"DIN on ml-100k: batch {settings['batch_size']}, history {settings['length']}, "
        f"embedding {settings['emb_dim']}, attention {list(settings['attention_dims'])}\n"
        f"{environment['processor']}, {environment['threads']} threads, torch {environment['versions']['torch']}, "
        f"backend {settings['backend']}",
        fontsize=11,
    )
    figure.savefig(path)


def _losses(axes: Axes, result: dict[str, Any]) -> None:
    for name, row in result["rows"].items():
        steps = range(1, len(row["losses"]) + 1)
        axes.plot(
            steps,
            row["losses"],
            color=COLOURS[name],
            label=f"{LABELS[name]}, test AUC {row['test_auc']:.4f}",
            **STROKES[name],
        )
    axes.set_ylabel("training loss of the batch")
    axes.set_xlim(1, max(2, len(result["rows"][RECHUB]["losses"])))
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _difference(axes: Axes, result: dict[str, Any]) -> None:
    differences = result["comparison"]["loss_differences"]
    axes.plot(range(1, len(differences) + 1), differences, color=COLOURS[FUSED], linewidth=1.2)
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.set_ylim(bottom=0)
    axes.set_xlim(1, max(2, len(differences)))
    axes.set_xlabel("training step")
    axes.set_ylabel("|loss difference|\nof the first two", fontsize=9)
    axes.grid(alpha=0.25)


def _bars(axes: Axes, title: str, unit: str, values: dict[str, float]) -> None:
    names = list(values)
    bars = axes.bar(
        [TICKS[name] for name in names], [values[name] for name in names], color=[COLOURS[name] for name in names]
    )
    axes.bar_label(bars, labels=[_short(values[name]) for name in names], padding=2)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

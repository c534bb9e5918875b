"""Does a fused model train as the original does? The four frameworks' DIN, by their own trainers, on ml-100k.

``python -m examples.fuse_all`` trains each with three seeds, as it is and after ``din_fast.fuse(model)``, and writes
auc.csv, a row for each training, and auc.md. From the same seed a fused model has to reach the AUC of the original to
within 0.001, or within the spread of the original's own runs where that is larger. Other programs can only make an
epoch slower, so the fastest of the runs is told.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from din_fast.frameworks.common import Fused
from examples import fuse_deepctr_torch, fuse_fuxictr, fuse_recbole, fuse_torch_rechub, training
from examples.fuse_training import Run, Train

EXAMPLES: dict[str, Train] = {
    "torch-rechub, CTRTrainer": fuse_torch_rechub.train,
    "DeepCTR-Torch, fit": fuse_deepctr_torch.train,
    "FuxiCTR, fit": fuse_fuxictr.train,
    "RecBole, its trainer": fuse_recbole.train,
}
SEEDS = (1, 2, 3)
BAR = 0.001
HEADINGS = (
    "trained by",
    "AUC, original",
    "AUC, fused",
    "largest difference",
    "spread of the original",
    "within",
    "s an epoch, original",
    "fused",
    "times as fast",
)


def run(epochs: int, quick: bool, progress: Progress) -> pd.DataFrame:
    """Train everything; a row for each training, the columns as in the CSV."""
    rows = []
    task = progress.add_task("", total=len(EXAMPLES) * len(SEEDS) * 2)
    for name, train in EXAMPLES.items():
        for seed in SEEDS:
            for fused in (False, True):
                progress.update(task, description=f"{name}, seed {seed}, {'fused' if fused else 'as it is'}")
                rows.append({"trained_by": name} | _row(train, Run(fused, seed, epochs, quick)))
                progress.advance(task)
    return pd.DataFrame(rows).round(6)  # as the CSV has them


def _row(train: Train, given: Run) -> dict[str, Any]:
    """One training, its own bars and lines kept away from ours.

    Raises:
        RuntimeError: a fused model ran without din_fast, or an original with it.
    """
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        trained = train(given)
    units = [unit for unit in trained.model.modules() if isinstance(unit, Fused)]
    backend = training.backends(trained.model)
    if bool(units) != given.fused or backend in ("host", "reference"):
        raise RuntimeError(f"{given}: {len(units)} units were fused, and {backend} ran them")
    return {
        "seed": given.seed,
        "fused": given.fused,
        "test_auc": trained.auc,
        "seconds_per_epoch": trained.seconds,
        "epochs": given.epochs,
        "units": len(units),
        "backend": backend,
        "threads": torch.get_num_threads(),
    }


def lines(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """The cells of the table, a line for each framework, under :data:`HEADINGS`."""
    out: list[tuple[str, ...]] = []
    for name in rows["trained_by"].unique():
        part = rows[rows["trained_by"] == name].set_index("seed").sort_index()
        original, fused = part[~part["fused"]], part[part["fused"]]
        difference = (fused["test_auc"] - original["test_auc"]).abs().max(skipna=False)
        spread = original["test_auc"].max() - original["test_auc"].min()
        seconds = [of["seconds_per_epoch"].min() for of in (original, fused)]
        out.append(
            (
                name,
                ", ".join(f"{auc:.4f}" for auc in original["test_auc"]),
                ", ".join(f"{auc:.4f}" for auc in fused["test_auc"]),
                f"{difference:.5f}",
                f"{spread:.5f}",
                "yes" if difference <= max(BAR, spread) else "NO",
                f"{seconds[0]:.1f}",
                f"{seconds[1]:.1f}",
                f"{seconds[0] / seconds[1]:.1f}",
            )
        )
    return out


def markdown(rows: pd.DataFrame) -> str:
    """The table as auc.md has it."""
    head = [HEADINGS, tuple("---" for _ in HEADINGS)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in head + lines(rows))
    seeds = ", ".join(str(seed) for seed in sorted(rows["seed"].unique()))
    below = (
        f"Test AUC with the seeds {seeds}; differences are of one seed. {rows['epochs'].max()} epochs, "
        f"{rows['threads'].max()} thread(s); the fused units ran on: {', '.join(_backends(rows))}."
    )
    return f"{table}\n\n{below}"


def _backends(rows: pd.DataFrame) -> list[str]:
    return sorted(rows[rows["fused"]]["backend"].unique())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ends with status 1 where a fused model is not within the bar."""
    parser = argparse.ArgumentParser(prog="python -m examples.fuse_all", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=Run.epochs, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few samples and one epoch, to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=Path("results/fuse"), help="folder of auc.csv and auc.md (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    if given.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {given.epochs}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stdout)  # also while what the trainers print goes elsewhere
    with Progress(*columns, console=console) as progress:
        rows = run(1 if given.quick else given.epochs, given.quick, progress)
    given.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(given.out / "auc.csv", index=False)
    (given.out / "auc.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    print(f"{markdown(rows)}\n\nwrote {given.out / 'auc.csv'} and {given.out / 'auc.md'}")
    if any(cells[HEADINGS.index("within")] != "yes" for cells in lines(rows)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

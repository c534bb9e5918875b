"""Does attention help? The test AUC of DIN, of dot-product attention and of sum pooling (the base model) on ml-100k.

``python -m examples.auc`` trains them with several seeds of weights and batches on the same samples and writes
ml100k.csv, a row for each epoch of each training, and ml100k.png. The models differ in the pooling of the history only;
DIN's unit is torch-rechub's, as it is and with a softmax over the valid positions. All have the same settings, which
were chosen on the validation samples, as is the epoch that is reported, for all seeds of a model the one with
the best mean validation AUC. The last 5 clicks of each user are the test, the 5 before them the validation, each with
one sampled negative (examples/ml100k.py). Other programs can only make an epoch slower, so the fastest one is told.
``--readme`` puts the table of the CSV into README.md, between its two marks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.marks import rewrite
from din_fast import preset
from din_fast.data import Samples
from din_fast.models import DIN, History, Sparse
from examples import ml100k, training

MODELS: dict[str, dict[str, Any]] = {
    "DIN": {"attention": "fused", "backend": "native", "spec": preset("rechub")},
    "DIN, softmax": {"attention": "fused", "backend": "native", "spec": preset("rechub", softmax=True)},
    "dot product": {"attention": "dot"},
    "sum pooling": {"attention": "none"},
}
COLOURS = dict(zip(MODELS, ("#7fb0dc", "#1f4e8c", "#e6a04a", "#7a9a5b"), strict=True))
MARKS = ("<!-- auc -->", "<!-- /auc -->")
HEADINGS = ("model", "weights", "test AUC", "of the seeds", "valid. AUC", "epoch", "fastest epoch, s")


@dataclass(frozen=True)
class Settings:
    """What every model is trained with; learning rate and weight decay by a few trials on the validation samples."""

    epochs: int = 12
    seeds: tuple[int, ...] = (1, 2, 3)
    length: int = 50
    held_out: int = 5
    emb_dim: int = 16
    batch_size: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 1e-5


@dataclass(frozen=True)
class Data:
    """Samples of three successive times, and the rows of each table of embeddings."""

    train: Samples
    validation: Samples
    test: Samples
    vocabulary: dict[str, int]


def load(settings: Settings) -> Data:
    """ml-100k, cut at the last ``held_out`` clicks of each user and at as many before them."""
    tables = ml100k.read(ml100k.find_folder())
    data = ml100k.build(tables, length=settings.length, held_out=2 * settings.held_out, seed=2022)
    user = data.test.x["user"].numpy()  # a user's samples are together, in order of time, two for a click
    left = (np.searchsorted(user, user, side="right") - 1 - np.arange(len(user))) // 2
    validation, test = (
        data.test.take(torch.from_numpy(np.flatnonzero(rows)))
        for rows in (left >= settings.held_out, left < settings.held_out)
    )
    return Data(data.train, validation, test, data.vocabulary)


def build(model: str, vocabulary: dict[str, int], settings: Settings, seed: int) -> DIN:
    """One of :data:`MODELS`, on the user's profile, the item, its category and the histories of both."""
    torch.manual_seed(seed)
    names = ("user", "age", "gender", "occupation", "item", "cate")
    features = [
        *(Sparse(name, vocabulary[name], settings.emb_dim) for name in names),
        History("hist_item", "item"),
        History("hist_cate", "cate"),
    ]
    return DIN(features, **MODELS[model])


def run(settings: Settings, data: Data, progress: Progress) -> pd.DataFrame:
    """Train every model with every seed; a row for each epoch, the columns as in the CSV.

    Raises:
        RuntimeError: the native backend cannot run.
    """
    rows = []
    task = progress.add_task("", total=len(settings.seeds) * len(MODELS) * settings.epochs)
    for seed in settings.seeds:
        for name in MODELS:
            progress.update(task, description=f"seed {seed}, {name}")
            model = build(name, data.vocabulary, settings, seed)
            optimizer = torch.optim.Adam(
                model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
            )
            generator = torch.Generator().manual_seed(seed)
            for epoch in range(1, settings.epochs + 1):
                batches = training.shuffled(len(data.train), settings.batch_size, generator)
                start = time.perf_counter()
                losses = training.train(model, optimizer, data.train, batches)
                row = {
                    "model": name,
                    "seed": seed,
                    "epoch": epoch,
                    "train_loss": float(np.mean(losses)),
                    "seconds": time.perf_counter() - start,
                    "validation_auc": training.auc(model, data.validation),
                    "test_auc": training.auc(model, data.test),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "backend": training.backends(model),
                    "threads": torch.get_num_threads(),
                }
                rows.append(row)
                progress.advance(task)
    return pd.DataFrame(rows)


def best_epochs(rows: pd.DataFrame) -> dict[str, int]:
    """For each model the epoch with the best validation AUC, averaged over its seeds."""
    mean = rows.groupby(["model", "epoch"])["validation_auc"].mean().unstack()
    return {name: int(mean.loc[name].idxmax()) for name in MODELS}


def lines(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """The cells of the table, a line for each model, under :data:`HEADINGS`."""
    out: list[tuple[str, ...]] = []
    for name, epoch in best_epochs(rows).items():
        of_model = rows[rows["model"] == name]
        at = of_model[of_model["epoch"] == epoch]
        auc = at["test_auc"]
        cells = (
            name,
            f"{at['parameters'].iloc[0]:,}",
            f"{auc.mean():.4f}",
            f"{auc.min():.4f}-{auc.max():.4f}",
            f"{at['validation_auc'].mean():.4f}",
            f"{epoch}",
            f"{of_model['seconds'].min():.1f}",
        )
        out.append(cells)
    return out


def markdown(rows: pd.DataFrame) -> str:
    """The table as the README has it."""
    head = [HEADINGS, tuple("---" for _ in HEADINGS)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in head + lines(rows))


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Write a PNG: validation AUC by epoch, and the test AUC of each seed at the epoch reported."""
    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=[1.5, 1])
    _curves(figure.add_subplot(grid[0]), rows)
    _seeds(figure.add_subplot(grid[1]), rows)
    figure.suptitle(f"ml-100k, {rows['seed'].nunique()} seeds each: the models differ in the pooling of the history")
    figure.savefig(path)


def _curves(axes: Axes, rows: pd.DataFrame) -> None:
    for name, epoch in best_epochs(rows).items():
        curves = rows[rows["model"] == name].pivot(index="epoch", columns="seed", values="validation_auc")
        mean = curves.mean(axis=1)
        axes.plot(mean.index, mean, color=COLOURS[name], label=name)
        axes.fill_between(mean.index, curves.min(axis=1), curves.max(axis=1), color=COLOURS[name], alpha=0.2, lw=0)
        axes.plot(epoch, mean[epoch], "o", color=COLOURS[name])
    axes.set_xlabel("epoch (marked: the one reported)")
    axes.set_ylabel("validation AUC, mean and range of the seeds")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _seeds(axes: Axes, rows: pd.DataFrame) -> None:
    for place, (name, epoch) in enumerate(best_epochs(rows).items()):
        auc = rows[(rows["model"] == name) & (rows["epoch"] == epoch)]["test_auc"]
        axes.plot([place] * len(auc), auc, "o", color=COLOURS[name], alpha=0.6)
        axes.hlines(auc.mean(), place - 0.25, place + 0.25, color=COLOURS[name], linewidth=2)
        axes.annotate(f"{auc.mean():.4f}", (place + 0.28, auc.mean()), va="center", fontsize=9)
    axes.set_xticks(range(len(MODELS)), [name.replace(" ", "\n") for name in MODELS])
    axes.set_xlim(-0.5, len(MODELS))
    axes.set_ylabel("test AUC of each seed, and their mean")
    axes.grid(alpha=0.25, axis="y")


def table(rows: pd.DataFrame) -> Table:
    """The result as a table for the terminal."""
    out = Table(title=f"ml-100k, {rows['seed'].nunique()} seeds, {rows['threads'].max()} threads")
    for i, heading in enumerate(HEADINGS):
        out.add_column(heading, justify="left" if i == 0 else "right", no_wrap=i == 3)
    for cells in lines(rows):
        out.add_row(*cells)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.auc", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("results/auc"), help="folder of ml100k.csv and .png (default: %(default)s)"
    )
    parser.add_argument(
        "--readme", action="store_true", help="train nothing: put the table of the CSV into README.md of this folder"
    )
    given = parser.parse_args(arguments)
    csv = given.out / "ml100k.csv"
    if given.readme:
        rewrite(Path("README.md"), MARKS, markdown(pd.read_csv(csv)))
        print(f"put the table of {csv} into README.md")
        return
    console = Console()
    settings = Settings()
    data = load(settings)
    console.print(f"{len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test samples")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        rows = run(settings, data, progress)
    given.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(csv, index=False, float_format="%.6f")
    draw(rows, csv.with_suffix(".png"))
    console.print(table(rows))
    print(f"for the README, where --readme puts it:\n\n{markdown(rows)}\n")
    console.print(f"wrote {csv} and {csv.with_suffix('.png')}")


if __name__ == "__main__":
    main()

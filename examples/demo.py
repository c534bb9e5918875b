"""torch-rechub's DIN on real clicks: as it is, with din_fast's unit in it, and with sum pooling and no attention.

``python -m examples.demo`` trains the three on the ml-100k ratings that the recbole wheel carries, from the same first
weights and on the same batches, measures them, prints a table, and writes demo.json and demo.png. torch-rechub's unit
knows no mask, so padded positions count; our unit is called the same way, so that the numbers can be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import din_fast
from din_fast import dispatch
from din_fast.backends import native
from examples import measure, ml100k, plots
from examples.ml100k import ClickData, Samples
from examples.rows import FUSED, LABELS, RECHUB, Settings, build_rows, check_backend, make_optimizer, training_step

LAST_STEPS = 20
FLOAT64_STEPS = 10
PACKAGES = ("torch", "numpy", "torch-rechub", "recbole", "pandas", "scikit-learn")


def run(settings: Settings, data: ClickData, progress: Progress) -> dict[str, Any]:
    """Train the three rows, then measure them.

    Args:
        settings: sizes, seed, backend.
        data: samples from :func:`examples.ml100k.build`.
        progress: gets a bar for each phase.

    Returns:
        What demo.json holds: ``settings``, ``environment``, ``data``, ``rows`` (for each model its losses, test loss
        and AUC, times and memory), ``comparison`` (torch-rechub's DIN against the same with din_fast) and ``float64``
        (the first steps of both again in float64, and how far the float32 losses are from that).

    Raises:
        RuntimeError: the backend of the settings cannot run, or another one ran.
        ValueError: fewer training samples than one batch.
    """
    if len(data.train) < settings.batch_size:
        raise ValueError(
            f"expected at least one batch of {settings.batch_size} training samples, got {len(data.train)}"
        )
    batches = _batches(len(data.train), settings)
    models = build_rows(data.vocabulary, settings)
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        losses = _train(model, data.train, batches, settings, _bar(progress, f"train {LABELS[name]}", len(batches)))
        rows[name] = {
            "label": LABELS[name],
            "backend": settings.backend if name == FUSED else None,
            "losses": losses,
            "train_loss": float(np.mean(losses[-LAST_STEPS:])),
            **_evaluate(model, data.test, settings),
        }
        check_backend(model, settings.backend)
    exact = _in_float64(rows, data, batches[:FLOAT64_STEPS], settings, progress)
    _measure(rows, models, data, batches[0], settings, progress)
    return {
        "settings": dataclasses.asdict(settings),
        "environment": _environment(settings),
        "data": {
            "training_samples": len(data.train),
            "test_samples": len(data.test),
            "embedding_rows": data.vocabulary,
            "padded_positions": float((data.train.x["hist_item"] == 0).float().mean()),
        },
        "rows": rows,
        "comparison": _compare(rows[RECHUB], rows[FUSED]),
        "float64": exact,
    }


def _batches(samples: int, settings: Settings) -> list[Tensor]:
    """The row numbers of every batch of the training; the incomplete last one of an epoch is left out."""
    generator = torch.Generator().manual_seed(settings.seed)
    batches: list[Tensor] = []
    for _ in range(settings.epochs):
        order = torch.randperm(samples, generator=generator)
        batches += [rows for rows in order.split(settings.batch_size) if len(rows) == settings.batch_size]
    return batches


def _train(
    model: nn.Module, samples: Samples, batches: list[Tensor], settings: Settings, tick: Callable[[], None]
) -> list[float]:
    """The loss of every step."""
    model.train()
    optimizer = make_optimizer(model, settings)
    losses = []
    for rows in batches:
        batch = samples.take(rows)
        losses.append(training_step(model, optimizer, batch.x, batch.label))
        check_backend(model, settings.backend)
        tick()
    return losses


@torch.no_grad()
def _evaluate(model: nn.Module, samples: Samples, settings: Settings) -> dict[str, float]:
    model.eval()
    batches = [samples.take(rows) for rows in torch.arange(len(samples)).split(settings.batch_size)]
    predicted = torch.cat([model(batch.x) for batch in batches])
    return {
        "test_loss": nn.functional.binary_cross_entropy(predicted, samples.label).item(),
        "test_auc": float(roc_auc_score(samples.label.numpy(), predicted.numpy())),
    }


def _in_float64(
    rows: dict[str, dict[str, Any]], data: ClickData, batches: list[Tensor], settings: Settings, progress: Progress
) -> dict[str, Any]:
    """The first steps of torch-rechub's DIN and of ours in float64.

    Adam turns differences in the last bit into whole steps wherever a gradient is all but zero, so that two float32
    trainings of one function part. Float64 tells whether it is one function, and which float32 training is nearer.
    """
    models = build_rows(data.vocabulary, settings)
    losses: dict[str, list[float]] = {}
    for name in (RECHUB, FUSED):
        tick = _bar(progress, f"float64 {LABELS[name]}", len(batches))
        losses[name] = _train(models[name].double(), data.train, batches, settings, tick)
    exact = losses[RECHUB]
    return {
        "steps": len(batches),
        "losses": losses,
        "largest_loss_difference": _largest_difference(losses[FUSED], exact),
        "distance_of_float32": {
            name: _largest_difference(rows[name]["losses"][: len(batches)], exact) for name in (RECHUB, FUSED)
        },
    }


def _largest_difference(losses: list[float], others: list[float]) -> float:
    return float(np.abs(np.subtract(losses, others)).max())


def _measure(
    rows: dict[str, dict[str, Any]],
    models: dict[str, nn.Module],
    data: ClickData,
    batch_rows: Tensor,
    settings: Settings,
    progress: Progress,
) -> None:
    """Add times and memory to the rows."""
    batch = data.train.take(batch_rows)
    memory = _bar(progress, "peak memory, a process each", len(rows))
    for name, row in rows.items():
        row["peak_memory_mib"] = measure.peak_memory(name, data.vocabulary, batch, settings)
        memory()
    rounds = measure.WARM_UP_ROUNDS + settings.timing_rounds
    units = measure.time_units(models, batch, settings, _bar(progress, "time the units, in turn", rounds))
    steps = measure.time_steps(models, batch, settings, _bar(progress, "time training steps, in turn", rounds))
    for name, row in rows.items():
        row["step_ms"] = steps[name]
        row["units_ms"] = units[name]


def _compare(rechub: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
    differences = np.abs(np.subtract(rechub["losses"], fused["losses"]))
    return {
        "loss_differences": differences.tolist(),
        "largest_loss_difference": float(differences.max()),
        "step_speedup": rechub["step_ms"]["median"] / fused["step_ms"]["median"],
        "units_speedup": rechub["units_ms"]["median"] / fused["units_ms"]["median"],
        "peak_memory_ratio": rechub["peak_memory_mib"] / fused["peak_memory_mib"],
    }


def _environment(settings: Settings) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "din-fast": din_fast.__version__}
    return {
        "versions": versions | {package: version(package) for package in PACKAGES},
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set() if settings.backend == "native" else None,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _bar(progress: Progress, title: str, total: int) -> Callable[[], None]:
    task = progress.add_task(title, total=total)
    return lambda: progress.advance(task)


def table(result: dict[str, Any]) -> Table:
    """The result as a table for the terminal."""
    settings = result["settings"]
    title = f"ml-100k, batch {settings['batch_size']}, history {settings['length']}, {settings['epochs']} epochs"
    out = Table(title=title)
    out.add_column("", no_wrap=True)
    for heading in ("train\nloss", "test\nloss", "test\nAUC", "ms per\nstep", "ms of its\nunits", "peak MiB\nper step"):
        out.add_column(heading, justify="right")
    for row in result["rows"].values():
        out.add_row(
            row["label"],
            f"{row['train_loss']:.4f}",
            f"{row['test_loss']:.4f}",
            f"{row['test_auc']:.4f}",
            f"{row['step_ms']['median']:.1f}",
            f"{row['units_ms']['median']:.1f}",
            f"{row['peak_memory_mib']:.0f}",
        )
    return out


def summary(result: dict[str, Any]) -> list[str]:
    """What the table has no column for, in lines."""
    comparison, exact = result["comparison"], result["float64"]
    step, units, memory = (comparison[key] for key in ("step_speedup", "units_speedup", "peak_memory_ratio"))
    largest, steps = comparison["largest_loss_difference"], len(comparison["loss_differences"])
    rechub, fused = (exact["distance_of_float32"][name] for name in (RECHUB, FUSED))
    return [
        f"With din_fast: training step {step:.2f} times as fast, its two units {units:.2f} times as fast; "
        f"peak memory of a step divided by {memory:.2f}.",
        f"Largest difference of the losses with and without din_fast over {steps} steps: {largest:.1e}.",
        f"First {exact['steps']} steps again in float64: {exact['largest_loss_difference']:.1e}. "
        f"Distance of the float32 losses from these: torch-rechub {rechub:.1e}, with din_fast {fused:.1e}.",
    ]


def write(result: dict[str, Any], folder: Path) -> None:
    """Write demo.json and demo.png into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plots.draw(result, folder / "demo.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ends with a plain message where the backend cannot run."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--epochs", type=int, default=Settings.epochs, help="passes over the training clicks (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/demo"), help="folder of demo.json and demo.png (default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        choices=("native", "reference"),
        default=Settings.backend,
        help="of din_fast (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="of weights, batches and negatives (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    if given.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {given.epochs}")
    reason = dispatch.why_not(given.backend, torch.device("cpu"))
    if reason is not None:
        raise SystemExit(
            f"The demo needs the native backend, which cannot run: {reason}\n"
            "To see it with plain PyTorch: --backend reference"
        )
    if platform.system() != "Linux":
        raise SystemExit("The demo measures memory through /proc and so needs Linux.")
    settings = Settings(epochs=given.epochs, seed=given.seed, backend=given.backend)
    console = Console()
    data = ml100k.build(
        ml100k.read(ml100k.find_folder()), length=settings.length, held_out=settings.held_out, seed=settings.seed
    )
    console.print(
        f"ml-100k: {len(data.train)} training and {len(data.test)} test samples, half of them sampled negatives"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        result = run(settings, data, progress)
    write(result, given.out)
    console.print(table(result))
    for line in summary(result):
        console.print(line)
    console.print(f"wrote {given.out / 'demo.json'} and {given.out / 'demo.png'}")


if __name__ == "__main__":
    main()

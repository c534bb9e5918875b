"""Time and peak memory of a training step, and of the activation units alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.ml100k import Samples
from examples.rows import RECHUB, Settings, build_rows, check_backend, make_optimizer, training_step, units_of

MIB = 1024.0  # the kernel counts in KiB
WARM_UP_ROUNDS = 3
WARM_UP_SAMPLES = 8
Times = dict[str, dict[str, float]]


def time_steps(models: dict[str, nn.Module], batch: Samples, settings: Settings, tick: Callable[[], None]) -> Times:
    """Milliseconds of one training step of each model on the same batch, in turn; they train on meanwhile."""
    optimizers = {name: make_optimizer(model, settings) for name, model in models.items()}

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            training_step(models[name].train(), optimizers[name], batch.x, batch.label)

        return run

    times = _alternate({name: step(name) for name in models}, settings.timing_rounds, tick)
    for model in models.values():
        check_backend(model, settings.backend)
    return times


def time_units(models: dict[str, nn.Module], batch: Samples, settings: Settings, tick: Callable[[], None]) -> Times:
    """Milliseconds of forward and backward through the activation units of one step, without the model around them.

    Every model's units get the embeddings of the batch as torch-rechub's DIN looks them up, with its strides.
    """
    din = models[RECHUB]
    with torch.no_grad():
        history = din.embedding(batch.x, din.history_features)  # type: ignore[operator]
        target = din.embedding(batch.x, din.target_features)  # type: ignore[operator]
    inputs = [
        (history[:, i].requires_grad_(), target[:, i].requires_grad_(), torch.randn_like(target[:, i]))
        for i in range(history.shape[1])
    ]

    def units(model: nn.Module) -> Callable[[], None]:
        return lambda: _run_units(units_of(model.train()), inputs)

    return _alternate({name: units(model) for name, model in models.items()}, settings.timing_rounds, tick)


def _run_units(units: nn.ModuleList, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for unit, (history, target, gradient) in zip(units, inputs, strict=True):
        history.grad = target.grad = None
        unit.zero_grad()
        unit(history, target).backward(gradient)


def _alternate(contenders: dict[str, Callable[[], None]], rounds: int, tick: Callable[[], None]) -> Times:
    """Run the contenders in turn, every other round in reverse; the median and the 20th and 80th percentile of each."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(WARM_UP_ROUNDS + rounds):
        for name in names if i % 2 == 0 else reversed(names):
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
        tick()
    quantiles = {"p20": 0.2, "median": 0.5, "p80": 0.8}
    return {
        name: {q: 1e3 * float(np.quantile(s[WARM_UP_ROUNDS:], value)) for q, value in quantiles.items()}
        for name, s in seconds.items()
    }


def peak_memory(name: str, vocabulary: dict[str, int], batch: Samples, settings: Settings) -> float:
    """MiB that one training step of a fresh model adds at its peak, in a process of its own (Linux).

    It is VmHWM after the step less VmRSS before it. A step on a few samples goes first, so that gradients, optimizer
    state and loaded code are there already, as in every step but the first of a training.
    """
    x = {feature: ids.numpy() for feature, ids in batch.x.items()}
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(_peak_of_a_step, name, vocabulary, x, batch.label.numpy(), settings).result()


def _peak_of_a_step(
    name: str, vocabulary: dict[str, int], x: dict[str, np.ndarray], label: np.ndarray, settings: Settings
) -> float:
    batch = Samples({feature: torch.from_numpy(ids) for feature, ids in x.items()}, torch.from_numpy(label))
    model = build_rows(vocabulary, settings)[name]
    optimizer = make_optimizer(model, settings)
    few = batch.take(torch.arange(min(WARM_UP_SAMPLES, len(batch))))
    training_step(model, optimizer, few.x, few.label)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status_kib("VmRSS")
    training_step(model, optimizer, batch.x, batch.label)
    after = _status_kib("VmHWM")
    check_backend(model, settings.backend)
    return (after - before) / MIB


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")

"""What the examples of ``din_fast.fuse`` share: the clicks, the seeds, the clock and what is printed.

Each example is a framework's own DIN, trained on ml-100k by the framework's own trainer: a function ``train`` that
takes a :class:`Run` and gives a :class:`Trained`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from din_fast.data import Samples
from examples import auc, training

LENGTH, DIM, BATCH = 50, 16, 1024
QUICK_TRAINING, QUICK_TEST = 6000, 2000


@dataclass(frozen=True)
class Run:
    """One training: ``fused`` is the only difference between two that are compared."""

    fused: bool
    seed: int = 1
    epochs: int = 2
    quick: bool = False


class Trained(NamedTuple):
    """What came of it: the model, its AUC on the test samples, and the wall time of an epoch."""

    model: nn.Module
    auc: float
    seconds: float


Train = Callable[[Run], Trained]


@lru_cache
def clicks(quick: bool) -> auc.Data:
    """ml-100k as in examples/auc.py: histories of 50, padded at the end, the last clicks of each user held out."""
    data = auc.load(auc.Settings(length=LENGTH))
    if not quick:
        return data
    return replace(
        data,
        train=_some(data.train, QUICK_TRAINING),
        validation=_some(data.validation, QUICK_TEST),
        test=_some(data.test, QUICK_TEST),
    )


def _some(samples: Samples, count: int) -> Samples:
    """Evenly over all users."""
    return samples.take(torch.linspace(0, len(samples) - 1, count).long())


def arrays(samples: Samples) -> dict[str, Any]:
    """The features as NumPy arrays."""
    return {name: values.numpy() for name, values in samples.x.items()}


def seed_everything(seed: int) -> None:
    """Weights, batches and whatever else a framework draws."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seconds_of(fit: Callable[[], object]) -> float:
    """The wall time of a trainer's fit: training, and its validation after each epoch.

    Raises:
        RuntimeError: autograd looks for anomalies. Importing RecBole turns that on; bench/hosts.py turns it off again.
    """
    if torch.is_anomaly_enabled():
        raise RuntimeError("anomaly detection is on, the times would be its own")
    start = time.perf_counter()
    fit()
    return time.perf_counter() - start


def compare(framework: str, train: Train, run: Run) -> str:
    """Train the original and the fused model from one seed; two lines to read."""
    lines = []
    for fused in (False, True):
        trained = train(replace(run, fused=fused))
        ran = f"din_fast ran its units ({training.backends(trained.model)})" if fused else "as it is"
        lines.append(f"{framework}, {ran}: test AUC {trained.auc:.6f}, {trained.seconds:.2f} s an epoch")
    return "\n".join(lines)


def main(framework: str, train: Train, arguments: Sequence[str] | None = None) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(
        description=f"{framework}'s DIN on ml-100k, as it is and after din_fast.fuse(model)"
    )
    parser.add_argument("--epochs", type=int, default=Run.epochs, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Run.seed, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few samples and one epoch, to see that it runs")
    given = parser.parse_args(arguments)
    if given.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {given.epochs}")
    epochs = 1 if given.quick else given.epochs
    result = compare(framework, train, Run(False, given.seed, epochs, given.quick))
    print(f"\n{result}\n{torch.get_num_threads()} threads")

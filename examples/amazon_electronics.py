"""From a log like Amazon Electronics' to the AUC of DIN: CSV, histories, training, test.

``python -m examples.amazon_electronics --csv FILE`` reads a CSV with the columns user_id, item_id, time and cate_id,
one row a click. Without --csv it makes a small log of the same form, whose users prefer a few categories, and uses
that. The last click of each user is the test and the one before the validation; each has one negative, drawn uniformly
from the items that the user never clicked.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from din_fast.data import Split, click_samples
from din_fast.models import DIN, History, Sparse
from examples import training

COLUMNS = ("user_id", "item_id", "cate_id", "time")
LENGTH, DIM, BATCH, LEARNING_RATE, SEED = 50, 16, 1024, 3e-3, 2022
USERS, ITEMS, CATEGORIES = 2000, 800, 20  # of the log that is made here


def write_log(path: Path, users: int, seed: int) -> None:
    """A CSV whose users click items of three categories of their own four times in five, popular items more often."""
    rng = np.random.default_rng(seed)
    category_of = rng.integers(0, CATEGORIES, ITEMS)
    popularity = 1 / np.arange(1, ITEMS + 1) ** 0.5
    rows = []
    for user in range(users):
        clicks = int(rng.integers(6, 30))
        liked = np.isin(category_of, rng.choice(CATEGORIES, 3, replace=False))
        weight = popularity * np.where(liked, 0.8 / popularity[liked].sum(), 0.2 / popularity[~liked].sum())
        item = rng.choice(ITEMS, clicks, p=weight)
        time = 1_400_000_000 + np.sort(rng.integers(0, 10**7, clicks))
        rows.append(np.stack([np.full(clicks, user), item, category_of[item], time], axis=1))
    pd.DataFrame(np.concatenate(rows), columns=list(COLUMNS)).to_csv(path, index=False)


def read(path: Path) -> Split:
    """The samples of a CSV.

    Raises:
        ValueError: a column is missing.
    """
    log = pd.read_csv(path)
    missing = [name for name in COLUMNS if name not in log.columns]
    if missing:
        raise ValueError(f"csv: expected the columns {', '.join(COLUMNS)}; {path} has no {', '.join(missing)}")
    return click_samples(*(log[name].to_numpy() for name in COLUMNS), length=LENGTH, seed=SEED)


def build(vocabulary: dict[str, int]) -> DIN:
    """DIN with one unit for the items and one for their categories."""
    torch.manual_seed(SEED)
    features = [
        *(Sparse(name, vocabulary[name], DIM) for name in ("user", "item", "cate")),
        History("hist_item", "item"),
        History("hist_cate", "cate"),
    ]
    return DIN(features, attention="fused")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.amazon_electronics", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--csv", type=Path, help="the log; without it a small one is made")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training clicks (default: %(default)s)")
    parser.add_argument("--users", type=int, default=USERS, help="of the log that is made (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {given.epochs}")
    if given.csv is None:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "log.csv"
            write_log(made, given.users, SEED)
            print(f"no --csv was given: a log made here, {given.users} users who prefer three categories each")
            data = read(made)
    else:
        data = read(given.csv)
    print(f"{len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test samples")
    model = build(data.vocabulary)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(SEED)
    for epoch in range(1, given.epochs + 1):
        batches = training.shuffled(len(data.train), BATCH, generator)
        losses = training.train(model, optimizer, data.train, tqdm(batches, desc=f"epoch {epoch}", unit="batch"))
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}, validation AUC {training.auc(model, data.validation):.4f}")
    print(f"DIN, din_fast's backend {training.backends(model)}: test AUC {training.auc(model, data.test):.4f}")


if __name__ == "__main__":
    main()

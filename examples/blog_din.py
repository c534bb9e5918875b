"""The DIN of a widely copied 2022 blog post, with continuous columns beside the embedded ones, on data made here.

``python -m examples.blog_din`` trains it with the unit in plain PyTorch and with din_fast's, and prints both. Its unit
is ``din_fast.preset("blog")``: [h, t, h-t, h*t] -> Linear -> PReLU -> Linear -> sigmoid, and the mean of the history by
these weights. Two things are as the post means them and not as its code does them: columns are taken by feature (the
code cuts them by the size of the batch), and the mean is over the valid positions (the code divides by the padded
length, so that a short history counts for less).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from din_fast import FusedActivationUnit, preset, reference
from din_fast.data import Samples
from examples import training

ITEMS, CATEGORIES, LENGTH = 300, 12, 20
DIM, HIDDEN, BATCH, EPOCHS, LEARNING_RATE = 8, (64, 32), 256, 3, 5e-3
SEED = 2022
UNITS = ("reference", "fused")


class Columns(nn.Module):
    """A group of columns as one vector: each id column by its own table, the continuous columns as they are."""

    def __init__(self, tables: Sequence[int], numbers: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, DIM) for rows in tables)
        self.width = len(tables) * DIM + numbers

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """ids (..., tables) int, numbers (..., numbers) float -> (..., width)."""
        return torch.cat([*(table(ids[..., i]) for i, table in enumerate(self.tables)), numbers], dim=-1)


class BlogDIN(nn.Module):
    """Candidate, recent items, user and context; the candidate and the recent items share their tables.

    Args:
        unit: ``reference`` or ``fused``, with the same state_dict keys.
    """

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.item = Columns((ITEMS + 1, CATEGORIES + 1), numbers=1)
        self.user = Columns((3, 5), numbers=1)
        self.context = Columns((24,), numbers=1)
        width, spec = self.item.width, preset("blog")
        self.unit = FusedActivationUnit(width, spec=spec) if unit == "fused" else reference.ActivationUnit(width, spec)
        layers: list[nn.Module] = []
        inputs = 2 * width + self.user.width + self.context.width
        for units in HIDDEN:
            layers += [nn.Linear(inputs, units), nn.PReLU()]
            inputs = units
        self.top = nn.Sequential(*layers, nn.Linear(inputs, 1))

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """``*_ids`` and ``*_numbers`` of candidate, user, context (B, columns) and recent (B, L, columns) -> (B,)."""
        candidate = self.item(x["candidate_ids"], x["candidate_numbers"])
        recent = self.item(x["recent_ids"], x["recent_numbers"])
        interest = self.unit(recent, candidate, x["recent_ids"][..., 0] != 0)
        user = self.user(x["user_ids"], x["user_numbers"])
        context = self.context(x["context_ids"], x["context_numbers"])
        logits: Tensor = self.top(torch.cat([candidate, interest, user, context], dim=1))
        return logits.squeeze(1)


def make(samples: int, seed: int) -> Samples:
    """Samples with a planted signal: clicks follow the share of the candidate's category in the history, how near its
    price is to what the user pays, and the hour."""
    rng = np.random.default_rng(seed)
    category_of = rng.integers(1, CATEGORIES + 1, ITEMS + 1)
    price_of = rng.normal(size=ITEMS + 1)
    category_of[0], price_of[0] = 0, 0.0
    by_category, size = np.argsort(category_of), np.bincount(category_of)

    favourite = rng.integers(1, CATEGORIES + 1, (samples, 1))
    first = np.cumsum(size) - size  # of each category, in by_category
    liked = by_category[first[favourite] + rng.integers(size[favourite], size=(samples, LENGTH))]
    recent = np.where(rng.random((samples, LENGTH)) < 0.6, liked, rng.integers(1, ITEMS + 1, (samples, LENGTH)))
    recent[np.arange(LENGTH) >= rng.integers(1, LENGTH + 1, (samples, 1))] = 0
    candidate = np.where(rng.random(samples) < 0.5, liked[:, 0], rng.integers(1, ITEMS + 1, samples))
    pays, hour, days_away = rng.normal(size=samples), rng.integers(0, 24, samples), rng.exponential(size=samples)

    same = category_of[recent] == category_of[candidate][:, None]
    share = (same & (recent > 0)).sum(1) / (recent > 0).sum(1)
    logit = 6 * share - 1.5 * np.abs(price_of[candidate] - pays) + 0.5 * (hour >= 18)
    x = {
        "candidate_ids": np.stack([candidate, category_of[candidate]], axis=-1),
        "candidate_numbers": price_of[candidate][:, None],
        "recent_ids": np.stack([recent, category_of[recent]], axis=-1),
        "recent_numbers": price_of[recent][..., None],
        "user_ids": np.stack([rng.integers(0, 3, samples), rng.integers(0, 5, samples)], axis=-1),
        "user_numbers": pays[:, None],
        "context_ids": hour[:, None],
        "context_numbers": days_away[:, None],
    }
    tensors = {name: torch.from_numpy(v if name.endswith("ids") else v.astype(np.float32)) for name, v in x.items()}
    clicks = rng.random(samples) < 1 / (1 + np.exp(-logit))
    return Samples(tensors, torch.from_numpy(clicks.astype(np.float32)))


def run(unit: str, samples: Samples, test: Samples) -> str:
    """Train with one of the two units; a line of the table."""
    torch.manual_seed(SEED)
    model = BlogDIN(unit)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(SEED)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        losses = training.train(model, optimizer, samples, training.shuffled(len(samples), BATCH, generator))
    seconds = time.perf_counter() - start
    auc = training.auc(model, test)
    return f"{unit:10}{training.backends(model):>10}{np.mean(losses):12.4f}{auc:10.4f}{seconds:9.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.blog_din", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=20_000, help="of the training (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.samples < 2:
        parser.error(f"--samples: expected at least 2, got {given.samples}")
    made = make(given.samples + 4000, SEED)
    rows = torch.arange(len(made))
    samples, test = made.take(rows[:-4000]), made.take(rows[-4000:])
    print(f"{len(samples)} training and {len(test)} test samples, {samples.label.mean():.0%} clicked; {EPOCHS} epochs")
    print(f"{'unit':10}{'backend':>10}{'train loss':>12}{'test AUC':>10}{'seconds':>9}")
    for unit in UNITS:
        print(run(unit, samples, test))


if __name__ == "__main__":
    main()

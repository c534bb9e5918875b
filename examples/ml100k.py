"""Click samples from the MovieLens ml-100k ratings that the recbole wheel carries.

A rating of 4 or 5 is a click. A user's clicks are put in time order (equal times keep the order of the file). Every
click but the first gives a positive sample, whose history is the clicks before it, and a negative sample with the same
history and an item that the user never rated, drawn uniformly. Histories keep the most recent ``length`` clicks, oldest
first, and are padded with 0 at the end, as torch-rechub pads them. The last ``held_out`` clicks of each user are the
test.
"""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from din_fast.data import Samples as Samples

CLICK_RATING = 4
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClickData:
    """Training and test samples, and the rows that each feature's embedding table needs (ids start at 1).

    The samples are in torch-rechub's form: feature name -> ids, int32, (N,), or (N, length) for the histories
    ``hist_item`` and ``hist_cate``; 0 pads.
    """

    train: Samples
    test: Samples
    vocabulary: dict[str, int]


@dataclass(frozen=True)
class Tables:
    """The raw tables.

    Attributes:
        ratings: columns user, item, rating, timestamp.
        items: columns item, genres.
        users: columns user, age, gender, occupation.
    """

    ratings: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame


def find_folder() -> Path:
    """The folder of ml-100k inside the installed recbole, found without importing recbole (which would need ray).

    Raises:
        FileNotFoundError: recbole is not installed, or carries no ml-100k.
    """
    spec = importlib.util.find_spec("recbole")
    if spec is None or spec.submodule_search_locations is None:
        raise FileNotFoundError("the ml-100k ratings come with recbole: pip install --no-deps recbole==1.2.1")
    folder = Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k"
    if not (folder / "ml-100k.inter").is_file():
        raise FileNotFoundError(f"the installed recbole carries no ml-100k.inter in {folder}")
    return folder


def read(folder: Path) -> Tables:
    """The three tables of ml-100k in RecBole's format (tab-separated, columns named ``name:type``)."""
    return Tables(
        _table(
            folder / "ml-100k.inter",
            {"user_id": "user", "item_id": "item", "rating": "rating", "timestamp": "timestamp"},
        ),
        _table(folder / "ml-100k.item", {"item_id": "item", "class": "genres"}),
        _table(
            folder / "ml-100k.user", {"user_id": "user", "age": "age", "gender": "gender", "occupation": "occupation"}
        ),
    )


def _table(path: Path, names: dict[str, str]) -> pd.DataFrame:
    frame = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    frame.columns = pd.Index([str(column).split(":")[0] for column in frame.columns])
    return frame[list(names)].rename(columns=names)


def build(tables: Tables, *, length: int, held_out: int, seed: int) -> ClickData:
    """Turn ratings into training and test samples.

    Args:
        tables: the raw tables; every rated item and every user must be in them once.
        length: L, the positions of a history.
        held_out: how many of each user's last clicks are for the test; the others are for training.
        seed: of the negatives, one for each positive.

    Returns:
        Samples, positive and negative alternating, users in order of their id and clicks in order of time. The item's
        category is its combination of genres.

    Raises:
        ValueError: a user has rated every item, so that no negative is left.
    """
    items = {item: code for code, item in enumerate(np.sort(tables.items["item"].to_numpy()), start=1)}
    category, categories = _codes(tables.items.set_index("item").loc[list(items), "genres"])
    category_of = np.concatenate([[0], category])
    users = tables.users.sort_values("user")
    profile = {name: _codes(users[name]) for name in ("user", "age", "gender", "occupation")}
    row_of_user = {user: row for row, user in enumerate(users["user"])}

    rng = np.random.default_rng(seed)
    parts: dict[str, list[_Block]] = {"train": [], "test": []}
    for user, rated in tables.ratings.sort_values("timestamp", kind="stable").groupby("user"):
        codes = rated["item"].map(items).to_numpy()
        clicks = codes[rated["rating"].to_numpy() >= CLICK_RATING]
        if len(clicks) < 2:
            continue
        unseen = np.setdiff1d(np.arange(1, len(items) + 1), codes)
        if len(unseen) == 0:
            raise ValueError(f"user {user} has rated every item, no negative is left to draw")
        negatives = rng.choice(unseen, size=len(clicks))
        first_test = max(1, len(clicks) - held_out)
        row = row_of_user[user]
        parts["train"].append(_block(row, clicks, negatives, range(1, first_test), length))
        parts["test"].append(_block(row, clicks, negatives, range(first_test, len(clicks)), length))

    vocabulary = {name: count + 1 for name, (_, count) in profile.items()}
    vocabulary |= {"item": len(items) + 1, "cate": categories + 1}
    codes_of_profile = {name: codes for name, (codes, _) in profile.items()}
    train, test = (_samples(parts[name], category_of, codes_of_profile) for name in ("train", "test"))
    return ClickData(train, test, vocabulary)


@dataclass(frozen=True)
class _Block:
    """The samples of one user: profile row (N,), target item (N,), history (N, L), label (N,)."""

    row: Integers
    target: Integers
    history: Integers
    label: Integers


def _block(row: int, clicks: Integers, negatives: Integers, positions: range, length: int) -> _Block:
    """A positive and a negative sample for each of these positions in a user's clicks."""
    history = np.zeros((len(positions), length), dtype=np.int64)
    for i, position in enumerate(positions):
        recent = clicks[max(0, position - length) : position]
        history[i, : len(recent)] = recent
    where = np.asarray(positions, dtype=np.int64)
    target = np.stack([clicks[where], negatives[where]], axis=1).reshape(-1)
    label = np.tile([1, 0], len(where))
    return _Block(np.full(len(target), row), target, history.repeat(2, axis=0), label)


def _samples(blocks: list[_Block], category_of: Integers, profile: dict[str, Integers]) -> Samples:
    row, target, history, label = (
        np.concatenate([getattr(block, name) for block in blocks]) for name in ("row", "target", "history", "label")
    )
    x = {name: codes[row] for name, codes in profile.items()}
    x |= {"item": target, "cate": category_of[target], "hist_item": history, "hist_cate": category_of[history]}
    ids = {name: torch.from_numpy(values.astype(np.int32)) for name, values in x.items()}
    return Samples(ids, torch.from_numpy(label.astype(np.float32)))


def _codes(column: pd.Series[Any]) -> tuple[Integers, int]:
    """Each value's number, from 1 in sorted order, and how many different values there are."""
    codes, values = pd.factorize(column, sort=True)
    return codes.astype(np.int64) + 1, len(values)

"""Samples from a log of clicks: against a loop, against torch-rechub, and what must hold of negatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch_rechub.utils import data as rechub

from din_fast.data import Samples, Split, click_samples, encode

LENGTH = 6


def log(seed: int = 0, rows: int = 300, repeats: bool = True) -> pd.DataFrame:
    """Clicks of users 10, 11, ... on items with gaps in their ids; times are all different, in no order."""
    rng = np.random.default_rng(seed)
    item = rng.integers(0, 60, rows) * 7 + 100
    frame = pd.DataFrame(
        {"user_id": rng.integers(10, 40, rows), "item_id": item, "cate_id": item % 5, "time": rng.permutation(rows)}
    )
    return frame if repeats else frame.drop_duplicates(["user_id", "item_id"], ignore_index=True)


def build(frame: pd.DataFrame, **options: Any) -> Split:
    columns = (frame[name].to_numpy() for name in ("user_id", "item_id", "cate_id", "time"))
    return click_samples(*columns, **{"length": LENGTH, **options})


def naive(
    frame: pd.DataFrame, held_out: int, truncate: str, pad: str
) -> dict[str, list[tuple[int, int, int, list[int], list[int]]]]:
    """The positive samples by a loop over rows: (user, item, cate, hist_item, hist_cate), ids from 1."""
    frame = frame.copy()
    for name in ("user_id", "item_id", "cate_id"):
        values = sorted(set(frame[name]))
        frame[name] = [values.index(v) + 1 for v in frame[name]]
    parts: dict[str, list[tuple[int, int, int, list[int], list[int]]]] = {"train": [], "validation": [], "test": []}
    for user in sorted(set(frame["user_id"])):
        clicks = frame[frame["user_id"] == user].sort_values("time", kind="stable")
        items, categories = clicks["item_id"].tolist(), clicks["cate_id"].tolist()
        for i in range(1, len(items)):
            histories = []
            for ids in (items[:i], categories[:i]):
                kept = ids[-LENGTH:] if truncate == "front" else ids[:LENGTH]
                zeros = [0] * (LENGTH - len(kept))
                histories.append(kept + zeros if pad == "back" else zeros + kept)
            from_end = len(items) - 1 - i
            part = "test" if from_end < held_out else "validation" if from_end < 2 * held_out else "train"
            parts[part].append((user, items[i], categories[i], histories[0], histories[1]))
    return parts


def positives(samples: Samples) -> list[tuple[Any, ...]]:
    rows = samples.take(torch.nonzero(samples.label == 1).squeeze(1))
    return list(
        zip(*(rows.x[name].tolist() for name in ("user", "item", "cate", "hist_item", "hist_cate")), strict=True)
    )


@pytest.mark.parametrize("pad", ["front", "back"])
@pytest.mark.parametrize("truncate", ["front", "back"])
@pytest.mark.parametrize("held_out", [1, 3])
def test_as_a_loop_over_rows(held_out: int, truncate: str, pad: str) -> None:
    frame = log()
    split = build(frame, held_out=held_out, truncate=truncate, pad=pad)
    expected = naive(frame, held_out, truncate, pad)
    assert len(expected["train"]) > 50
    for part, samples in (("train", split.train), ("validation", split.validation), ("test", split.test)):
        assert positives(samples) == expected[part]
        assert all(ids.dtype == torch.int32 for ids in samples.x.values()) and samples.label.dtype == torch.float32


def as_positives(frame: pd.DataFrame, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    clicked = frame[frame["label"] == 1]
    return sorted(clicked[list(columns)].itertuples(index=False, name=None))


def test_as_torch_rechub_s_generate_seq_feature() -> None:
    """The same samples in the same parts, while no history is truncated (it drops what comes after max_len clicks)."""
    frame = log()
    length = int(frame["user_id"].value_counts().max())
    ours = build(frame, length=length)
    parts = rechub.generate_seq_feature(frame.copy(), "user_id", "item_id", "time", ["cate_id"], max_len=length)
    columns = ("user_id", "target_item_id", "target_cate_id", "hist_item_id", "hist_cate_id")
    for theirs, samples in zip(parts, (ours.train, ours.validation, ours.test), strict=True):
        assert sorted(positives(samples)) == as_positives(theirs, columns)
        assert len(samples) == len(theirs)


def test_as_torch_rechub_s_create_seq_features() -> None:
    """Validation and test; its training part holds its test samples as well."""
    frame = log()
    length = int(frame["user_id"].value_counts().max())
    ours = build(frame, length=length)
    parts = rechub.create_seq_features(frame.copy(), max_len=length, drop_short=2)
    columns = ("user_id", "target_item", "target_cate", "history_item", "history_cate")
    for theirs, samples in zip(parts[1:], (ours.validation, ours.test), strict=True):
        assert sorted(positives(samples)) == as_positives(theirs, columns)


@pytest.mark.parametrize(("pad", "padding"), [("front", "pre"), ("back", "post")])
@pytest.mark.parametrize(("truncate", "truncating"), [("front", "pre"), ("back", "post")])
def test_as_torch_rechub_s_pad_sequences(truncate: str, truncating: str, pad: str, padding: str) -> None:
    whole = build(log(), length=300).train.x["hist_item"]
    ours = build(log(), truncate=truncate, pad=pad).train.x["hist_item"]
    sequences = [[i for i in row if i] for row in whole.tolist()]
    theirs = rechub.pad_sequences(sequences, maxlen=LENGTH, padding=padding, truncating=truncating)
    np.testing.assert_array_equal(ours.numpy(), theirs)


def test_a_negative_follows_its_positive_and_was_never_clicked() -> None:
    frame = log()
    split = build(frame)
    users, items = split.values["user"], split.values["item"]
    clicked = set(zip(frame["user_id"], frame["item_id"], strict=True))
    category = dict(zip(frame["item_id"], frame["cate_id"], strict=True))
    for samples in (split.train, split.validation, split.test):
        assert samples.label.tolist() == [1.0, 0.0] * (len(samples) // 2)
        for name in ("user", "hist_item", "hist_cate"):
            assert torch.equal(samples.x[name][0::2], samples.x[name][1::2])
        for user, item, cate, label in zip(
            *(samples.x[n].tolist() for n in ("user", "item", "cate")), samples.label.tolist(), strict=True
        ):
            assert ((users[user - 1], items[item - 1]) in clicked) == bool(label)
            assert split.values["cate"][cate - 1] == category[items[item - 1]]


def test_negatives_are_uniform_over_what_a_user_never_clicked() -> None:
    """User 1 clicked 1, 2, 5 and 8 of the nine items: 20000 draws from the other five."""
    item = [5, *([8, 1, 2, 5] * 5000), 3, 4, 6, 7, 9]
    user = [1] * 20001 + [2] * 5
    split = click_samples(user, item, item, range(len(item)), length=1)
    drawn = split.train.x["item"][(split.train.x["user"] == 1) & (split.train.label == 0)]
    counts = torch.bincount(drawn, minlength=10)
    assert counts[[0, 1, 2, 5, 8]].sum() == 0
    expected = len(drawn) / 5
    assert ((counts[[3, 4, 6, 7, 9]] - expected).abs() < 5 * expected**0.5).all()


def test_the_seed_decides_the_negatives_and_nothing_else() -> None:
    first, same, other = (build(log(), seed=seed).train for seed in (1, 1, 2))
    assert all(torch.equal(first.x[name], same.x[name]) for name in first.x)
    assert not torch.equal(first.x["item"], other.x["item"])
    assert positives(first) == positives(other)


def test_equal_times_keep_the_order_of_the_log() -> None:
    split = click_samples([1, 1, 1, 2], ["c", "a", "b", "z"], [0, 0, 0, 0], [5, 5, 5, 5], length=2)
    assert positives(split.test) == [(1, 2, 1, [3, 1], [1, 1])]


def test_ids_of_any_type_come_back() -> None:
    split = click_samples(["ann", "ann", "bob"], ["x", "y", "z"], ["k", "k", "l"], [1, 2, 3], length=3)
    assert split.vocabulary == {"user": 3, "item": 4, "cate": 3}
    ids, values = encode(["b", "a", "b"])
    assert ids.tolist() == [2, 1, 2] and values.tolist() == ["a", "b"]
    assert (len(split.train), len(split.validation), len(split.test)) == (0, 0, 2)
    assert split.train.x["hist_item"].shape == (0, 3)
    assert split.values["item"][split.test.x["item"].tolist()[0] - 1] == "y"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, r"length: expected at least 1, got 0"),
        ({"held_out": 0}, r"held_out: expected at least 1, got 0"),
        ({"truncate": "pre"}, r"truncate: expected front or back, got 'pre'"),
        ({"pad": "post"}, r"pad: expected front or back, got 'post'"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(log(), **change)


def test_bad_columns() -> None:
    with pytest.raises(ValueError, match=r"item: expected the shape \(2,\) as user, got \(3,\)"):
        click_samples([1, 1], [1, 2, 3], [1, 1], [1, 2], length=2)
    with pytest.raises(ValueError, match=r"user: expected the shape \(N,\), N at least 1, got \(0,\)"):
        click_samples([], [], [], [], length=2)
    with pytest.raises(ValueError, match="item: expected at least one that user 7 never clicked, got none"):
        click_samples([7, 7, 8], ["a", "b", "a"], [0, 0, 0], [1, 2, 3], length=2)

"""The demo: its samples on hand-written ratings, and one tiny run from end to end."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from din_fast import FusedActivationUnit, dispatch
from examples import demo, ml100k, rows
from examples.rows import FUSED, RECHUB, SUM, Settings

ITEMS = pd.DataFrame(
    {"item": range(10, 90, 10), "genres": ["Drama", "War", "Drama", "Comedy", "War", "Drama", "Action", "War"]}
)
USERS = pd.DataFrame({"user": [7, 3], "age": [30, 20], "gender": ["F", "M"], "occupation": ["writer", "artist"]})
# (user, item, rating, timestamp); user 3 clicks 40, 20, 10, 60 in this order, and rates 30 and 50 too low to count.
RATINGS = [
    (3, 10, 4, 300),
    (3, 20, 5, 200),
    (7, 80, 5, 900),
    (3, 30, 3, 250),
    (3, 40, 4, 100),
    (3, 50, 1, 50),
    (3, 60, 5, 400),
]


def build(
    ratings: list[tuple[int, int, int, int]], length: int = 3, held_out: int = 1, seed: int = 0
) -> ml100k.ClickData:
    frame = pd.DataFrame(ratings, columns=["user", "item", "rating", "timestamp"])
    return ml100k.build(ml100k.Tables(frame, ITEMS, USERS), length=length, held_out=held_out, seed=seed)


def items_of(ids: torch.Tensor) -> list[Any]:
    """Codes back to the item numbers of the tables (code 1 is item 10); 0 stays 0."""
    return (ids * 10).tolist()


def test_histories_are_the_earlier_clicks_in_time_order() -> None:
    data = build(RATINGS)
    positive = data.train.label == 1
    assert items_of(data.train.x["item"][positive]) == [20, 10]
    assert items_of(data.train.x["hist_item"][positive]) == [[40, 0, 0], [40, 20, 0]]
    assert items_of(data.test.x["item"][data.test.label == 1]) == [60]
    assert items_of(data.test.x["hist_item"][data.test.label == 1]) == [[40, 20, 10]]


def test_only_the_most_recent_clicks_are_kept() -> None:
    data = build(RATINGS, length=2)
    assert items_of(data.test.x["hist_item"]) == [[20, 10], [20, 10]]


def test_equal_times_keep_the_order_of_the_file() -> None:
    data = build([(3, item, 5, 100) for item in (50, 10, 40, 20)])
    assert items_of(data.test.x["hist_item"][0]) == [50, 10, 40]


def test_a_negative_shares_the_history_of_its_positive_and_was_never_rated() -> None:
    drawn = set()
    for seed in range(40):
        data = build(RATINGS, seed=seed)
        for samples in (data.train, data.test):
            assert samples.label.tolist() == [1.0, 0.0] * (len(samples) // 2)
            for name in samples.x:
                if name not in ("item", "cate"):
                    assert torch.equal(samples.x[name][0::2], samples.x[name][1::2])
            drawn |= set(items_of(samples.x["item"][1::2]))
    assert drawn == {70, 80}  # user 3 rated all others, 30 and 50 without a click


def test_categories_and_profiles_follow_their_item_and_user() -> None:
    data = build(RATINGS)
    sample: dict[str, Any] = {name: ids[0].tolist() for name, ids in data.train.x.items()}
    assert sample["cate"] == 4 and sample["hist_cate"] == [2, 0, 0]  # War; Comedy, then pads
    assert [sample[name] for name in ("user", "age", "gender", "occupation")] == [1, 1, 2, 1]
    assert data.vocabulary == {"user": 3, "age": 3, "gender": 3, "occupation": 3, "item": 9, "cate": 5}


def test_a_user_with_one_click_gives_no_sample() -> None:
    data = build(RATINGS)
    assert set(data.train.x["user"].tolist()) | set(data.test.x["user"].tolist()) == {1}


def test_the_same_seed_draws_the_same_negatives() -> None:
    first, second = build(RATINGS, seed=5), build(RATINGS, seed=5)
    assert torch.equal(first.train.x["item"], second.train.x["item"])


def test_a_user_who_rated_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match="user 3 has rated every item"):
        build([(3, item, 5, item) for item in ITEMS["item"]])


def test_the_ratings_of_the_recbole_wheel() -> None:
    tables = ml100k.read(ml100k.find_folder())
    assert (len(tables.ratings), len(tables.items), len(tables.users)) == (100_000, 1682, 943)
    clicks = tables.ratings[tables.ratings["rating"] >= 4]
    held_out = sum(min(5, max(0, n - 1)) for n in clicks.groupby("user").size())
    data = ml100k.build(tables, length=4, held_out=5, seed=0)
    assert len(data.test) == 2 * held_out
    assert len(data.train) + len(data.test) == 2 * (len(clicks) - clicks["user"].nunique())


def tiny_data() -> ml100k.ClickData:
    """Eight users who click at random: three batches of 256."""
    rng = np.random.default_rng(0)
    items = pd.DataFrame({"item": range(1, 81), "genres": rng.choice(["Drama", "War", "Action"], size=80)})
    names = range(1, 9)
    users = pd.DataFrame({"user": names, "age": [20, 30] * 4, "gender": ["F", "M"] * 4, "occupation": ["writer"] * 8})
    ratings = pd.DataFrame(
        [(user, item, 5, time) for user in names for time, item in enumerate(rng.permutation(items["item"])[:60])],
        columns=["user", "item", "rating", "timestamp"],
    )
    return ml100k.build(ml100k.Tables(ratings, items, users), length=TINY.length, held_out=5, seed=0)


# Small, but a step still takes some megabytes, so that its memory can be told from the counters' grain.
TINY = Settings(
    epochs=1,
    backend="reference",
    length=64,
    batch_size=256,
    emb_dim=8,
    attention_dims=(5,),
    mlp_dims=(8,),
    timing_rounds=2,
)


def test_rows_start_from_the_same_weights() -> None:
    models = rows.build_rows(tiny_data().vocabulary, TINY)
    original, fused, summed = (models[name].state_dict() for name in (RECHUB, FUSED, SUM))
    assert original.keys() == fused.keys()
    assert all(torch.equal(original[key], fused[key]) for key in original)
    assert summed.keys() == {key for key in original if not key.startswith("attention_layers")}
    assert all(torch.equal(original[key], summed[key]) for key in summed)
    storages = {tensor.data_ptr() for state in (original, fused, summed) for tensor in state.values()}
    assert len(storages) == len(original) + len(fused) + len(summed)
    assert len(rows.units_of(models[FUSED])) == 2
    assert all(isinstance(unit, FusedActivationUnit) for unit in rows.units_of(models[FUSED]))


def test_another_backend_than_the_named_one_is_an_error() -> None:
    data = tiny_data()
    fused = rows.build_rows(data.vocabulary, TINY)[FUSED]
    fused(data.train.x)
    rows.check_backend(fused, "reference")
    with pytest.raises(RuntimeError, match="asked for the backend native, but reference ran"):
        rows.check_backend(fused, "native")


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        result = demo.run(TINY, tiny_data(), progress)
    demo.write(result, tmp_path)
    read = json.loads((tmp_path / "demo.json").read_text())
    assert read == json.loads(json.dumps(result))
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert read["settings"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert read["environment"]["threads"] == torch.get_num_threads()
    assert read["environment"]["versions"]["torch"] == str(torch.__version__)

    losses = {name: row["losses"] for name, row in read["rows"].items()}
    assert list(losses) == [RECHUB, FUSED, SUM]
    assert len(losses[RECHUB]) == read["data"]["training_samples"] // TINY.batch_size == 3
    # Same weights, same batch: the first losses agree. Later ones are compared in float64, below: in float32 rounding
    # of two right formulas is amplified by BatchNorm over embeddings that start at 1e-4, and by Adam.
    np.testing.assert_allclose(losses[FUSED][0], losses[RECHUB][0], rtol=0, atol=1e-6)
    assert losses[SUM] != losses[RECHUB]
    for name, row in read["rows"].items():
        assert row["backend"] == ("reference" if name == FUSED else None)
        assert 0 <= row["test_auc"] <= 1 and row["test_loss"] > 0 and row["train_loss"] > 0
        for timing in (row["step_ms"], row["units_ms"]):
            assert 0 < timing["p20"] <= timing["median"] <= timing["p80"]
        assert row["peak_memory_mib"] > (0 if name == SUM else 1)
    comparison = read["comparison"]
    assert comparison["largest_loss_difference"] == max(comparison["loss_differences"])
    assert comparison["step_speedup"] > 0 and comparison["units_speedup"] > 0
    exact = read["float64"]
    assert exact["steps"] == 3
    assert exact["largest_loss_difference"] <= 1e-11
    assert all(0 < exact["distance_of_float32"][name] < 1e-2 for name in (RECHUB, FUSED))

    console = Console(width=79, record=True, file=io.StringIO())
    console.print(demo.table(result), *demo.summary(result))
    printed = console.export_text()
    for row in read["rows"].values():
        assert f"{row['test_auc']:.4f}" in printed
    assert f"{comparison['largest_loss_difference']:.1e}" in printed


def test_the_command_stops_where_the_backend_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: "no kernel here")
    with pytest.raises(SystemExit, match="needs the native backend, which cannot run: no kernel here"):
        demo.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())

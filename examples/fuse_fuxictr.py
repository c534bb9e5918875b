"""FuxiCTR's DIN, trained by its fit: ``python -m examples.fuse_fuxictr [--quick]``."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench import hosts

with hosts.importing("fuxictr"):  # where ray is installed: imported as ever
    from fuxictr.features import FeatureMap
    from model_zoo.LongCTR.DIN.DIN import DIN

import din_fast
from din_fast.data import Samples
from examples.fuse_training import BATCH, DIM, Run, Trained, clicks, main, seconds_of, seed_everything

PROFILE, ITEM = ("user", "age", "gender", "occupation"), ("item", "cate")


def build(vocabulary: dict[str, int], epochs: int, folder: str) -> Any:
    """A profile, the item, its category and their history: one activation unit, with FuxiCTR's defaults."""
    features = FeatureMap("", folder)
    for name in (*PROFILE, *ITEM):
        source = "item" if name in ITEM else "user"
        spec = {"type": "categorical", "source": source, "vocab_size": vocabulary[name], "padding_idx": 0}
        features.features[name] = spec
    features.labels, features.default_emb_dim = ["click"], DIM
    options = {"optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["AUC"], "early_stop_patience": epochs}
    return DIN(features, embedding_dim=DIM, dnn_hidden_units=[256, 128], model_root=folder, verbose=0, **options)


def batches(samples: Samples, shuffle: bool) -> DataLoader[Any]:
    """What FuxiCTR's LongCTRDataLoader gives, without its parquet files: (features of the user, of items, mask)."""

    def collate(rows: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        batch = samples.take(torch.tensor(rows))
        x = batch.x
        # The target stands behind its history.
        items = {name: torch.cat([x[f"hist_{name}"], x[name][:, None]], dim=1).flatten() for name in ITEM}
        user = {name: x[name] for name in PROFILE}
        return {**user, "click": batch.label}, items, (x["hist_item"] > 0).float()

    return DataLoader(range(len(samples)), BATCH, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]


def train(run: Run) -> Trained:
    """As a user of FuxiCTR does it; fuse is the one line more."""
    data = clicks(run.quick)
    training, validation, test = batches(data.train, True), batches(data.validation, False), batches(data.test, False)
    with TemporaryDirectory() as folder:  # fit keeps the best epoch there
        seed_everything(run.seed)
        model = build(data.vocabulary, run.epochs, folder)
        if run.fused:
            print(din_fast.fuse(model, strict=True))
        seconds = seconds_of(lambda: model.fit(training, epochs=run.epochs, validation_data=validation))
    return Trained(model, model.evaluate(test)["AUC"], seconds / run.epochs)


if __name__ == "__main__":
    main("FuxiCTR", train)

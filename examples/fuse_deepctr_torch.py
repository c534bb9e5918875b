"""DeepCTR-Torch's DIN, trained by its fit: ``python -m examples.fuse_deepctr_torch [--quick]``."""

from __future__ import annotations

from typing import Any

from bench import hosts

with hosts.importing("deepctr_torch"):  # for its question to the package index; else imported as ever
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import DIN

import din_fast
from din_fast.data import Samples
from examples.fuse_training import BATCH, DIM, LENGTH, Run, Trained, arrays, clicks, main, seconds_of, seed_everything


def build(vocabulary: dict[str, int], seed: int) -> Any:
    """A profile, the item, its category and the histories of both: one activation unit."""
    columns: list[Any] = [SparseFeat(name, size, DIM) for name, size in vocabulary.items()]
    for name in ("item", "cate"):
        ids = SparseFeat(f"hist_{name}", vocabulary[name], DIM, embedding_name=name)
        columns.append(VarLenSparseFeat(ids, LENGTH, length_name="length"))
    model = DIN(columns, ["item", "cate"], att_hidden_size=(64, 16), seed=seed)
    model.compile("adam", "binary_crossentropy", metrics=["auc"])
    return model


def features(samples: Samples) -> dict[str, Any]:
    """What fit takes."""
    return {**arrays(samples), "length": (samples.x["hist_item"] > 0).sum(dim=1).numpy()}


def train(run: Run) -> Trained:
    """As a user of DeepCTR-Torch does it; fuse is the one line more."""
    data = clicks(run.quick)
    validation, test = ((features(part), part.label.numpy()) for part in (data.validation, data.test))
    seed_everything(run.seed)
    model = build(data.vocabulary, run.seed)
    if run.fused:
        print(din_fast.fuse(model, strict=True))
    fit = {"batch_size": BATCH, "epochs": run.epochs, "validation_data": validation, "verbose": 2}
    seconds = seconds_of(lambda: model.fit(features(data.train), data.train.label.numpy(), **fit))
    return Trained(model, model.evaluate(*test, BATCH)["auc"], seconds / run.epochs)


if __name__ == "__main__":
    main("DeepCTR-Torch", train)

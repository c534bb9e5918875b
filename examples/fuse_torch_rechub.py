"""torch-rechub's DIN, trained by its CTRTrainer: ``python -m examples.fuse_torch_rechub [--quick]``."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from torch import nn
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

import din_fast
from examples.fuse_training import BATCH, DIM, Run, Trained, clicks, main, seconds_of, seed_everything


def build(vocabulary: dict[str, int]) -> nn.Module:
    """A profile, the item, its category and the histories of both: two activation units."""
    profile = [SparseFeature(name, vocabulary[name], DIM) for name in ("user", "age", "gender", "occupation")]
    target = [SparseFeature(name, vocabulary[name], DIM) for name in ("item", "cate")]
    history = [
        SequenceFeature(f"hist_{name}", vocabulary[name], DIM, pooling="concat", shared_with=name)
        for name in ("item", "cate")
    ]
    model: nn.Module = DIN(profile, history, target, {"dims": [256, 128]}, {"dims": [36]})
    return model


def train(run: Run) -> Trained:
    """As a user of torch-rechub does it; fuse is the one line more."""
    data = clicks(run.quick)
    generator = DataGenerator(data.train.x, data.train.label)
    parts = {
        "x_val": data.validation.x,
        "y_val": data.validation.label,
        "x_test": data.test.x,
        "y_test": data.test.label,
    }
    training, validation, test = generator.generate_dataloader(**parts, batch_size=BATCH)
    seed_everything(run.seed)
    model = build(data.vocabulary)
    if run.fused:
        print(din_fast.fuse(model, strict=True))
    with TemporaryDirectory() as folder:
        trainer = CTRTrainer(model, n_epoch=run.epochs, model_path=folder)
        seconds = seconds_of(lambda: trainer.fit(training, validation))
    return Trained(model, trainer.evaluate(model, test), seconds / run.epochs)


if __name__ == "__main__":
    main("torch-rechub", train)

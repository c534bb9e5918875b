"""RecBole's DIN, run by its data set, its trainer and its evaluation: ``python -m examples.fuse_recbole [--quick]``.

The data are RecBole's ml-100k as RecBole loads it: a rating of 4 or more is a click, the history is whatever was rated
before, the last tenth of each user's ratings is the test.
"""

from __future__ import annotations

import warnings
from tempfile import TemporaryDirectory
from typing import Any

from bench import hosts

with hosts.importing("recbole"):  # where its requirements are installed: imported as ever
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender.din import DIN
    from recbole.utils import get_trainer, init_seed

import din_fast
from examples.fuse_training import BATCH, DIM, LENGTH, Run, Trained, main, seconds_of

SETTINGS: dict[str, Any] = {
    # Items by their ids alone: RecBole 1.2.1 fills the pad's row of further columns by a way that pandas 3 has closed.
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    "threshold": {"rating": 4},
    "MAX_ITEM_LIST_LENGTH": LENGTH,
    "embedding_size": DIM,
    "mlp_hidden_size": [64, 32],
    "train_neg_sample_args": None,  # ratings below 4 are what was not clicked
    "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "labeled"},
    "metrics": ["AUC"],
    "valid_metric": "AUC",
    "metric_decimal_place": 6,
    "train_batch_size": BATCH,
    "eval_batch_size": BATCH,
    "use_gpu": False,
}
QUICK = {"val_interval": {"timestamp": "[0,876000000]"}}  # the first days


def config(run: Run, folder: str) -> Any:
    """RecBole's settings: its own for DIN and ml-100k, and ours."""
    settings = SETTINGS | (QUICK if run.quick else {})
    settings |= {"epochs": run.epochs, "seed": run.seed, "checkpoint_dir": folder}
    return Config(model="DIN", dataset="ml-100k", config_dict=settings)


def load(settings: Any) -> tuple[Any, Any, Any]:
    """Training, validation and test, as RecBole prepares them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 3 says that nothing was filled; these columns have no gaps
        training, validation, test = data_preparation(settings, create_dataset(settings))
    return training, validation, test


def train(run: Run) -> Trained:
    """The steps of RecBole's run_recbole; fuse is the one line more."""
    with TemporaryDirectory() as folder:
        settings = config(run, folder)
        init_seed(settings["seed"], settings["reproducibility"])
        training, validation, test = load(settings)
        init_seed(settings["seed"], settings["reproducibility"])
        model = DIN(settings, training._dataset).to(settings["device"])
        if run.fused:
            print(din_fast.fuse(model, strict=True))
        trainer = get_trainer(settings["MODEL_TYPE"], settings["model"])(settings, model)
        # saved=False: RecBole 1.2.1 cannot load its own checkpoints where torch asks for weights only.
        seconds = seconds_of(lambda: trainer.fit(training, validation, saved=False))
    return Trained(model, float(trainer.evaluate(test, load_best_model=False)["auc"]), seconds / run.epochs)


if __name__ == "__main__":
    main("RecBole", train)

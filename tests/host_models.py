"""A small DIN of each framework, built by the framework's own code, and batches of clicks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests import hosts

USERS, ITEMS, CATES = 20, 30, 5
BATCH, LENGTH, DIM = 32, 10, 6


class Clicks(NamedTuple):
    """Ids of a batch, 0 is the pad; histories are padded at the end, the last one is empty."""

    user: Tensor
    item: Tensor
    history: Tensor
    lengths: Tensor
    label: Tensor


def clicks(seed: int, shortest: int = 0) -> Clicks:
    g = torch.Generator().manual_seed(seed)

    def ids(limit: int, *shape: int) -> Tensor:
        return torch.randint(1, limit, shape, generator=g)

    lengths = torch.randint(1, LENGTH + 1, (BATCH,), generator=g)
    lengths[-1] = shortest
    history = ids(ITEMS, BATCH, LENGTH) * (torch.arange(LENGTH) < lengths[:, None])
    label = torch.randint(0, 2, (BATCH,), generator=g).double()
    return Clicks(ids(USERS, BATCH), ids(ITEMS, BATCH), history, lengths, label)


def cate(item: Tensor) -> Tensor:
    """The category of an item, 0 for the pad."""
    return torch.where(item == 0, 0, item % (CATES - 1) + 1)


class Model(NamedTuple):
    """A model, what it takes as positional arguments, and its probabilities (B,) from what it gives."""

    build: Callable[[], nn.Module]
    arguments: Callable[[Clicks], tuple[Any, ...]]
    probability: Callable[[Any], Tensor]


def _rechub() -> nn.Module:
    features = hosts.load("torch_rechub.basic.features")
    target = [features.SparseFeature("item", ITEMS, DIM), features.SparseFeature("cate", CATES, DIM)]
    history = [
        features.SequenceFeature("hist_item", ITEMS, DIM, pooling="concat", shared_with="item"),
        features.SequenceFeature("hist_cate", CATES, DIM, pooling="concat", shared_with="cate"),
    ]
    model: nn.Module = hosts.load("torch_rechub.models.ranking.din").DIN(
        [features.SparseFeature("user", USERS, DIM)], history, target, {"dims": [8]}, {"dims": [8, 4]}
    )
    return model


def _rechub_arguments(x: Clicks) -> tuple[dict[str, Tensor]]:
    ids = {"user": x.user, "item": x.item, "cate": cate(x.item), "hist_item": x.history, "hist_cate": cate(x.history)}
    return (ids,)


def _deepctr(gru: str | None = None) -> nn.Module:
    inputs = hosts.load("deepctr_torch.inputs")
    columns = [inputs.SparseFeat("user", USERS, DIM), inputs.SparseFeat("item", ITEMS, DIM)]
    item = inputs.SparseFeat("hist_item", ITEMS, DIM, embedding_name="item")
    columns.append(inputs.VarLenSparseFeat(item, LENGTH, length_name="length"))
    if gru is None:
        options = {"att_hidden_size": (8, 4), "att_weight_normalization": True}
        model: nn.Module = hosts.load("deepctr_torch.models.din").DIN(columns, ["item"], **options)
    else:
        model = hosts.load("deepctr_torch.models.dien").DIEN(columns, ["item"], gru_type=gru)
    return model


def _deepctr_arguments(x: Clicks) -> tuple[Tensor]:
    return (torch.cat([t.view(BATCH, -1) for t in (x.user, x.item, x.history, x.lengths)], dim=1).double(),)


def _fuxictr_features() -> Any:
    features = hosts.load("fuxictr.features").FeatureMap("clicks", "")
    kinds = {"user": (USERS, "user"), "item": (ITEMS, "item"), "cate": (CATES, "item")}
    for name, (size, source) in kinds.items():
        features.features[name] = {"type": "categorical", "source": source, "vocab_size": size, "padding_idx": 0}
    features.labels, features.default_emb_dim = ["click"], DIM
    return features


FUXICTR_OPTIONS: dict[str, Any] = {
    "embedding_dim": DIM,
    "optimizer": "SGD",
    "loss": "binary_crossentropy",
    "metrics": ["AUC"],
    "verbose": 0,
    "model_root": "",
    "dnn_hidden_units": [8],
}


def _fuxictr() -> nn.Module:
    model: nn.Module = hosts.load("model_zoo.LongCTR.DIN.DIN").DIN(
        _fuxictr_features(), attention_hidden_units=[8, 4], din_use_softmax=True, **FUXICTR_OPTIONS
    )
    return model


def _fuxictr_dien() -> nn.Module:
    model: nn.Module = hosts.load("model_zoo.LongCTR.DIEN.DIEN").DIEN(
        _fuxictr_features(), attention_type="din_attention", gru_type="AGRU", **FUXICTR_OPTIONS
    )
    return model


def _fuxictr_arguments(x: Clicks) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
    """Histories padded in front and the target behind them, as its loader has them; a float mask."""
    order = (torch.arange(LENGTH) + x.lengths[:, None]) % LENGTH
    items = torch.cat([x.history.gather(1, order), x.item[:, None]], dim=1).flatten()
    mask = (torch.arange(LENGTH) >= LENGTH - x.lengths[:, None]).float()
    return (({"user": x.user}, {"item": items, "cate": cate(items)}, mask),)


class _RecboleDataset:
    """What RecBole's DIN asks its data set for."""

    def __init__(self) -> None:
        token = hosts.load("recbole.utils").FeatureType.TOKEN
        self.field2type = {name: token for name in ("user_id", "item_id", "cate")}

    def num(self, field: str) -> int:
        return {"user_id": USERS, "item_id": ITEMS, "cate": CATES}[field]

    def get_user_feature(self) -> Any:
        return hosts.load("recbole.data.interaction").Interaction({"user_id": torch.arange(USERS)})

    def get_item_feature(self) -> Any:
        item = torch.arange(ITEMS)
        return hosts.load("recbole.data.interaction").Interaction({"item_id": item, "cate": cate(item)})


def _recbole() -> nn.Module:
    config = {
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "LABEL_FIELD": "label",
        "device": torch.device("cpu"),
        "embedding_size": DIM,
        "mlp_hidden_size": [8, 4],
        "pooling_mode": "mean",
        "dropout_prob": 0.0,
        "numerical_features": [],
    }
    model: nn.Module = hosts.load("recbole.model.sequential_recommender.din").DIN(config, _RecboleDataset())
    return model


MODELS: dict[str, Model] = {
    "torch-rechub": Model(_rechub, _rechub_arguments, lambda y: y),
    "DeepCTR-Torch": Model(_deepctr, _deepctr_arguments, lambda y: y.squeeze(1)),
    "DeepCTR-Torch DIEN": Model(lambda: _deepctr("AGRU"), _deepctr_arguments, lambda y: y.squeeze(1)),
    "FuxiCTR": Model(_fuxictr, _fuxictr_arguments, lambda y: y["y_pred"].squeeze(1)),
    "FuxiCTR DIEN": Model(_fuxictr_dien, _fuxictr_arguments, lambda y: y["y_pred"].squeeze(1)),
    "RecBole": Model(_recbole, lambda x: (x.user, x.history, x.lengths, x.item), torch.sigmoid),
}

"""The three models that the demo compares, and the settings that they share."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN

from din_fast import FusedActivationUnit

RECHUB, FUSED, SUM = "torch_rechub", "din_fast", "sum_pooling"
LABELS = {RECHUB: "torch-rechub DIN", FUSED: "with din_fast", SUM: "with sum pooling"}


@dataclass(frozen=True)
class Settings:
    """What one run of the demo does.

    A history of 50 and the attention's hidden layer [36] are torch-rechub's defaults; the last MLP [256, 128] is from
    its DIN example; the optimizer (Adam, learning rate 1e-3, weight decay 1e-5) is that of its CTRTrainer.
    """

    epochs: int = 2
    seed: int = 2022
    backend: str = "native"
    length: int = 50
    held_out: int = 5
    batch_size: int = 1024
    emb_dim: int = 16
    attention_dims: tuple[int, ...] = (36,)
    mlp_dims: tuple[int, ...] = (256, 128)
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    timing_rounds: int = 21


class SumPooling(nn.Module):
    """Stands where an activation unit stands: every history item with weight 1."""

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        """history (B, L, D), target (B, D), which is not used -> (B, D)."""
        return history.sum(dim=1)


def build_din(vocabulary: dict[str, int], settings: Settings) -> nn.Module:
    """torch-rechub's DIN with a user profile and two history features, so two activation units.

    Args:
        vocabulary: rows of each embedding table, as in :class:`examples.ml100k.ClickData`.
        settings: sizes, and the seed of the first weights.
    """
    torch.manual_seed(settings.seed)
    dim = settings.emb_dim
    profile = [SparseFeature(name, vocabulary[name], dim) for name in ("user", "age", "gender", "occupation")]
    target = [SparseFeature(name, vocabulary[name], dim) for name in ("item", "cate")]
    history = [
        SequenceFeature(f"hist_{name}", vocabulary[name], dim, pooling="concat", shared_with=name)
        for name in ("item", "cate")
    ]
    din: nn.Module = DIN(
        features=profile,
        history_features=history,
        target_features=target,
        mlp_params={"dims": list(settings.mlp_dims)},
        attention_mlp_params={"dims": list(settings.attention_dims)},
    )
    return din


def build_rows(vocabulary: dict[str, int], settings: Settings) -> dict[str, nn.Module]:
    """The three models, each with the same first weights: torch-rechub's DIN, then with our units, then without any."""
    din = build_din(vocabulary, settings)
    fused, summed = copy.deepcopy(din), copy.deepcopy(din)
    for i, unit in enumerate(units_of(din)):
        replacement = FusedActivationUnit(settings.emb_dim, settings.attention_dims, backend=settings.backend)
        replacement.load_state_dict(unit.state_dict(), strict=True)
        units_of(fused)[i] = replacement
        units_of(summed)[i] = SumPooling()
    return {RECHUB: din, FUSED: fused, SUM: summed}


def units_of(model: nn.Module) -> nn.ModuleList:
    """The activation units of a torch-rechub DIN, one for each history feature."""
    units = model.attention_layers
    assert isinstance(units, nn.ModuleList)
    return units


def check_backend(model: nn.Module, backend: str) -> None:
    """Raise a RuntimeError unless this backend ran the last call of every fused unit of the model."""
    for unit in units_of(model):
        if isinstance(unit, FusedActivationUnit) and unit.last_backend != backend:
            raise RuntimeError(f"asked for the backend {backend}, but {unit.last_backend} ran")


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that every row is trained with."""
    return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: dict[str, Tensor], label: Tensor) -> float:
    """One step on one batch, as torch-rechub's CTRTrainer does it; the loss (binary cross-entropy) before the step."""
    loss = nn.functional.binary_cross_entropy(model(x), label.to(next(model.parameters()).dtype))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

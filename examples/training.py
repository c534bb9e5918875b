"""What the examples share: one epoch of training, and the AUC."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from din_fast import FusedActivationUnit
from din_fast.data import Samples
from din_fast.frameworks.common import Fused
from din_fast.models import click_loss, click_probability

EVALUATION_BATCH = 4096


def shuffled(samples: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """The row numbers of one epoch's batches; a last batch of one sample is left out, since BatchNorm needs two."""
    batches = torch.randperm(samples, generator=generator).split(batch_size)
    return [rows for rows in batches if len(rows) > 1]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples, batches: Iterable[Tensor]
) -> list[float]:
    """One step on each of these batches of row numbers; the losses."""
    model.train()
    losses = []
    for rows in batches:
        batch = samples.take(rows)
        loss = click_loss(model(batch.x), batch.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def auc(model: nn.Module, samples: Samples) -> float:
    """The area under the ROC curve of the model's predictions, over all samples."""
    model.eval()
    batches = (samples.take(rows) for rows in torch.arange(len(samples)).split(EVALUATION_BATCH))
    predicted = torch.cat([click_probability(model(batch.x)) for batch in batches])
    return float(roc_auc_score(samples.label.numpy(), predicted.numpy()))


def backends(model: nn.Module) -> str:
    """Which backend ran the last call of the model's fused units, a dash where it has none."""
    units = (unit for unit in model.modules() if isinstance(unit, (FusedActivationUnit, Fused)))
    ran = {str(unit.last_backend) for unit in units}
    return ", ".join(sorted(ran)) or "-"

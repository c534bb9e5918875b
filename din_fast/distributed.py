"""SyncBatchNorm: statistics of a layer over the rows of all processes, as torch's SyncBatchNorm takes them.

Counts, means and sums of squared deviations are merged by Chan's rule; the sums of the backward are added up. What is
reduced is a few numbers per hidden unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from din_fast.spec import HiddenLayer, batch_mode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch


def synchronised(hidden: Iterable[HiddenLayer]) -> bool:
    """Whether any layer takes its statistics over several processes."""
    return any(group_of(layer, i) is not None for i, layer in enumerate(hidden))


def group_of(layer: HiddenLayer, at: int) -> ProcessGroup | None:
    """The processes that share the statistics of a layer; None where there is just this one.

    Raises:
        RuntimeError: the layer's two norms disagree, whose statistics come from one pass.
    """
    norms = [norm for norm in (layer.norm, layer.gate_norm) if norm is not None and batch_mode(norm)]
    groups = [_group(norm) for norm in norms]
    if any(g is not groups[0] for g in groups):
        raise RuntimeError(
            f"parameters.hidden[{at}]: expected its norms to be synchronised over the same processes, "
            f"got {[type(norm).__name__ for norm in norms]}"
        )
    return groups[0] if groups else None


def _group(norm: nn.modules.batchnorm._BatchNorm) -> ProcessGroup | None:
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if norm.process_group is None else norm.process_group
    return group if dist.get_world_size(group) > 1 else None


def merge_moments(count: Tensor, mean: Tensor, m2: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Count (0-d float64), mean and M2 (H,) of one process -> those of all, in the order of their ranks."""
    mine = torch.cat([count.reshape(1), mean.double(), m2.double()])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    units = mean.shape[0]
    every = torch.stack(parts)
    counts, means, m2s = every[:, :1], every[:, 1 : units + 1], every[:, units + 1 :]
    total = counts.sum()
    merged = (counts * means).sum(0) / total.clamp(min=1)
    spread = (m2s + counts * (means - merged).square()).sum(0)
    return total, merged.to(mean.dtype), spread.to(m2.dtype)


def add_up(sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """The backward's sums of all processes, in the order of their ranks; of this one where there is no group."""
    if group is None:
        return sums
    parts = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sums.contiguous(), group=group)
    return torch.stack(parts).sum(0)

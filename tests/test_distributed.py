"""SyncBatchNorm and data-parallel training: two gloo processes are one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from din_fast import UnitSpec, preset
from tests.truth import Case, Inputs, assert_near, draw, fused_unit

D = 6
SPECS: dict[str, UnitSpec] = {
    "rechub": preset("rechub", [9, 5], softmax=True),
    "fuxictr": preset("fuxictr", [8, 4]),
    "norm-and-dice": preset("fuxictr", [8, 4], batch_norm=True),
    "deepctr": preset("deepctr", [7]),
    "norm-silu-valid": UnitSpec((8, 5), activation="silu", batch_norm=True, batch_stats="valid"),
}
RANKS = 2


def train(unit: nn.Module, parts: list[Inputs], whole: int) -> dict[str, Tensor]:
    """Two steps of SGD on this process's parts; the loss is that of the whole batch, as DDP takes means."""
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    for inputs in parts:
        optimizer.zero_grad()
        out = unit(inputs.history, inputs.target, inputs.mask)
        ((out * inputs.upstream).sum() * whole).backward()
        optimizer.step()
    inner = unit.module if isinstance(unit, DistributedDataParallel) else unit
    named = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    return {name: t.detach().clone() for name, t in named.items()}


def part_of(inputs: Inputs, rank: int, sizes: tuple[int, ...]) -> Inputs:
    begin, end = sum(sizes[:rank]), sum(sizes[: rank + 1])
    take: Callable[[Tensor], Tensor] = lambda t: t[begin:end]  # noqa: E731
    mask = None if inputs.mask is None else take(inputs.mask)
    return Inputs(take(inputs.history), take(inputs.target), mask, None, take(inputs.upstream))


def steps_of(spec: UnitSpec) -> list[Inputs]:
    return [draw(Case(spec, (7, 11, D), "mask"), seed, torch.float64) for seed in range(2)]


def one_process(rank: int, folder: str, sizes: tuple[int, ...], how: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        results: dict[str, dict[str, Any]] = {}
        for name, spec in SPECS.items():
            model = DistributedDataParallel(fused_unit(spec, D, "native").double().train())
            if how == "sync":  # after it is wrapped: with SyncBatchNorm in it DDP takes no model on the CPU
                nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
            parts = [part_of(inputs, rank, sizes) for inputs in steps_of(spec)]
            results[name] = train(model, parts, RANKS) | {"ran": model.module.last_backend}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(folder: Path, sizes: tuple[int, ...], how: str = "sync") -> list[dict[str, dict[str, Any]]]:
    spawn(one_process, (str(folder), sizes, how), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("sizes", [(4, 3), (6, 1), (7, 0)], ids=str)
def test_two_processes_are_one_with_the_whole_batch(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Parameters and running statistics after two steps, however the batch is divided, or all of it in one part."""
    found = run(tmp_path, sizes)
    for name, spec in SPECS.items():
        alone = fused_unit(spec, D, "native").double().train()
        right = train(alone, steps_of(spec), 1)
        for rank in range(RANKS):
            assert alone.last_backend == found[rank][name]["ran"] == "native"
            for key, tensor in right.items():
                assert_near(f"{name} {rank} {key}", found[rank][name][key], tensor, 1e-11)


def test_without_synchronisation_each_process_has_its_own_statistics(tmp_path: Path) -> None:
    first, second = (found["fuxictr"] for found in run(tmp_path, (4, 3), how="local"))
    assert first.pop("ran") == second.pop("ran") == "native"
    for key, tensor in first.items():
        if "bn" not in key:
            assert torch.equal(tensor, second[key]), key
    assert not torch.equal(first["attention.mlp.1.bn.running_mean"], second["attention.mlp.1.bn.running_mean"])


def test_a_converted_unit_in_one_process_is_the_unit(backend: str) -> None:
    inputs = steps_of(SPECS["rechub"])[0]
    unit = fused_unit(SPECS["rechub"], D, backend).double().train()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused_unit(SPECS["rechub"], D, backend).double().train())
    assert torch.equal(converted(inputs.history, inputs.target), unit(inputs.history, inputs.target))
    assert converted.last_backend == backend

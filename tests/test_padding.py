"""When a pad is input and when it must reach nothing.

A padded row is input in two places only: the statistics of the batch count it (training with BatchNorm or batch Dice,
as in the frameworks), and a softmax over nothing is uniform over all L rows where the host's is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from din_fast import UnitSpec, preset
from tests.truth import MASKINGS, SPECS, Case, Inputs, assert_near, draw, fused_unit, step

SHAPE = (6, 21, 9)
BATCH_STATISTICS = [
    name
    for name, spec in SPECS.items()
    if spec.batch_stats == "all" and spec.hidden_units and (spec.batch_norm or spec.activation == "dice_batch")
]
NO_BATCH_STATISTICS = [name for name in SPECS if name not in BATCH_STATISTICS]
PADS = [float("nan"), float("inf"), -float("inf"), 3e38]


def each(names: Iterable[str]) -> list[tuple[str, str, float]]:
    """Every unit under every masking, with the kinds of pads in turn: each pad meets each masking."""
    return [
        (name, masking, PADS[(i + i // len(PADS) + j) % len(PADS)])
        for i, name in enumerate(names)
        for j, masking in enumerate(MASKINGS[1:])
    ]


def pads_reach_nothing(spec: UnitSpec, masking: str, training: bool, backend: str, pad: float) -> None:
    inputs = draw(Case(spec, SHAPE, masking), 0, torch.float32)
    assert inputs.valid is not None
    ignored = ~inputs.valid
    if spec.softmax and spec.empty == "uniform":
        ignored[~inputs.valid.any(1)] = False
    zeros = replace(inputs, history=inputs.history.masked_fill(ignored[..., None], 0.0))
    padded = replace(inputs, history=inputs.history.masked_fill(ignored[..., None], pad))
    right = step(fused_unit(spec, SHAPE[2], backend).train(training), zeros)
    found = step(fused_unit(spec, SHAPE[2], backend).train(training), padded)
    for name, tensor in right.items():
        assert tensor.isfinite().all() and torch.equal(found[name], tensor), name
    assert not found["grad history"][ignored].any()


@pytest.mark.parametrize(("name", "masking", "pad"), each(SPECS))
def test_in_evaluation_pads_reach_neither_output_nor_gradient(
    name: str, masking: str, pad: float, any_backend: str
) -> None:
    pads_reach_nothing(SPECS[name], masking, False, any_backend, pad)


@pytest.mark.parametrize(("name", "masking", "pad"), each(NO_BATCH_STATISTICS))
def test_in_training_without_batch_statistics_neither(name: str, masking: str, pad: float, any_backend: str) -> None:
    pads_reach_nothing(SPECS[name], masking, True, any_backend, pad)


@pytest.mark.parametrize("pad", PADS[:2])
def test_pads_reach_nothing_with_any_instruction_set(pad: float, backend: str, cpu: str) -> None:
    for name in ("rechub-two-layers-softmax", "fuxictr", "blog", "row-dice-without-norm"):
        pads_reach_nothing(SPECS[name], "both", False, backend, pad)


@pytest.mark.parametrize("name", BATCH_STATISTICS)
def test_in_training_batch_statistics_count_the_pads(name: str, any_backend: str) -> None:
    """A NaN there gives NaN, and gradient reaches the pads through the statistics."""
    spec = SPECS[name]
    inputs = draw(Case(spec, SHAPE, "mask"), 0, torch.float32)
    assert inputs.valid is not None
    found = step(fused_unit(spec, SHAPE[2], any_backend).train(), inputs)
    pads = ~inputs.valid
    pads[-1] = False  # the empty history of a uniform softmax gets gradient anyway
    assert found["grad history"][pads].any()
    spoiled = inputs.history.clone()
    spoiled[pads.nonzero()[0, 0], pads.nonzero()[0, 1]] = float("nan")
    unit = fused_unit(spec, SHAPE[2], any_backend).train()
    out = unit(spoiled, inputs.target, mask=inputs.mask)
    assert unit.last_backend == any_backend
    assert (out if spec.pooling != "none" else out[inputs.valid])[:-1].isnan().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masking", MASKINGS[1:])
@pytest.mark.parametrize("framework", ["fuxictr", "deepctr"])
def test_softmax_over_nothing_is_the_hosts_uniform_mean(
    framework: str, masking: str, training: bool, any_backend: str
) -> None:
    spec = preset(framework, [6], "relu", softmax=True)
    inputs = draw(Case(spec, SHAPE, masking), 0, torch.float32)
    found = step(fused_unit(spec, SHAPE[2], any_backend).train(training), inputs)
    torch.testing.assert_close(found["output"][-1], inputs.history[-1].mean(0))
    right = (inputs.upstream[-1] / SHAPE[1]).expand(SHAPE[1:])
    torch.testing.assert_close(found["grad history"][-1], right)
    assert not found["grad target"][-1].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masking", MASKINGS[1:])
@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if not (s.softmax and s.empty == "uniform")])
def test_an_empty_history_gives_zeros(name: str, masking: str, training: bool, any_backend: str) -> None:
    inputs = draw(Case(SPECS[name], SHAPE, masking), 0, torch.float32)
    found = step(fused_unit(SPECS[name], SHAPE[2], any_backend).train(training), inputs)
    assert not found["output"][-1].any()
    if not training or name in NO_BATCH_STATISTICS:
        assert not found["grad history"][-1].any() and not found["grad target"][-1].any()


def test_without_mask_and_lengths_every_position_counts(any_backend: str) -> None:
    spec = preset("rechub", [6], softmax=True)
    inputs = draw(Case(spec, SHAPE), 0, torch.float32)
    full = Inputs(
        inputs.history,
        inputs.target,
        torch.ones(SHAPE[:2], dtype=torch.bool),
        torch.full(SHAPE[:1], SHAPE[1]),
        inputs.upstream,
    )
    right, found = (step(fused_unit(spec, SHAPE[2], any_backend), i) for i in (inputs, full))
    for name, tensor in right.items():
        assert_near(name, found[name], tensor, 1e-5)


def test_a_batch_sorted_by_length_gives_the_same(any_backend: str) -> None:
    """The native backend hands such a batch out to its threads in another order (csrc/cpu/kernel.h, parallel)."""
    spec = preset("fuxictr", [36, 8])
    generator = torch.Generator().manual_seed(0)
    history, target = (torch.randn(64, *rest, 8, generator=generator) for rest in ((21,), ()))
    lengths = torch.randint(0, 22, (64,), generator=generator)
    order = lengths.argsort(descending=True)
    unit = fused_unit(spec, 8, any_backend).eval()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            drawn = unit(history, target, lengths=lengths)
            assert unit.last_backend == any_backend
            assert torch.equal(unit(history[order], target[order], lengths=lengths[order]), drawn[order])

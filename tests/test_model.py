"""A whole model: torch-rechub's DIN with its own units, and with ours in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN

from din_fast import FusedActivationUnit
from tests.truth import Comparison, assert_near, randomise

DIM, LENGTH, BATCH = 8, 20, 48
VOCABULARY = {"item": 60, "category": 12}
ATTENTION: list[dict[str, object]] = [{"dims": [16, 8]}, {"dims": [12], "activation": "prelu", "use_softmax": True}]


def host(attention: dict[str, object], dtype: torch.dtype) -> DIN:
    """torch-rechub's DIN on two sequences, item and category, and one profile feature."""
    torch.manual_seed(0)
    targets = [SparseFeature(f"target_{n}", vocab_size=size, embed_dim=DIM) for n, size in VOCABULARY.items()]
    histories = [
        SequenceFeature(f"hist_{n}", vocab_size=size, embed_dim=DIM, pooling="concat", shared_with=f"target_{n}")
        for n, size in VOCABULARY.items()
    ]
    user = [SparseFeature("user", vocab_size=30, embed_dim=DIM)]
    model = DIN(user, histories, targets, mlp_params={"dims": [24, 12]}, attention_mlp_params=attention)
    randomise(model, torch.Generator().manual_seed(1))
    return model.to(dtype)


def swapped(model: DIN, attention: dict[str, object], backend: str) -> DIN:
    """The same model with our units, by a strict load of the host's checkpoint."""
    ours = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    for i in range(len(ours.attention_layers)):
        ours.attention_layers[i] = FusedActivationUnit(DIM, **attention, backend=backend).to(dtype)  # type: ignore[arg-type]
    ours.load_state_dict(model.state_dict(), strict=True)
    return ours


def batches(count: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Ids with post-padding of id 0, which torch-rechub does not mask, and random clicks."""
    g = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = {"user": torch.randint(0, 30, (BATCH,), generator=g)}
        lengths = torch.randint(0, LENGTH + 1, (BATCH, 1), generator=g)
        for name, size in VOCABULARY.items():
            ids = torch.randint(1, size, (BATCH, LENGTH), generator=g)
            x[f"hist_{name}"] = ids.masked_fill(torch.arange(LENGTH) >= lengths, 0)
            x[f"target_{name}"] = torch.randint(1, size, (BATCH,), generator=g)
        yield x, torch.randint(0, 2, (BATCH,), generator=g)


def results(model: DIN, x: dict[str, Tensor], clicks: Tensor) -> dict[str, Tensor]:
    """Logits (of which the model returns the sigmoid) and every gradient; the statistics after it."""
    logits: list[Tensor] = []
    hook = model.mlp.register_forward_hook(lambda module, args, out: logits.append(out.squeeze(1)))
    model.zero_grad()
    model(x)
    hook.remove()
    F.binary_cross_entropy_with_logits(logits[0], clicks.to(logits[0].dtype)).backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return {"output": logits[0].detach(), **grads, **{n: b for n, b in model.named_buffers() if "running" in n}}


def which(model: DIN) -> list[str | None]:
    return [unit.last_backend for unit in model.attention_layers]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("attention", ATTENTION, ids=str)
def test_logits_and_every_gradient(
    attention: dict[str, object], dtype: torch.dtype, training: bool, backend: str
) -> None:
    """By the rule of tests/truth.py, the host in float64 being the truth."""
    comparison = Comparison(dtype)
    for x, clicks in batches(8):
        plain = host(attention, dtype).train(training)
        fused = swapped(plain, attention, backend).train(training)
        truth = copy.deepcopy(plain).double()
        comparison.add(*(results(model, x, clicks) for model in (truth, plain, fused)))
        assert which(fused) == [backend, backend]
    comparison.check()


@pytest.mark.parametrize("attention", ATTENTION, ids=str)
def test_twenty_adam_steps(attention: dict[str, object], backend: str) -> None:
    """In float64: losses, every parameter and every buffer stay together."""
    plain = host(attention, torch.float64)
    fused = swapped(plain, attention, backend)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5) for model in (plain, fused)]
    start = copy.deepcopy(plain.state_dict())
    for x, clicks in batches(20):
        losses = []
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            loss = F.binary_cross_entropy(model(x), clicks.double())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-9)
    assert which(fused) == [backend, backend]
    for name, right in plain.state_dict().items():
        assert_near(name, fused.state_dict()[name], right, 1e-6)
        assert not torch.equal(right, start[name]), f"{name} never moved"


def test_checkpoints_load_strictly_in_both_directions(backend: str) -> None:
    """A model trained with our units goes on in the host's, and the other way round."""
    attention = ATTENTION[0]
    plain = host(attention, torch.float32)
    fused = swapped(plain, attention, backend)
    (x, clicks), (later, _) = batches(2)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    F.binary_cross_entropy(fused(x), clicks.float()).backward()
    optimizer.step()
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    plain.eval()
    fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(later), plain(later))
    assert which(fused) == [backend, backend]
    assert not any(isinstance(m, FusedActivationUnit) for m in plain.modules())
    assert isinstance(plain.attention_layers[0], nn.Module)

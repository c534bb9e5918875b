"""A fused unit computes what the framework's own unit does: output, every gradient and running statistic.

The hosts are the packages as installed (TorchEasyRec: tests/easyrec_double.py). The truth is the host in float64, and
the fused unit is held to the rule of tests/truth.py against the host in float32, with the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import din_fast
from tests import easyrec_double, hosts
from tests.truth import SEEDS, Comparison, randomise

B, L, D = 6, 9, 5
ROWS = ("full", "ragged", "pre-padded", "holes")  # the last history is empty but for "full"


@dataclass(frozen=True)
class Drawn:
    """The inputs of a call in any framework's form, and what makes the gradient that comes back."""

    history: Tensor
    target: Tensor
    valid: Tensor  # (B, L) bool
    lengths: Tensor  # (B,) int64, for valid positions that are a prefix
    seed: int

    def to(self, dtype: torch.dtype) -> Drawn:
        return replace(self, history=self.history.to(dtype), target=self.target.to(dtype))


def draw(rows: str, seed: int, garbage: bool = True) -> Drawn:
    """Normal numbers in float32; pads are ten times larger, so that nobody takes them for zeros."""
    g = torch.Generator().manual_seed(100 + seed)
    lengths = torch.full((B,), L)
    if rows != "full":
        lengths = torch.randint(1, L + 1, (B,), generator=g)
        lengths[-1] = 0
    position = torch.arange(L)
    valid = position < lengths[:, None]
    if rows == "pre-padded":
        valid = position >= L - lengths[:, None]
    if rows == "holes":
        valid = valid & (torch.rand(B, L, generator=g) < 0.7)
    history = torch.randn(B, L, D, generator=g)
    if garbage:
        history = torch.where(valid.unsqueeze(2), history, 10 * history)
    return Drawn(history, torch.randn(B, D, generator=g), valid, lengths, seed)


Call = Callable[[Any, Drawn], Tensor]


@dataclass(frozen=True)
class Host:
    """A framework's unit: how it is built, how it is called, and the kinds of rows that its call can tell."""

    build: Callable[[], nn.Module]
    call: Call
    rows: tuple[str, ...] = ("full", "ragged")


def rechub(**options: Any) -> Host:
    def build() -> nn.Module:
        unit: nn.Module = hosts.load("torch_rechub.models.ranking.din").ActivationUnit(D, **options)
        return unit

    return Host(build, lambda unit, x: unit(x.history, x.target))


def deepctr(*, masking: bool = False, **options: Any) -> Host:
    def build() -> nn.Module:
        layer = hosts.load("deepctr_torch.layers.sequence").AttentionSequencePoolingLayer
        unit: nn.Module = layer(embedding_dim=D, supports_masking=masking, **options)
        return unit

    def call(unit: Any, x: Drawn) -> Tensor:
        out: Tensor = unit(x.target.unsqueeze(1), x.history, x.lengths.unsqueeze(1), x.valid if masking else None)
        return out

    return Host(build, call, ROWS if masking else ("full", "ragged"))


def fuxictr(masks: str = "bool", **options: Any) -> Host:
    def build() -> nn.Module:
        unit: nn.Module = hosts.load("fuxictr.pytorch.layers").DIN_Attention(embedding_dim=D, **options)
        return unit

    return Host(build, lambda unit, x: unit(x.target, x.history, mask_of(x, masks)), ROWS)


def fuxictr_dien(masks: str = "float", **options: Any) -> Host:
    def build() -> nn.Module:
        layer = hosts.load("model_zoo.LongCTR.DIEN.DIEN").AttentionLayer
        unit: nn.Module = layer(D, attention_type="din_attention", attention_hidden_units=[7, 4], **options)
        return unit

    return Host(build, lambda unit, x: unit(x.history, x.target, mask_of(x, masks)), ROWS)


def mask_of(x: Drawn, kind: str) -> Tensor | None:
    """FuxiCTR's mask in one of the forms that it comes in; "fractions" are in no model, but the host takes them."""
    if kind == "none":
        return None
    if kind == "fractions":
        g = torch.Generator().manual_seed(x.seed)
        return x.valid * torch.rand(x.valid.shape, generator=g)
    return x.valid.to({"bool": torch.bool, "int": torch.int64, "float": torch.float32}[kind])


def recbole(activation: str, softmax: bool = False, scores: bool = False, hidden: tuple[int, ...] = (7, 4)) -> Host:
    def build() -> nn.Module:
        layer = hosts.load("recbole.model.layers").SequenceAttLayer
        unit: nn.Module = layer(torch.arange(L).view(1, -1), [4 * D, *hidden], activation, softmax, scores)
        return unit

    return Host(build, lambda unit, x: unit(x.target, x.history, x.lengths))


def easyrec(query_dim: int = D, **options: Any) -> Host:
    def build() -> nn.Module:
        hosts.load("tzrec.modules.sequence")
        windows = options.get("windows_len")
        encoder = easyrec_double.DINEncoder if windows is None else easyrec_double.MultiWindowDINEncoder
        unit: nn.Module = encoder(D, query_dim, "clicks", **options)
        return unit

    def call(unit: Any, x: Drawn) -> Tensor:
        query = x.target[:, : unit._query_dim]
        inputs = {"clicks.query": query, "clicks.sequence": x.history, "clicks.sequence_length": x.lengths}
        out: Tensor = unit(inputs)
        return out

    return Host(build, call)


Dice = easyrec_double.Dice
HOSTS: dict[str, Host] = {
    "rechub": rechub(),
    "rechub relu": rechub(dims=[7, 4], activation="relu"),
    "rechub sigmoid softmax": rechub(dims=[7], activation="sigmoid", use_softmax=True),
    "rechub prelu": rechub(dims=[7, 4], activation="prelu"),
    "rechub dice softmax": rechub(dims=[8, 6, 4], activation="dice", use_softmax=True),
    "rechub leakyrelu": rechub(dims=[7], activation="leakyrelu"),
    "rechub tanh": rechub(dims=[7], activation=nn.Tanh),
    "rechub no hidden layer": rechub(dims=[], use_softmax=True),
    "deepctr sigmoid": deepctr(att_hidden_units=(7, 4)),
    "deepctr dice": deepctr(att_hidden_units=(7, 4), att_activation="dice"),
    "deepctr dice softmax": deepctr(att_hidden_units=(8,), att_activation="Dice", weight_normalization=True),
    "deepctr relu mask": deepctr(masking=True, att_activation="relu", att_hidden_units=(7, 4)),
    "deepctr dice softmax mask": deepctr(masking=True, att_activation="dice", weight_normalization=True),
    "deepctr prelu": deepctr(att_activation="prelu", weight_normalization=True),
    "deepctr linear scores": deepctr(att_activation="linear", return_score=True),
    "deepctr sigmoid scores softmax": deepctr(return_score=True, weight_normalization=True),
    "deepctr dice scores": deepctr(att_activation="dice", return_score=True, att_hidden_units=(6, 4)),
    "fuxictr dice": fuxictr(attention_units=[7, 4], hidden_activations="Dice"),
    "fuxictr dice no mask": fuxictr("none", attention_units=[7, 4], hidden_activations="Dice"),
    "fuxictr dice int softmax": fuxictr("int", attention_units=[7], hidden_activations="Dice", use_softmax=True),
    "fuxictr dice norm float": fuxictr(
        "float", attention_units=[7, 4], hidden_activations="Dice", batch_norm=True, use_softmax=True
    ),
    "fuxictr relu": fuxictr(),
    "fuxictr relu float softmax": fuxictr("float", use_softmax=True),
    "fuxictr relu fractions": fuxictr("fractions", attention_units=[7, 4]),
    "fuxictr dice fractions softmax": fuxictr("fractions", hidden_activations="Dice", use_softmax=True),
    "fuxictr norm relu": fuxictr(attention_units=[7, 4], batch_norm=True),
    "fuxictr prelu": fuxictr(attention_units=[7, 4], hidden_activations="PReLU", use_softmax=True),
    "fuxictr sigmoid": fuxictr("int", attention_units=[7, 4, 3], hidden_activations="Sigmoid"),
    "fuxictr tanh, sigmoid score": fuxictr(hidden_activations="Tanh", output_activation="Sigmoid"),
    "fuxictr, sigmoid score, fractions": fuxictr("fractions", output_activation="Sigmoid"),
    "fuxictr leaky relu": fuxictr(hidden_activations="LeakyReLU"),
    "fuxictr no activation": fuxictr(hidden_activations=[None], use_softmax=True),
    "fuxictr dien dice softmax": fuxictr_dien(),
    "fuxictr dien dice": fuxictr_dien(use_attention_softmax=False),
    "fuxictr dien relu bool": fuxictr_dien("bool", attention_activation="relu"),
    "fuxictr dien relu fractions": fuxictr_dien("fractions", attention_activation="relu"),
    "fuxictr dien sigmoid no mask": fuxictr_dien("none", attention_activation="sigmoid"),
    "recbole sigmoid": recbole("Sigmoid"),
    "recbole sigmoid softmax": recbole("Sigmoid", softmax=True),
    "recbole dice": recbole("dice"),
    "recbole dice softmax scores": recbole("dice", softmax=True, scores=True),
    "recbole relu scores": recbole("relu", scores=True),
    "recbole relu softmax": recbole("relu", softmax=True, hidden=(6, 5, 4)),
    "recbole tanh scores softmax": recbole("tanh", softmax=True, scores=True),
    "recbole leakyrelu": recbole("leakyrelu"),
    "recbole none": recbole("none", hidden=(8,)),
    "easyrec relu": easyrec(attn_mlp={"hidden_units": [7, 4]}),
    "easyrec dice": easyrec(attn_mlp={"hidden_units": [7, 4], "activation": Dice}),
    "easyrec norm dice": easyrec(attn_mlp={"hidden_units": [7, 4], "activation": Dice, "use_bn": True}),
    "easyrec norm relu, short": easyrec(attn_mlp={"hidden_units": [8], "use_bn": True}, max_seq_length=5),
    "easyrec prelu, small query": easyrec(attn_mlp={"hidden_units": [8], "activation": nn.PReLU}, query_dim=3),
    "easyrec sigmoid": easyrec(attn_mlp={"hidden_units": [8], "activation": nn.Sigmoid}),
    "easyrec windows": easyrec(windows_len=[2, 3, 4], attn_mlp={"hidden_units": [8], "activation": nn.PReLU}),
    "easyrec windows longer": easyrec(windows_len=[1, 4, 9], attn_mlp={"hidden_units": [7, 4]}, query_dim=3),
    "easyrec windows shorter": easyrec(windows_len=[2, 3], attn_mlp={"hidden_units": [7], "activation": Dice}),
}
CASES = [(name, rows) for name, host in HOSTS.items() for rows in host.rows]


def step(host: Host, unit: nn.Module, x: Drawn) -> dict[str, Tensor]:
    """The output with and without gradients, every gradient, and the running statistics after it."""
    with torch.no_grad():
        without_grad = host.call(copy.deepcopy(unit), x)
    x = replace(x, history=x.history.detach().requires_grad_(), target=x.target.detach().requires_grad_())
    out = host.call(unit, x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(x.seed)).to(out.dtype)
    leaves = {"history": x.history, "target": x.target, **dict(unit.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    found = {"output": out.detach(), "output without grad": without_grad}
    found |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found | {name: b.clone() for name, b in unit.named_buffers() if "running" in name}


def fused(unit: nn.Module, backend: str) -> Any:
    """A fused copy of a unit."""
    twin = copy.deepcopy(unit)
    report = din_fast.fuse(twin, backend=backend, strict=True)
    assert len(report.fused) == 1 and report.rows[0].path == ""
    return twin


def without_nan(found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Numbers with 0 for NaN, and where they are NaN."""
    return {k: v.nan_to_num(0.0) for k, v in found.items()}, {k: v.isnan() for k, v in found.items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "rows"), CASES)
def test_parity(name: str, rows: str, training: bool, backend: str) -> None:
    """NaN is where the host has NaN, element for element: RecBole's softmax over nothing."""
    host = HOSTS[name]
    torch.manual_seed(0)
    original = host.build().train(training)
    comparison = Comparison(torch.float32)
    for seed in range(SEEDS):
        x = draw(rows, seed)
        randomise(original, torch.Generator().manual_seed(seed))
        truth, plain, ours = copy.deepcopy(original).double(), copy.deepcopy(original), fused(original, backend)
        units = ((truth, x.to(torch.float64)), (plain, x), (ours, x))
        (right, right_nan), (theirs, nan), (found, our_nan) = (without_nan(step(host, u, d)) for u, d in units)
        assert ours.last_backend == backend
        assert all(torch.equal(nan[k], right_nan[k]) and torch.equal(our_nan[k], nan[k]) for k in nan)
        assert nan["output"].any() == (name.startswith("recbole") and "softmax" in name and rows != "full")
        comparison.add(right, theirs, found)
    comparison.check()

"""The ops as PyTorch sees them: gradcheck, opcheck, double backward, torch.compile."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from din_fast import FusedActivationUnit, UnitSpec, functional, preset
from din_fast.spec import ACTIVATIONS, BATCH_STATS, BLOCKS, POOLINGS
from tests.conftest import KERNELS
from tests.truth import Case, assert_near, check_parity, draw, fused_unit, step

SMALL: dict[str, UnitSpec] = {
    "rechub": preset("rechub", [3]),
    "rechub-softmax": preset("rechub", [3, 2], softmax=True),
    "row-dice": UnitSpec((3,), activation="dice_row"),
    "fuxictr": preset("fuxictr", [3, 2]),
    "fuxictr-softmax": preset("fuxictr", [3], softmax=True),
    "norm-and-dice": preset("fuxictr", [3], batch_norm=True),
    "deepctr": preset("deepctr", [3]),
    "relu": preset("fuxictr", [3], "relu"),
    "prelu": preset("rechub", [3], "prelu"),
    "prelu-per-channel": preset("fuxictr", [3, 2], "prelu", softmax=True),
    "sigmoid": preset("deepctr", [3, 2], "sigmoid"),
    "identity": preset("fuxictr", [3], "identity"),
    "no-hidden-layer": preset("rechub", [], softmax=True),
    "blog": preset("blog", [3]),
    "mean": UnitSpec((3,), activation="sigmoid", pooling="mean"),
    "tanh": UnitSpec((3, 2), activation="tanh", batch_norm=True, scale_scores=True),
    "silu": UnitSpec((3,), activation="silu", batch_norm=True),
    "leaky-relu": UnitSpec((3, 2), activation="leaky_relu", hidden_bias=False),
    "score-prelu": UnitSpec((3,), activation="sigmoid", score_activation="prelu", scale_scores=True),
    "scores-out": UnitSpec((3,), activation="silu", softmax=True, pooling="none"),
    "scores-out-prelu": UnitSpec((3,), activation="tanh", score_activation="prelu", pooling="none"),
    "valid": UnitSpec((3, 2), activation="dice_batch", dice_affine=True, batch_stats="valid"),
    "valid-norm": UnitSpec((3,), activation="dice_row", batch_norm=True, batch_stats="valid", softmax=True),
}


@pytest.mark.parametrize("masking", ["none", "mask", "lengths"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name: str, training: bool, masking: str, backend: str) -> None:
    unit = fused_unit(SMALL[name], 2, backend).double().train(training)
    inputs = draw(Case(unit.spec, (3, 3, 2), masking), 0, torch.float64)
    names, parameters = zip(*unit.named_parameters(), strict=True)

    def function(history: Tensor, target: Tensor, *values: Tensor) -> Tensor:
        arguments = (history, target, inputs.mask, inputs.lengths)
        return functional_call(unit, dict(zip(names, values, strict=True)), arguments)

    leaves = [t.detach().clone().requires_grad_() for t in (inputs.history, inputs.target, *parameters)]
    assert torch.autograd.gradcheck(function, leaves)
    assert unit.last_backend == backend


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", ["history", "target", "parameters", "one bias", "norm", "history and target"])
def test_any_subset_of_the_gradients_has_the_same_bits(wanted: str, training: bool, backend: str) -> None:
    spec = preset("deepctr", [9, 5])
    inputs = draw(Case(spec, (4, 21, 6), "mask"), 0, torch.float32)
    right = step(fused_unit(spec, 6, backend).train(training), inputs)

    def wants(name: str) -> bool:
        chosen = {
            "parameters": name not in ("history", "target"),
            "one bias": name == "attention.mlp.2.bias",
            "norm": ".bn." in name,
        }
        return chosen.get(wanted, name in wanted.split(" and "))

    unit = fused_unit(spec, 6, backend).train(training)
    named = {"history": inputs.history.clone(), "target": inputs.target.clone(), **dict(unit.named_parameters())}
    leaves = {name: t.requires_grad_(wants(name)) for name, t in named.items()}
    unit(leaves["history"], leaves["target"], mask=inputs.mask).backward(inputs.upstream)
    assert unit.last_backend == backend and any(t.requires_grad for t in leaves.values())
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == wants(name), name
        assert leaf.grad is None or torch.equal(leaf.grad, right[f"grad {name}"]), name


def test_gradients_accumulate(backend: str) -> None:
    unit = fused_unit(preset("rechub", [5]), 4, backend)
    inputs = draw(Case(unit.spec, (3, 6, 4)), 0, torch.float32)
    grads = []
    for _ in range(2):
        unit(inputs.history, inputs.target).backward(inputs.upstream)
        grads.append([p.grad.clone() for p in unit.parameters() if p.grad is not None])
    assert all(torch.equal(2 * once, twice) for once, twice in zip(*grads, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_grad_nothing_is_saved(mode: Any, training: bool, backend: str) -> None:
    unit = fused_unit(preset("fuxictr", [5]), 4, backend).train(training)
    inputs = draw(Case(unit.spec, (3, 6, 4)), 0, torch.float32)
    with mode():
        out = unit(inputs.history.clone().requires_grad_(), inputs.target)
    assert not out.requires_grad and out.grad_fn is None and unit.last_backend == backend


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["rechub", "fuxictr", "relu", "no-hidden-layer"])
def test_double_backward_raises(name: str, training: bool, backend: str) -> None:
    """A clear error, never a wrong number."""
    unit = fused_unit(SMALL[name], 2, backend).train(training)
    inputs = draw(Case(unit.spec, (3, 3, 2)), 0, torch.float32)
    history = inputs.history.requires_grad_()
    out = unit(history, inputs.target)
    assert unit.last_backend == backend
    with pytest.raises(RuntimeError, match="gradient of a gradient"):
        (gradient,) = torch.autograd.grad(out.square().sum(), history, create_graph=True)
        gradient.square().sum().backward()


# ---- opcheck: every call that the unit makes to an op of ours, with the very arguments that it made

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Recorder(TorchDispatchMode):
    """The calls to din_fast's ops, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "din_fast":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(
    unit: FusedActivationUnit, masking: str, grad: bool, compiling: bool = False
) -> list[tuple[Any, tuple[Any, ...]]]:
    inputs = draw(Case(unit.spec, (3, 5, 4), masking), 0, torch.float32)
    seen = patch.object(functional, "is_compiling", lambda: compiling)
    with seen, Recorder() as recorder, torch.set_grad_enabled(grad):
        out = unit(inputs.history.requires_grad_(grad), inputs.target, mask=inputs.mask, lengths=inputs.lengths)
        if grad:
            out.sum().backward()
    return recorder.calls


def fresh(argument: Any, requires_grad: bool) -> Any:
    """Leaves in the place of recorded tensors."""
    if isinstance(argument, Tensor):
        leaf = argument.detach().clone()
        return leaf.requires_grad_(requires_grad and leaf.is_floating_point())
    if isinstance(argument, list | tuple):
        return [fresh(a, requires_grad) for a in argument]
    return argument


OPCHECKED: list[tuple[str, bool, bool, str]] = [
    ("fuxictr", True, True, "moments forward backward_moments backward"),
    ("rechub-softmax", True, True, "moments forward backward_moments backward"),
    ("fuxictr", False, True, "forward backward"),
    ("blog", True, True, "forward backward"),
    ("no-hidden-layer", True, True, "forward backward"),
    ("fuxictr", True, False, "moments forward"),
    ("deepctr", False, False, "infer"),
    ("rechub-softmax", False, False, "infer"),
]


@pytest.mark.parametrize("masking", ["none", "both"])
@pytest.mark.parametrize(("name", "training", "grad", "ops"), OPCHECKED, ids=str)
def test_opcheck(name: str, training: bool, grad: bool, ops: str, masking: str, backend: str) -> None:
    unit = fused_unit(SMALL[name], 4, backend).train(training)
    calls = recorded(unit, masking, grad, compiling=True)
    assert {op.__name__.partition(".")[0] for op, _ in calls} == {f"{backend}_{name}" for name in ops.split()}
    for op, arguments in calls:
        # Only forward has a gradient; the others are called without one and raise when asked for it.
        differentiable = grad and op.__name__.startswith(f"{backend}_forward")
        torch.library.opcheck(op, tuple(fresh(a, differentiable) for a in arguments), test_utils=TESTS)


@pytest.mark.parametrize("masking", ["none", "both"])
@pytest.mark.parametrize(
    ("name", "training", "grad"),
    [
        *[
            (name, True, True)
            for name in ("fuxictr", "rechub-softmax", "norm-and-dice", "silu", "score-prelu", "valid")
        ],
        *[(name, False, True) for name in ("fuxictr", "rechub", "leaky-relu", "scores-out", "no-hidden-layer", "blog")],
        ("fuxictr", True, False),
    ],
)
def test_opcheck_of_a_whole_step(name: str, training: bool, grad: bool, masking: str) -> None:
    """What the native backend does where nothing is compiled: an op for the forward, and one for the backward."""
    unit = fused_unit(SMALL[name], 4, "native").train(training)
    calls = recorded(unit, masking, grad)
    ops = ["native_train", "native_train_backward"][: 1 + grad]
    assert [op.__name__.partition(".")[0] for op, _ in calls] == ops
    for op, arguments in calls:
        torch.library.opcheck(op, tuple(fresh(a, False) for a in arguments), test_utils=TESTS)


@pytest.mark.parametrize("masking", ["none", "both"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_a_step_in_two_ops_is_the_step_in_several(name: str, training: bool, masking: str) -> None:
    """The folding, the affine maps and their gradients of csrc/fold.h are those of din_fast/fold.py."""
    case = Case(SMALL[name], (5, 7, 4), masking, training)
    inputs = draw(case, 0, torch.float64)
    results = []
    for compiling in (True, False):
        with patch.object(functional, "is_compiling", lambda now=compiling: now):
            results.append(step(fused_unit(case.spec, 4, "native").double().train(training), inputs))
    assert results[0].keys() == results[1].keys()
    for key, right in results[0].items():
        assert_near(key, results[1][key], right, 1e-12)


# ---- torch.compile


class Model(nn.Module):
    """Two embeddings' worth of a recommender: item ids in, one logit out."""

    def __init__(self, unit: nn.Module, dim: int) -> None:
        super().__init__()
        self.items = nn.Embedding(50, dim)
        self.unit = unit
        self.head = nn.Linear(2 * dim, 1)

    def forward(self, history: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        t = self.items(target)
        return self.head(torch.cat([self.unit(self.items(history), t, lengths=lengths), t], dim=1)).squeeze(1)


def batch(size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randint(0, 50, (size, length)),
        torch.randint(0, 50, (size,)),
        torch.randint(0, length + 1, (size,)),
    )


def model_of(spec: UnitSpec, training: bool) -> Model:
    torch.manual_seed(0)
    return Model(fused_unit(spec, 8, "auto"), 8).train(training)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["rechub", "fuxictr-softmax"])
def test_a_compiled_model_equals_the_eager_one(name: str, training: bool, compiler: str, backend: str) -> None:
    """fullgraph: the unit is in the graph whole, under the automatic choice of backend."""
    torch._dynamo.reset()
    eager, model = (model_of(SMALL[name], training) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for size, length in ((6, 9), (6, 9), (4, 7)):
        arguments = batch(size, length)
        right, found = eager(*arguments), compiled(*arguments)
        assert isinstance(model.unit, FusedActivationUnit) and model.unit.last_backend == backend
        torch.testing.assert_close(found, right)
        for module, out in ((eager, right), (model, found)):
            module.zero_grad()
            out.square().sum().backward()
        for (key, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert_near(key, q.grad, p.grad, 1e-5)
        for (key, b), c in zip(eager.named_buffers(), model.buffers(), strict=True):
            assert_near(key, c, b, 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), eager(*arguments))


COMPILED: dict[str, tuple[UnitSpec, tuple[int, ...]]] = {
    "valid statistics": (UnitSpec((5,), activation="dice_batch", batch_stats="valid"), (4,)),
    "dropout": (UnitSpec((5,), activation="dice_batch", dropout=0.3), (4,)),
    "candidates": (UnitSpec((5,), activation="silu", score_activation="prelu"), (4, 3)),
    "scores out": (UnitSpec((5,), activation="leaky_relu", pooling="none", scale_scores=True), (4, 3)),
    "one history expanded": (UnitSpec((5,), activation="tanh"), (4,)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_every_kind_of_call_compiles_whole(name: str, autocast: bool, backend: str) -> None:
    torch._dynamo.reset()
    spec, shape = COMPILED[name]
    unit = fused_unit(spec, 8, backend).train()
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    history = torch.randn(1 if "expanded" in name else 4, 9, 8, requires_grad=True)
    target = torch.randn(*shape, 8, requires_grad=True)
    results = []
    for run in (unit, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.manual_seed(1)
            out = run(history.expand(4, -1, -1), target)
        grads = torch.autograd.grad(out.float().square().sum(), [history, target, *unit.parameters()])
        results.append([out, *grads])
        assert unit.last_backend == backend and out.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(results[1][0], results[0][0])
    for found, right in zip(results[1][1:], results[0][1:], strict=True):
        if backend == "native":  # not compiled, other ops fold and unfold; bfloat16 may round to the other side
            torch.testing.assert_close(found, right, rtol=2**-7 if autocast else 1e-6, atol=1e-6)
        else:
            assert torch.equal(found, right)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("training", [True, False])
def test_a_sweep_of_shapes_compiles_a_bounded_number_of_times(training: bool, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager, model = (model_of(SMALL["fuxictr"], training) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (3, 5, 16, 33):
        for length in (2, 7, 20, 200):
            arguments = batch(size, length)
            torch.testing.assert_close(compiled(*arguments), eager(*arguments))
    assert counter.frame_count <= (2 if dynamic else 4)


# ---- any small unit on any small shape

SPECIFICATIONS = st.builds(
    lambda scores, **fields: UnitSpec(score_activation=scores[0], softmax=scores[1], **fields),
    scores=st.sampled_from([("none", False), ("none", True), ("sigmoid", False), ("prelu", False)]),
    hidden_units=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5).map(tuple),
    activation=st.sampled_from(ACTIVATIONS),
    batch_norm=st.booleans(),
    dice_affine=st.booleans(),
    per_channel_slope=st.booleans(),
    hidden_bias=st.booleans(),
    batch_stats=st.sampled_from(BATCH_STATS),
    scale_scores=st.booleans(),
    empty=st.sampled_from(["zeros", "uniform"]),
    pooling=st.sampled_from(POOLINGS),
    dropout=st.sampled_from([None, 0.0, 0.25]),
)
CASES = st.builds(
    Case,
    SPECIFICATIONS,
    st.tuples(st.integers(1, 6), st.integers(2, 20), st.integers(1, 9)),
    st.sampled_from(["none", "mask", "lengths", "both"]),
    st.booleans(),
    candidates=st.sampled_from([None, None, 1, 3]),
)
NATIVE = KERNELS == ["native"]


def enough_rows(case: Case) -> bool:
    """Statistics over the valid positions need two of them."""
    if case.spec.batch_stats == "all" or not case.training:
        return True
    valid = draw(case, 0, torch.float64).valid
    return valid is None or int(valid.sum()) * (case.candidates or 1) != 1


@settings(max_examples=200 if NATIVE else 8, deadline=None, derandomize=True, database=None)
@given(case=CASES.filter(enough_rows))
def test_any_small_case(case: Case) -> None:
    """Drawn specs, sizes and masks; in Triton's interpreter, which is slow, fewer of them."""
    check_parity(case, KERNELS[0], torch.float64 if NATIVE else torch.float32)

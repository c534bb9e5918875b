"""Bad input: an error that names the argument, what was expected and what came, and that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from din_fast import FusedActivationUnit, HiddenLayer, UnitParameters, UnitSpec, activation_unit, preset, segments
from tests.test_statistics import unchanged
from tests.truth import fused_unit

B, L, D = 3, 5, 4


def good() -> dict[str, Any]:
    return {
        "history": torch.randn(B, L, D),
        "target": torch.randn(B, D),
        "mask": torch.ones(B, L, dtype=torch.bool),
        "lengths": torch.full((B,), L),
    }


# name of the argument that is wrong (as the message names it) -> error, and what makes it wrong
BAD_TENSORS: list[tuple[str, type[Exception], dict[str, Callable[[], Any]]]] = [
    ("history", ValueError, {"history": lambda: torch.randn(L, D)}),
    ("history", ValueError, {"history": lambda: torch.randn(B, 1, L, D)}),
    ("history", ValueError, {"history": lambda: torch.randn(D)}),
    ("target", ValueError, {"target": lambda: torch.randn(D)}),
    ("target", ValueError, {"target": lambda: torch.randn(B, 1, 1, D)}),
    ("target", ValueError, {"target": lambda: torch.randn(B + 1, 2, D)}),
    ("target", ValueError, {"target": lambda: torch.randn(B, 2, D + 1)}),
    ("target", ValueError, {"target": lambda: torch.randn(B, D + 1)}),
    ("target", ValueError, {"target": lambda: torch.randn(B + 1, D)}),
    ("target", ValueError, {"target": lambda: torch.randn(1, D)}),
    ("history", ValueError, {"history": lambda: torch.randn(B, L, D + 1), "target": lambda: torch.randn(B, D + 1)}),
    ("history", ValueError, {"history": lambda: torch.randn(B, L, 0), "target": lambda: torch.randn(B, 0)}),
    ("mask", ValueError, {"mask": lambda: torch.ones(B, L + 1, dtype=torch.bool)}),
    ("mask", ValueError, {"mask": lambda: torch.ones(B, L, 1, dtype=torch.bool)}),
    ("mask", ValueError, {"mask": lambda: torch.ones(1, L, dtype=torch.bool)}),
    ("mask", TypeError, {"mask": lambda: torch.ones(B, L)}),
    ("mask", TypeError, {"mask": lambda: torch.ones(B, L, dtype=torch.int64)}),
    ("mask", TypeError, {"mask": lambda: [[True] * L] * B}),
    ("lengths", ValueError, {"lengths": lambda: torch.tensor([1, -1, 2])}),
    ("lengths", ValueError, {"lengths": lambda: torch.tensor([1, L + 1, 2])}),
    ("lengths", ValueError, {"lengths": lambda: torch.tensor([1, 2**40, 2])}),
    ("lengths", ValueError, {"lengths": lambda: torch.tensor([1, -(2**31), 2], dtype=torch.int32)}),
    ("lengths", ValueError, {"lengths": lambda: torch.ones(B, 1, dtype=torch.int64)}),
    ("lengths", ValueError, {"lengths": lambda: torch.ones(B + 1, dtype=torch.int64)}),
    ("lengths", TypeError, {"lengths": lambda: torch.ones(B)}),
    ("lengths", TypeError, {"lengths": lambda: torch.ones(B, dtype=torch.bool)}),
    ("lengths", TypeError, {"lengths": lambda: [1, 2, 3]}),
    ("history", TypeError, {"history": lambda: torch.ones(B, L, D, dtype=torch.int64)}),
    ("history", TypeError, {"history": lambda: torch.ones(B, L, D, dtype=torch.complex64)}),
    ("history", TypeError, {"history": lambda: [[1.0]]}),
    ("history", TypeError, {"history": lambda: None}),
    ("target", TypeError, {"target": lambda: torch.randn(B, D, dtype=torch.float64)}),
    ("target", TypeError, {"target": lambda: torch.ones(B, D, dtype=torch.int64)}),
    ("target", TypeError, {"target": lambda: "target"}),
    ("target", ValueError, {"target": lambda: torch.randn(B, D, device="meta")}),
    ("mask", ValueError, {"mask": lambda: torch.ones(B, L, dtype=torch.bool, device="meta")}),
    ("lengths", ValueError, {"lengths": lambda: torch.full((B,), L, device="meta")}),
]
IDS = [f"{i}-{name}-{error.__name__}" for i, (name, error, _) in enumerate(BAD_TENSORS)]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "error", "changes"), BAD_TENSORS, ids=IDS)
def test_the_module_names_what_is_wrong(
    name: str,
    error: type[Exception],
    changes: dict[str, Callable[[], Any]],
    training: bool,
    grad: bool,
    any_backend: str,
) -> None:
    unit = fused_unit(preset("deepctr", [6]), D, any_backend)
    unit(torch.randn(B, L, D), torch.randn(B, D)).sum().backward()  # so that there are gradients to leave alone
    unit.train(training)
    arguments = good() | {key: make() for key, make in changes.items()}
    expected = pytest.raises(error, match=rf"^{name}: expected .*\bgot ")
    with unchanged(unit), torch.set_grad_enabled(grad), expected as caught:
        unit(**arguments)
    assert "query" not in str(caught.value)


@pytest.mark.parametrize(("name", "error", "changes"), BAD_TENSORS, ids=IDS)
def test_the_functional_form_calls_the_target_query(
    name: str, error: type[Exception], changes: dict[str, Callable[[], Any]], any_backend: str
) -> None:
    unit = fused_unit(preset("deepctr", [6]), D, any_backend)
    arguments = good() | {key: make() for key, make in changes.items()}
    arguments["query"] = arguments.pop("target")
    parameters = unit.attention.unit_parameters()
    name = name.replace("target", "query")
    with unchanged(unit), pytest.raises(error, match=rf"^({name}|parameters\S*): expected .*\bgot "):
        activation_unit(**arguments, parameters=parameters, spec=unit.spec, backend=any_backend)


def test_the_modules_own_size_is_named_for_inputs_of_another(any_backend: str) -> None:
    unit = fused_unit(preset("rechub", [6]), D, any_backend).train()
    for target_dim in (D, D + 1):
        with unchanged(unit), pytest.raises(ValueError, match=rf"^history: expected dim {D} \(emb_dim\), got {D + 1}$"):
            unit(torch.randn(B, L, D + 1), torch.randn(B, target_dim))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("field", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("norm", ["norm", "gate_norm"])
def test_every_tensor_of_a_norm_is_checked(norm: str, field: str, training: bool, any_backend: str) -> None:
    """One value would do for all units by broadcasting."""
    unit = fused_unit(UnitSpec((6,), activation="dice_batch", batch_norm=True, dice_affine=True), D, any_backend)
    module = getattr(unit.train(training).attention.unit_parameters().hidden[0], norm)
    wrong = torch.ones(1)
    setattr(module, field, torch.nn.Parameter(wrong) if field in ("weight", "bias") else wrong)
    message = rf"^parameters.hidden\[0\].{norm}.{field}: expected shape \(6,\), got \(1,\)$"
    with unchanged(unit), pytest.raises(ValueError, match=message):
        unit(torch.randn(B, L, D), torch.randn(B, D))


def test_inputs_of_another_dtype_than_the_parameters(any_backend: str) -> None:
    unit = fused_unit(preset("rechub", [6]), D, any_backend).train()
    with unchanged(unit), pytest.raises(TypeError, match=r"expected .*float.* got .*float"):
        unit(torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64))
    unit.half()
    with unchanged(unit), pytest.raises(TypeError, match=r"weight: expected torch.float32 .* got torch.float16"):
        unit(torch.randn(B, L, D), torch.randn(B, D))


@pytest.mark.parametrize("dtype", segments.FLOATS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_dtype_that_the_backend_does_not_have(training: bool, dtype: torch.dtype, backend: str) -> None:
    unit = fused_unit(preset("rechub", [6]), D, backend).to(dtype).train(training)
    inputs = torch.randn(B, L, D, dtype=dtype), torch.randn(B, D, dtype=dtype)
    if backend == "native" or dtype != torch.float64:
        assert unit(*inputs).dtype == dtype and unit.last_backend == backend
        return
    message = r"^history: expected float32, bfloat16 or float16 on the triton backend, got torch.float64$"
    with unchanged(unit), pytest.raises(TypeError, match=message):
        unit(*inputs)


def test_inputs_on_another_device_than_the_parameters(any_backend: str) -> None:
    unit = fused_unit(preset("rechub", [6]), D, any_backend).to("meta")
    with pytest.raises(ValueError, match=r"expected device cpu .* got meta"):
        unit(torch.randn(B, L, D), torch.randn(B, D))


def test_a_failing_call_leaves_last_backend_as_it_was(any_backend: str) -> None:
    unit = fused_unit(preset("rechub", [6]), D, any_backend)
    with pytest.raises(ValueError, match="lengths"):
        unit(**good() | {"lengths": torch.tensor([1, -1, 2])})
    assert unit.last_backend is None


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("emb_dim", ValueError, {"emb_dim": 0}),
        ("emb_dim", ValueError, {"emb_dim": -4}),
        ("emb_dim", TypeError, {"emb_dim": 4.0}),
        ("emb_dim", TypeError, {"emb_dim": True}),
        ("emb_dim", TypeError, {"emb_dim": "4"}),
        ("dims", ValueError, {"dims": [0]}),
        ("dims", ValueError, {"dims": [8, -1]}),
        ("dims", ValueError, {"dims": [8, 8, 8, 8]}),
        ("dims", TypeError, {"dims": 36}),
        ("dims", TypeError, {"dims": "36"}),
        ("dims", TypeError, {"dims": [3.5]}),
        ("activation", ValueError, {"activation": "swish"}),
        ("activation", ValueError, {"activation": ""}),
        ("backend", ValueError, {"backend": "cuda"}),
        ("spec", TypeError, {"spec": "fuxictr"}),
        ("spec", ValueError, {"spec": preset("fuxictr"), "dims": [36]}),
    ],
    ids=str,
)
def test_the_constructor_names_what_is_wrong(name: str, error: type[Exception], arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=rf"^{name}: .*expected .*\bgot "):
        FusedActivationUnit(**{"emb_dim": 4} | arguments)


def parameters_of(**changes: Any) -> UnitParameters:
    """Those of one hidden layer of 6 units with batch Dice, some of them replaced."""
    unit = FusedActivationUnit(D, spec=preset("fuxictr", [6]))
    (layer,), weight, bias, _ = unit.attention.unit_parameters()
    top = {key: changes.pop(key) for key in ("hidden", "weight", "bias") if key in changes}
    fields = {key.removeprefix("layer_"): value for key, value in changes.items()}
    return UnitParameters((layer._replace(**fields),), weight, bias)._replace(**top)


@pytest.mark.parametrize(
    ("message", "error", "changes"),
    [
        (r"parameters: expected 1 hidden layers .* got 0", ValueError, {"hidden": ()}),
        (r"hidden\[0\].weight: .* \(6, 16\), got \(6, 12\)", ValueError, {"layer_weight": torch.ones(6, 12)}),
        (r"hidden\[0\].weight: .* \(6, 16\), got \(5, 16\)", ValueError, {"layer_weight": torch.ones(5, 16)}),
        (r"hidden\[0\].bias: expected shape \(6,\), got \(5,\)", ValueError, {"layer_bias": torch.ones(5)}),
        (r"hidden\[0\].slope: expected a tensor .* got None", ValueError, {"layer_slope": None}),
        (r"hidden\[0\].slope: expected 1 or 6 elements, got shape \(3,\)", ValueError, {"layer_slope": torch.ones(3)}),
        (r"hidden\[0\].norm: expected None", ValueError, {"layer_norm": torch.nn.BatchNorm1d(6)}),
        (r"hidden\[0\].gate_norm: expected", ValueError, {"layer_gate_norm": None}),
        (
            r"^parameters.hidden\[0\].gate_norm.weight: expected shape \(6,\), got \(5,\)",
            ValueError,
            {"layer_gate_norm": torch.nn.BatchNorm1d(5)},
        ),
        (
            r"^parameters.hidden\[0\].gate_norm.running_mean: expected shape \(6,\), got \(5,\)",
            ValueError,
            {"layer_gate_norm": torch.nn.BatchNorm1d(5, affine=False)},
        ),
        (
            r"^parameters.hidden\[0\].gate_norm.weight: expected torch.float32 .* got torch.float64",
            TypeError,
            {"layer_gate_norm": torch.nn.BatchNorm1d(6, dtype=torch.float64)},
        ),
        (
            r"^parameters.hidden\[0\].gate_norm.weight: expected device cpu .* got meta",
            ValueError,
            {"layer_gate_norm": torch.nn.BatchNorm1d(6, device="meta")},
        ),
        (r"parameters.weight: expected shape \(1, 6\), got \(2, 6\)", ValueError, {"weight": torch.ones(2, 6)}),
        (r"parameters.bias: expected shape \(1,\), got \(6,\)", ValueError, {"bias": torch.ones(6)}),
        (r"parameters.weight: expected .*float32.* got .*float64", TypeError, {"weight": torch.ones(1, 6).double()}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_functional_form_checks_its_parameters(
    message: str, error: type[Exception], changes: dict[str, Any], any_backend: str
) -> None:
    with pytest.raises(error, match=message):
        activation_unit(
            query=torch.randn(B, D),
            history=torch.randn(B, L, D),
            parameters=parameters_of(**changes),
            spec=preset("fuxictr", [6]),
            backend=any_backend,
        )


def test_a_layer_without_bias_is_a_layer_with_a_bias_of_zero(any_backend: str) -> None:
    """As TorchEasyRec has it: what may be None is None, and is no error."""
    query, history = torch.randn(B, D), torch.randn(B, L, D)
    outs = []
    for bias in (None, torch.zeros(6)):
        torch.manual_seed(1)
        layer = HiddenLayer(torch.randn(6, 4 * D), bias)
        parameters = UnitParameters((layer,), torch.randn(1, 6), None if bias is None else torch.zeros(1))
        spec = preset("fuxictr", [6], "relu")
        out = activation_unit(query=query, history=history, parameters=parameters, spec=spec, backend=any_backend)
        outs.append(out)
    assert torch.equal(*outs)

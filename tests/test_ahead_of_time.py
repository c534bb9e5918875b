"""Every Triton kernel compiles at three sizes for two GPUs, none of which is needed: see bench/ahead_of_time.py."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.ahead_of_time import DIED, Compiled, Compiler, Launch, captured, compile_launch
from din_fast import UnitSpec, preset
from din_fast.backends import triton as backend
from din_fast.backends.triton import operands, tiling
from tests.truth import Case, call, draw, fused_unit

USERS = 64
LONG = (2, 4096)  # users and length: long enough to be cut into parts
SIZES: dict[int, tuple[list[int], int]] = {16: ([36], 20), 64: ([80, 40], 100), 128: ([256, 128], 100)}
HASH = str(0x7FEB352D)  # a factor in the random numbers of the dropout
# The history's type, for three units: batch Dice (or none), row Dice with softmax, batch Dice on a long history. The
# last two have every kernel between them. tf32 is float32 with TF32 products.
TYPES = {
    (80, 16): (None, "float32", "bfloat16"),
    (80, 64): ("bfloat16", "tf32", "float16"),
    (80, 128): (None, "bfloat16", "float32"),
    (90, 16): ("float32", "bfloat16", "float16"),
    (90, 64): ("tf32", "bfloat16", "bfloat16"),
    (90, 128): ("bfloat16", "float32", "tf32"),
}


# ---------------------------------------------------------------- planted kernels
jit: Callable[[Callable[..., None]], Any] = triton.jit
constexpr_function: Callable[[Callable[..., None]], Any] = triton.constexpr_function


@jit
def store_kernel(x_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i + n, mask=i < n)


@jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.static_assert(BLOCK > 16, "planted")
    tl.store(x_ptr, 0.0)


@constexpr_function
def end_process(status):  # type: ignore[no-untyped-def]
    __import__("os")._exit(status)  # Triton takes no other name that leads out of its language


@jit
def fatal_kernel(x_ptr, STATUS: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr, end_process(STATUS))


# ---------------------------------------------------------------- fixtures and helpers
@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new cache for Triton: it neither reads nor writes the user's."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def compiler(cache: None) -> Iterator[Compiler]:
    with Compiler() as found:
        yield found


def all_kernels() -> set[str]:
    """Names of the kernels in din_fast.backends.triton; one with an underscore is no part of a call."""
    found = set()
    for info in pkgutil.iter_modules(backend.__path__, f"{backend.__name__}."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel") and not name.startswith("_"):
                found.add(name)
    return found


def launches_of(
    spec: UnitSpec,
    shape: tuple[int, int, int],
    kind: str,
    training: bool = True,
    inference: bool = True,
    masking: str = "none",
) -> list[Launch]:
    """What a step in training, and a call in evaluation and without gradient, launch."""
    case = Case(spec, shape, masking)
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    unit = fused_unit(spec, shape[-1], "triton").to(dtype)
    inputs = draw(case, 0, torch.float32).to(dtype)

    def run() -> None:
        if training:
            inputs.history.requires_grad_()
            inputs.target.requires_grad_()
            call(unit.train(), inputs).backward(inputs.upstream)
        if inference:
            with torch.no_grad():
                call(unit.eval(), inputs)

    with pytest.MonkeyPatch.context() as settings:
        settings.setattr(operands, "float32_precision", lambda: "tf32" if kind == "tf32" else "ieee")
        return captured(run)


def check_all(found: list[Compiled]) -> None:
    """All have compiled; the message is the compiler's."""
    failed = [str(c) for c in found if c.error is not None]
    if failed:
        pytest.fail(f"{len(failed)} of {len(found)} did not compile\n\n" + "\n\n".join(failed), pytrace=False)


def most_shared_memory(units: list[int], length: int, dim: int, found: Compiled) -> int:
    """The bound by which tiling chooses tiles for a device, for the larger of a call's two."""
    if found.launch.kernel.__name__ == "complete_kernel":  # has no tile
        return 0
    history = found.launch.arguments["k_ptr"]
    half, tf32 = history.dtype in operands.HALF, found.launch.arguments.get("PREC") == "tf32"
    bounds = []
    for users, rows in ((USERS, length), LONG):
        for row_dice in (False, True):
            shape = tiling.Shape(users, rows, dim, tuple(units), half, tf32, row_dice=row_dice)
            plan = tiling.plan(shape)
            bounds += [tiling.shared_memory(shape, tile) for tile in (plan.forward, plan.backward)]
    return max(bounds)


# ---------------------------------------------------------------- tests
@pytest.mark.parametrize("dim", SIZES)
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
def test_every_kernel_compiles(compiler: Compiler, capability: int, dim: int) -> None:
    units, length = SIZES[dim]
    batch, row, long = TYPES[capability, dim]
    launches = [] if batch is None else launches_of(preset("fuxictr", units), (USERS, length, dim), batch)
    row_dice = preset("rechub", units, softmax=True)
    launches += launches_of(row_dice, (USERS, length, dim), row, inference=batch is None)
    launches += launches_of(preset("fuxictr", units, softmax=True), (*LONG, dim), long, training=False)
    found = compiler.compile(launches, capability)
    check_all(found)
    nothing_above = {"complete_kernel"} if len(units) == 1 else set()  # the last layer's d z is needed by none
    assert {c.launch.kernel.__name__ for c in found} == all_kernels() - nothing_above
    assert all(c.kernel.metadata.target.arch == capability and c.kernel.asm["cubin"] for c in found)
    for c in found:
        assert c.kernel.metadata.shared <= most_shared_memory(units, length, dim, c)
        assert HASH not in c.kernel.asm["ptx"]  # of the dropout, which costs nothing where there is none
        if c.launch.kernel.__name__ == "forward_kernel":
            half = c.launch.arguments["k_ptr"].dtype in operands.HALF
            assert ("tanh.approx" in c.kernel.asm["ptx"]) is half


@pytest.mark.parametrize(
    ("capability", "kind", "activation"),
    [(80, "float32", "tanh"), (90, "bfloat16", "tanh"), (90, "float16", "dice_row")],
)
def test_dropout_tanh_and_valid_statistics_compile(
    compiler: Compiler, capability: int, kind: str, activation: str
) -> None:
    """And the PReLU on the score; and in an integer's bits the shifts are logical, as in the interpreter."""
    spec = UnitSpec(
        (36, 20),
        activation=activation,
        batch_norm=True,
        batch_stats="valid",
        score_activation="prelu",
        dropout=0.6,
    )
    found = compiler.compile(launches_of(spec, (USERS, 40, 32), kind, inference=False, masking="both"), capability)
    check_all(found)
    dropping = [c for c in found if c.launch.arguments.get("DROPOUT")]
    names = {"moments_kernel", "forward_kernel", "layer_kernel", "history_kernel"}
    assert {c.launch.kernel.__name__ for c in dropping} == names | (
        {"row_kernel"} if activation == "dice_row" else set()
    )
    for c in dropping:
        first_moments = c.launch.kernel.__name__ == "moments_kernel" and c.launch.arguments["LAYER"] == 0
        if not first_moments:  # they are of z before any activation
            assert "shr.u32" in c.kernel.asm["ptx"] and HASH in c.kernel.asm["ptx"]


def test_the_largest_sizes_fit_into_shared_memory(compiler: Compiler) -> None:
    """Three layers of the widest kind, of which the third once took 296 KB: 99 KiB is what sm_86 has."""
    launches = launches_of(preset("fuxictr", [1024, 256, 256]), (2, 40, 512), "float32")
    found = compiler.compile(launches, 80)
    check_all(found)
    assert max(c.kernel.metadata.shared for c in found) <= tiling.Limits().shared_memory


@pytest.mark.parametrize(("kind", "fast"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_half_types_are_recorded_as_on_nvidia(kind: str, fast: bool) -> None:
    launches = launches_of(preset("rechub", [16]), (4, 8, 16), kind)
    assert {n.arguments["FAST"] for n in launches if "FAST" in n.arguments} == {fast}


def stores(*calls: tuple[Tensor, int]) -> list[Launch]:
    """Launches of a small kernel."""

    def run() -> None:
        for x, n in calls:
            store_kernel[(1,)](x, n, BLOCK=32, num_warps=2, enable_fp_fusion=True)

    return captured(run)


def test_a_launch_is_recorded_and_not_run() -> None:
    x = torch.zeros(32)

    def run() -> None:
        store_kernel[(1,)](x, 7, BLOCK=32, num_warps=2)
        store_kernel[lambda named: (named["n"], 2)](x, n=3, BLOCK=16)

    first, second = captured(run)
    assert not x.any()
    assert first.kernel is store_kernel
    assert first.arguments["x_ptr"] is x
    assert (first.arguments["n"], first.arguments["BLOCK"]) == (7, 32)
    assert (first.options, first.grid) == ({"num_warps": 2}, (1,))
    assert (second.options, second.grid) == ({}, (3, 2))


def test_launches_are_specialised_as_triton_does_and_compiled_once(compiler: Compiler) -> None:
    x = torch.zeros(48)
    launches = stores(*((x, n) for n in (32, 48, 1, 7, 9, 1 << 31, 64)), (x[1:], 32), (x.half(), 32))
    found = compiler.compile(launches, 90)
    check_all(found)
    assert [c.launch for c in found] == [launches[i] for i in (0, 2, 3, 5, 7, 8)]
    types = [(c.kernel.src.signature["x_ptr"], c.kernel.src.signature["n"]) for c in found]
    integers = ("i32", "constexpr", "i32", "i64", "i32")
    assert types == [*(("*fp32", n) for n in integers), ("*fp16", "i32")]
    divisible = [{at[0] for at in c.kernel.src.attrs} for c in found]
    assert divisible == [{0, 1}, {0}, {0}, {0, 1}, {1}, {0, 1}]
    assert compile_launch(launches[0], 90).kernel.asm["cubin"] == found[0].kernel.asm["cubin"]


def test_what_does_not_compile_is_reported(cache: None) -> None:
    x = torch.zeros(32)
    options = {"num_warps": 1, "enable_fp_fusion": True}

    def run() -> None:
        wrong_kernel[(1,)](x, BLOCK=16, **options)
        fatal_kernel[(1,)](x, STATUS=3, **options)
        wrong_kernel[(1,)](x, BLOCK=32, **options)

    with Compiler(workers=1) as compiler:  # it has to start another process after the second
        found = compiler.compile(captured(run), 80)
    assert [c.error is None for c in found] == [False, False, True]
    assert [c.kernel is None for c in found] == [True, True, False]
    assert "planted" in str(found[0].error)
    assert found[1].error == DIED
    with pytest.raises(pytest.fail.Exception, match=r"(?s)^2 of 3 .*fatal_kernel sm_80 .* STATUS=3\n" + DIED):
        check_all(found)


def test_recording_ends_with_the_call() -> None:
    def patched() -> list[object]:
        return [JITFunction.run, backend.why_not, operands._bfloat16_is_right]

    def fail() -> None:
        inside.extend(patched())
        raise KeyError("planted")

    before, inside = patched(), list[object]()
    assert captured(lambda: None) == []
    assert patched() == before
    with pytest.raises(KeyError, match="planted"):
        captured(fail)
    assert patched() == before
    assert not any(a is b for a, b in zip(before, inside, strict=True))


def test_the_interpreter_has_nothing_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        captured(lambda: None)

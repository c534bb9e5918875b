"""The interpreter of these tests finds planted faults, and its bfloat16 and tf32 are right."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from tests.interpreter import honest
from tests.interpreter.honest import GUARD, BFloat16Arithmetic, KernelMemoryError, KernelRaceError

jit: Callable[[Callable[..., None]], Any] = triton.jit

ALL_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)  # every bfloat16, every float16


# ---------------------------------------------------------------- memory
@jit
def copy(x_ptr, y_ptr, readable, writable, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < readable, other=0.0)
    tl.store(y_ptr + i, x, mask=i < writable)


@jit
def copy_pair(pair, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(pair[1] + i, tl.load(pair[0] + i))


@jit
def copy_matrix(x_ptr, y_ptr, x_stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + row * x_stride + column, mask=column < columns, other=0.0)
    tl.store(y_ptr + row * COLUMNS + column, x)


@jit
def copy_without_mask(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@jit
def copy_as_words(x_ptr, y_ptr, first, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = (x_ptr + first).to(tl.pointer_type(tl.int32))
    tl.store(y_ptr + i, tl.load(words + i))


@jit
def fold(x_ptr, y_ptr, PERIOD: tl.constexpr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if ATOMIC:
        tl.atomic_add(y_ptr + i % PERIOD, x)
    else:
        tl.store(y_ptr + i % PERIOD, x)


@jit
def pass_on(x_ptr, y_ptr, source, target, first, BLOCK: tl.constexpr):
    """y[i + target] = x[i + source], from program `first` on."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + source)
    tl.store(y_ptr + i + target, x, mask=i >= first * BLOCK)


@jit
def last_stores(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x_ptr + i, x)


@jit
def count(counter_ptr, seen_ptr, ATOMIC: tl.constexpr):
    program = tl.program_id(0)
    if ATOMIC:
        tl.store(seen_ptr + program, tl.atomic_add(counter_ptr, 1))
    else:
        tl.atomic_add(counter_ptr, 1)
        tl.store(seen_ptr + program, tl.load(counter_ptr))


@jit
def swap(counter_ptr):
    tl.atomic_cas(counter_ptr + tl.program_id(0), 0, 1)


@jit
def store_ids(y_ptr, DROP: tl.constexpr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if DROP:
        z = 0
    tl.store(y_ptr + x + tl.num_programs(0) * (y + tl.num_programs(1) * z), x + 10 * y + 100 * z)


@jit
def narrow_and_wide(half_ptr, word_ptr, word):
    if tl.program_id(0) == 0:
        tl.store(word_ptr + word, 7)
    else:
        tl.store(half_ptr + 3, tl.load(half_ptr + 3) + 1)


def test_correct_kernels_pass() -> None:
    x, y = torch.randn(100), torch.empty(100)
    copy[(2,)](x, y, 100, 100, BLOCK=64)
    assert torch.equal(x, y)
    copy[(2,)](y, y, 100, 100, BLOCK=64)  # in place
    assert torch.equal(x, y)
    a, b = torch.randn(64), torch.empty(64)
    copy_pair[(1,)]((a, b), BLOCK=64)
    assert torch.equal(a, b)
    copy[(1,)](torch.empty(0), b, 0, 64, BLOCK=64)
    assert not b.any()


def test_load_out_of_bounds() -> None:
    x, y = torch.randn(200)[:100], torch.empty(128)
    with pytest.raises(
        KernelMemoryError, match=r"load of 4 bytes, program \(1, 0, 0\): 1 of 37 .* byte offset 400 of"
    ) as e:
        copy[(2,)](x, y, 101, 128, BLOCK=64)
    assert "x_ptr (shape (100,), torch.float32, 400 bytes)" in str(e.value)
    copy[(2,)](x, y, 100, 128, BLOCK=64)  # the interpreter still works
    assert torch.equal(x, y[:100])
    with pytest.raises(KernelMemoryError, match="byte offset -4 of argument x_ptr"):
        pass_on[(1,)](torch.empty(200)[100:], y, -1, 0, 0, BLOCK=64)


def test_store_out_of_bounds() -> None:
    x, y = torch.randn(128), torch.zeros(200)
    with pytest.raises(KernelMemoryError, match=r"store .* program \(1, 0, 0\): 28 of 64 .*y_ptr"):
        copy[(2,)](x, y[:100], 128, 128, BLOCK=64)
    assert not y[100:].any()


def test_out_of_bounds_through_tuples_and_without_mask() -> None:
    with pytest.raises(KernelMemoryError, match=r"argument pair\[0\]"):
        copy_pair[(1,)]((torch.empty(63), torch.empty(64)), BLOCK=64)
    with pytest.raises(KernelMemoryError, match=r"store .* argument y_ptr"):
        copy_without_mask[(1,)](torch.empty(64), y_ptr=torch.empty(1), BLOCK=64)


def test_another_argument_does_not_excuse_the_gap_between_two() -> None:
    memory = torch.zeros(256)
    y = torch.empty(128)
    copy[(1,)](memory[:64], y, 64, 64, BLOCK=128)
    with pytest.raises(KernelMemoryError, match=r"32 of 128 .* byte offset 256 of argument pair\[0\]"):
        copy_pair[(1,)]((memory[:64], y, memory[96:160]), BLOCK=128)
    copy_pair[(1,)]((memory[:64], y, memory[64:128]), BLOCK=128)  # side by side: two arguments in one load


def test_what_a_strided_view_leaves_out() -> None:
    x = torch.randn(5, 16)[:, :10]  # of which four rows are read: between its first and its last element
    y = torch.empty(4, 16)
    copy_matrix[(1,)](x, y, x.stride(0), 10, ROWS=4, COLUMNS=16)
    assert torch.equal(y[:, :10], x[:4])
    with pytest.raises(KernelMemoryError, match=r"4 of 44 .* byte offset 40 .*shape \(5, 10\), strides \(16, 1\)"):
        copy_matrix[(1,)](x, y, x.stride(0), 11, ROWS=4, COLUMNS=16)
    once = torch.randn(4, 1).expand(4, 16)
    copy_matrix[(1,)](once, y, 1, 1, ROWS=4, COLUMNS=16)
    assert torch.equal(y[:, 0], once[:, 0])
    with pytest.raises(KernelMemoryError, match=r"1 of 8 .* byte offset 16 .*shape \(4, 16\), strides \(1, 0\)"):
        copy_matrix[(1,)](once, y, 1, 2, ROWS=4, COLUMNS=16)


def test_unaligned() -> None:
    x, y = torch.arange(16, dtype=torch.int16), torch.empty(4, dtype=torch.int32)
    copy_as_words[(1,)](x, y, 2, BLOCK=4)
    assert torch.equal(y, x[2:10].view(torch.int32))
    with pytest.raises(KernelMemoryError, match="4 of 4 addresses are not aligned"):
        copy_as_words[(1,)](x, y, 1, BLOCK=4)
    with pytest.raises(KernelMemoryError, match=r"argument x_ptr \(shape \(16,\), torch.int16, 32 bytes\)"):
        copy_as_words[(1,)](x, y, 10, BLOCK=4)
    with pytest.raises(KernelMemoryError, match="parts of elements of 8 bytes"):
        copy_as_words[(1,)](x.long(), y, 0, BLOCK=4)


def test_programs_that_store_to_one_element() -> None:
    x, y = torch.ones(128), torch.zeros(128)
    with pytest.raises(KernelRaceError, match=r"store of program \(1, 0, 0\) meets the store of program \(0, 0, 0\)"):
        fold[(2,)](x, y, PERIOD=64, ATOMIC=False, BLOCK=64)
    fold[(2,)](x, y, PERIOD=128, ATOMIC=False, BLOCK=64)
    fold[(1,)](x, y, PERIOD=64, ATOMIC=False, BLOCK=64)  # a further launch may write again
    y.zero_()
    fold[(2,)](x, y, PERIOD=4, ATOMIC=True, BLOCK=64)
    assert y.tolist() == [32.0] * 4 + [0.0] * 124


def test_store_that_writes_an_element_twice() -> None:
    x, y = torch.ones(64), torch.zeros(64)
    with pytest.raises(
        KernelRaceError, match=r"one store of program \(0, 0, 0\) writes byte offset 0 of .*y_ptr.* twice"
    ):
        fold[(1,)](x, y, PERIOD=32, ATOMIC=False, BLOCK=64)


def test_load_of_what_another_program_stored() -> None:
    x = torch.zeros(256)
    with pytest.raises(KernelRaceError, match=r"load of program \(1, 0, 0\) meets the store of program \(0, 0, 0\)"):
        pass_on[(2,)](x, x, 0, 64, 0, BLOCK=64)
    pass_on[(2,)](x, x, 0, 128, 0, BLOCK=64)


def test_store_to_what_another_program_loaded() -> None:
    x = torch.zeros(256)
    with pytest.raises(KernelRaceError, match=r"store of program \(1, 0, 0\) meets the load of program \(0, 0, 0\)"):
        pass_on[(2,)](x, x, 64, 0, 1, BLOCK=64)
    with pytest.raises(KernelRaceError, match=r"store of program \(2, 0, 0\) meets the load of several programs"):
        last_stores[(3,)](torch.zeros(64), BLOCK=64)


def test_views_of_one_memory_share_its_owners() -> None:
    memory = torch.zeros(192)
    with pytest.raises(KernelRaceError, match=r"load of program \(1, 0, 0\) meets the store of program \(0, 0, 0\)"):
        pass_on[(2,)](memory[:128], memory[64:], 0, 0, 0, BLOCK=64)
    halves = torch.zeros(8, dtype=torch.int16)
    narrow_and_wide[(2,)](halves, halves.view(torch.int32), 0)
    assert halves.tolist() == [7, 0, 0, 1, 0, 0, 0, 0]
    with pytest.raises(KernelRaceError, match=r"load .* meets the store .* byte offset 6 "):
        narrow_and_wide[(2,)](halves, halves.view(torch.int32), 1)


def test_atomics() -> None:
    counter, seen = torch.zeros(1, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    count[(3,)](counter, seen, ATOMIC=True)
    assert seen.tolist() == [0, 1, 2]
    with pytest.raises(KernelRaceError, match=r"atomic of program \(1, 0, 0\) meets the load of program \(0, 0, 0\)"):
        count[(3,)](counter, seen, ATOMIC=False)
    swap[(1,)](counter)
    with pytest.raises(KernelMemoryError, match="atomic of 4 bytes"):
        swap[(2,)](counter)


def test_programs_in_three_dimensions() -> None:
    y = torch.empty(2 * 3 * 4, dtype=torch.int32)
    store_ids[(2, 3, 4)](y, DROP=False)
    assert y.view(4, 3, 2)[3, 2, 1] == 321
    with pytest.raises(KernelRaceError, match=r"program \(0, 0, 1\) meets the store of program \(0, 0, 0\)"):
        store_ids[(2, 3, 4)](y, DROP=True)


def test_log() -> None:
    before = GUARD.launches
    copy[(2,)](torch.randn(100), torch.empty(100), 90, 100, BLOCK=64)
    fold[(1,)](torch.ones(64), torch.zeros(4), PERIOD=4, ATOMIC=True, BLOCK=64)
    copy[(1,)](torch.ones(64).bfloat16(), torch.ones(64).bfloat16(), 64, 64, BLOCK=64)
    assert GUARD.launches == before + 3
    assert [(x.kernel, x.loaded, x.stored) for x in GUARD.log[before:]] == [
        ("copy", 360, 400),
        ("fold", 512, 256),
        ("copy", 128, 128),
    ]


@jit
def load_past_the_end(x_ptr, BLOCK: tl.constexpr):
    return tl.load(x_ptr + 1 + tl.arange(0, BLOCK))


@jit
def calls_a_function(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), load_past_the_end(x_ptr, BLOCK))


def test_fault_in_a_function_that_a_kernel_calls() -> None:
    with pytest.raises(KernelMemoryError, match="byte offset 256"):
        calls_a_function[(1,)](torch.zeros(64), BLOCK=64)


def test_install_is_idempotent() -> None:
    before = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_fadd, InterpreterBuilder.create_dot
    honest.install()
    assert before == (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_fadd,
        InterpreterBuilder.create_dot,
    )


def test_empty_is_nan() -> None:
    assert torch.empty(8).isnan().all()


# ---------------------------------------------------------------- bfloat16
@jit
def cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@jit
def implicit_cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@jit
def constants(x_ptr, y_ptr, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < 16, other=VALUE)
    tl.store(y_ptr + i, x)
    tl.store(y_ptr + BLOCK + i, tl.where(i < 8, x, VALUE))
    tl.store(y_ptr + 2 * BLOCK + i, tl.full((BLOCK,), VALUE, tl.bfloat16))
    tl.store(y_ptr + 3 * BLOCK + i, tl.zeros((BLOCK,), tl.bfloat16))


@jit
def moves(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, ROWS * COLUMNS))
    x = tl.trans(tl.reshape(x, (ROWS, COLUMNS)))
    x = tl.where(tl.arange(0, COLUMNS)[:, None] < 1, x, tl.broadcast_to(x, (COLUMNS, ROWS)))
    i = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(y_ptr + i, x.to(tl.int16, bitcast=True).to(tl.bfloat16, bitcast=True))


@jit
def second(a, b):
    return b


@jit
def compute(x_ptr, y_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if OP == "add":
        y = x + x
    elif OP == "multiply":
        y = x * 2.0
    elif OP == "negate":
        y = -x
    elif OP == "compare":
        y = tl.where(x > tl.zeros_like(x), x, tl.zeros_like(x))
    elif OP == "abs":
        y = tl.abs(x)
    elif OP == "fma":
        y = tl.fma(x, x, x)
    elif OP == "reduce":
        y = tl.where(i < 8, x, tl.reduce(x, 0, second))
    elif OP == "scan":
        y = tl.associative_scan(x, 0, second)
    elif OP == "from int":
        y = i.to(tl.bfloat16)
    elif OP == "from float64":
        y = x.to(tl.float64).to(tl.bfloat16)
    elif OP == "round down":
        y = x.to(tl.float32).to(tl.bfloat16, fp_downcast_rounding="rtz")
    elif OP == "atomic":
        y = x
        tl.atomic_add(y_ptr + i, x)
    tl.store(y_ptr + i, y)


@jit
def widened(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x * x.to(tl.float32))
    tl.store(y_ptr + BLOCK + i, x / x.to(tl.float32))
    tl.store(y_ptr + 2 * BLOCK + i, (x.to(tl.float32) > 0).to(tl.int32))


def bits(x: Tensor) -> Tensor:
    """Its bits, one pattern for all NaN."""
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.view(integer).masked_fill(x.isnan(), torch.iinfo(integer).max)


@pytest.mark.parametrize("kernel", [cast, implicit_cast])
def test_casts_from_float32(kernel: Any) -> None:
    ties = (ALL_BITS.to(torch.int32) << 16) + 0x8000
    near_ties = torch.cat([ties - 1, ties + 1])
    anything = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 9.2e-41])
    x = torch.cat([t.view(torch.float32) for t in (ties, near_ties, anything)] + [special])
    x = torch.nn.functional.pad(x, (0, -x.numel() % 2**16))
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    kernel[(x.numel() // 2**16,)](x, y, BLOCK=2**16)
    assert torch.equal(bits(y), bits(x.bfloat16()))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy's, float32 to float16 in the stock cast
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_casts_of_every_half(source: torch.dtype, target: torch.dtype) -> None:
    x = ALL_BITS.view(source)
    y = torch.empty(x.shape, dtype=target)
    cast[(4,)](x, y, BLOCK=2**14)
    assert torch.equal(bits(y), bits(x.to(target)))


@pytest.mark.parametrize("value", [0.3, -1.00390625, 3.4e38, 0.0])
def test_constants(value: float) -> None:
    x = torch.randn(32).bfloat16()
    y = torch.empty(4, 32, dtype=torch.bfloat16)
    constants[(1,)](x, y, VALUE=value, BLOCK=32)
    constant = torch.full((32,), value, dtype=torch.float32).bfloat16()
    assert torch.equal(y[0], torch.cat([x[:16], constant[16:]]))
    assert torch.equal(y[1], torch.cat([x[:8], constant[8:]]))
    assert torch.equal(y[2], constant)
    assert not y[3].any()


def test_moves() -> None:
    x = torch.randn(8, 16).bfloat16()
    y = torch.empty(16, 8, dtype=torch.bfloat16)
    moves[(1,)](x, y, ROWS=8, COLUMNS=16)
    assert torch.equal(y, x.t())


@pytest.mark.parametrize(
    "op",
    [
        *("add", "multiply", "negate", "compare", "abs", "fma", "reduce", "scan"),
        *("from int", "from float64", "round down", "atomic"),
    ],
)
def test_arithmetic_raises(op: str) -> None:
    x = torch.randn(16).bfloat16()
    with pytest.raises(BFloat16Arithmetic, match=r"bf(loat)?16"):
        compute[(1,)](x, torch.empty_like(x), OP=op, BLOCK=16)


def test_arithmetic_with_float32_is_widened() -> None:
    x = torch.randn(16).bfloat16()
    y = torch.empty(3, 16)
    widened[(1,)](x, y, BLOCK=16)
    assert torch.equal(y, torch.stack([x.float() ** 2, torch.ones(16), (x > 0).float()]))


# ---------------------------------------------------------------- products
@jit
def product(a_ptr, b_ptr, c_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PREC: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + m * K + tl.arange(0, K)[None, :])
    b = tl.load(b_ptr + tl.arange(0, K)[:, None] * N + n)
    c = tl.load(c_ptr + m * N + n)
    y = tl.dot(a, b, c, input_precision=PREC)
    tl.store(y_ptr + m * N + n, y)


def dot(a: Tensor, b: Tensor, c: Tensor, precision: str | None) -> Tensor:
    y = torch.empty(c.shape)
    (m, k), n = a.shape, b.shape[1]
    product[(1,)](a, b, c, y, M=m, N=n, K=k, PREC=precision)
    return y


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype), torch.randn(16, 32)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_halves_are_summed_in_float32(dtype: torch.dtype, precision: str) -> None:
    a, b, c = operands(dtype)
    torch.testing.assert_close(dot(a, b, c, precision), a.float() @ b.float() + c, rtol=1e-5, atol=1e-5)
    ones = torch.ones(4096, 16, dtype=dtype)
    assert torch.equal(dot(ones.t().contiguous(), ones, torch.zeros(16, 16), precision), torch.full((16, 16), 4096.0))


def tf32(x: Tensor) -> Tensor:
    """Another way than the interpreter's: through the mantissa as a number."""
    mantissa, exponent = np.frexp(x.double().numpy())
    rounded = np.trunc(mantissa * 2**11 + np.copysign(0.5, mantissa)) / 2**11
    return torch.from_numpy(np.ldexp(rounded, exponent)).float()


def test_tf32() -> None:
    a, b, c = operands(torch.float32)
    exact = dot(a, b, c, "ieee")
    torch.testing.assert_close(exact, (a.double() @ b.double() + c).float(), rtol=1e-5, atol=1e-5)
    rounded = dot(a, b, c, "tf32")
    assert torch.equal(rounded, dot(tf32(a), tf32(b), c, "ieee"))
    assert 1e-4 < (rounded - exact).abs().max() < 1e-1
    assert torch.equal(rounded, dot(a, b, c, None))
    assert torch.equal(exact, dot(a, b, c, "tf32x3"))


def test_to_tf32() -> None:
    x = torch.randn(10_000) * torch.randn(10_000).mul(20).exp2()
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 2 - 2**-11])
    for t in (x, ties):
        assert torch.equal(torch.from_numpy(honest.to_tf32(t.numpy())), tf32(t))
    assert honest.to_tf32(ties.numpy()).tolist() == [1 + 2**-10, 1 + 2**-9, -1 - 2**-10, 1.0, 2.0]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4028234e38, -np.nan], np.float32)
    expected = [0.0, -0.0, np.inf, -np.inf, np.nan, np.inf, np.nan]
    np.testing.assert_array_equal(honest.to_tf32(special), np.array(expected, np.float32))

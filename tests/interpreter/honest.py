"""Triton's interpreter (3.7.1 to 3.9.0), made honest: what a GPU does not forgive, it must not either.

The stock interpreter runs the programs of a launch one after another, in numpy. It computes with the bits of a bfloat16
as if they were an integer's, multiplies float32 exactly whatever precision was asked for, and reads and writes wherever
an address points to. After :func:`install`

* casts, constants and products (``tl.dot``, summed in float32) of bfloat16 are right. Any other arithmetic with it
  raises :class:`BFloat16Arithmetic`: a kernel is to widen what it loads first. What only moves values (``tl.where``,
  reshape, store and the like) is allowed.
* ``tl.dot`` with ``input_precision="tf32"``, which is the default, rounds float32 operands, see :func:`to_tf32`;
  ``ieee`` and ``tf32x3`` stay exact. float16 is summed in the accumulator's type, which is float32 unless asked
  otherwise; the stock interpreter does that.
* an address at which no tensor among the launch's arguments has an element raises :class:`KernelMemoryError`. Two
  programs of a launch that meet in one element raise :class:`KernelRaceError`, unless both read or both are atomic, and
  so does one store that writes an element twice. Not seen are races between the threads of one program.

:data:`GUARD` has a log of the launches.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)
from triton.tools.tensor_descriptor import TensorDescriptor

Array = npt.NDArray[Any]
Owners = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]


class KernelFault(AssertionError):
    """A kernel did what is wrong on a GPU; raised as it is, not inside an InterpreterError."""


class BFloat16Arithmetic(KernelFault):
    """Arithmetic in bfloat16, which the interpreter does not have."""


class KernelMemoryError(KernelFault):
    """An address that no argument of the launch reaches."""


class KernelRaceError(KernelMemoryError):
    """What a launch does depends on the order in which its programs, or the lanes of one store, come."""


# ---------------------------------------------------------------- bfloat16
# bfloat16 values travel as uint16 bits. The builder's methods that only move values:
MOVES = frozenset(
    f"create_{name}"
    for name in (
        *("load", "store", "masked_load", "masked_store", "atomic_load", "atomic_store"),
        *("descriptor_load", "descriptor_store", "descriptor_gather", "descriptor_scatter"),
        *("bitcast", "int_to_ptr", "ptr_to_int", "select", "gather", "print"),
        *("broadcast", "splat", "unsplat", "expand_dims", "reshape", "trans", "cat", "join", "split"),
    )
)
# They reach cast_impl, which is mended.
CASTS = frozenset(
    f"create_{name}"
    for name in ("fp_to_fp", "fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "int_cast")
)


def from_bfloat16(bits: Array) -> Array:
    """uint16 bits -> float32."""
    return np.asarray((bits.astype(np.uint32) << 16).view(np.float32))


def to_bfloat16(x: Array) -> Array:
    """float32 -> uint16 bits, rounded to nearest, ties to even; a NaN stays one, too large is infinite."""
    bits = x.view(np.uint32)
    with np.errstate(over="ignore"):  # of a NaN's bits
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
    quiet_nan = (bits >> 16) | np.uint32(0x40)
    return np.asarray(np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16))


def _is_bfloat16(x: object) -> bool:
    return isinstance(x, TensorHandle) and bool(x.dtype == tl.bfloat16)


def _cast_bfloat16(data: Array, source: Any, target: Any) -> Array:
    if source == target:
        return data
    if source == tl.bfloat16 and target == tl.float32:
        return from_bfloat16(data)
    if source == tl.bfloat16 and target == tl.float16:
        with np.errstate(over="ignore"):
            return from_bfloat16(data).astype(np.float16)
    if target == tl.bfloat16 and source in (tl.float32, tl.float16):
        return to_bfloat16(data.astype(np.float32, copy=False))
    raise BFloat16Arithmetic(f"cast from {source} to {target}: go by way of float32")


def _mend_bfloat16() -> None:
    builder = InterpreterBuilder
    stock_cast, stock_fp_to_fp, stock_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    stock_check = ReduceScanOpInterface.check_tensor

    def refusing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
            if any(map(_is_bfloat16, args)) or any(map(_is_bfloat16, kwargs.values())):
                raise BFloat16Arithmetic(f"{name.removeprefix('create_')} of bfloat16: cast to float32 first")
            return method(self, *args, **kwargs)

        return refuse

    for name, method in list(vars(builder).items()):
        if name.startswith("create_") and name not in MOVES | CASTS | {"create_dot"}:
            setattr(builder, name, refusing(name, method))

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target):
            return stock_cast(self, src, dst_type)
        return TensorHandle(_cast_bfloat16(src.data, source, target), target)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return stock_fp_to_fp(self, src, dst_type, rounding_mode)
        if rounding_mode not in (None, ir.ROUNDING_MODE.RTNE):
            raise BFloat16Arithmetic(f"cast from or to bfloat16 with rounding mode {rounding_mode}")
        return cast_impl(self, src, dst_type)

    def get_bf16(self: Any, value: float) -> Any:
        with np.errstate(over="ignore"):
            return TensorHandle(to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(from_bfloat16(x.data), tl.float32) if _is_bfloat16(x) else x for x in (a, b))
        return stock_dot(self, a, b, d, *rest)

    def check_tensor(self: Any, inputs: Sequence[Any]) -> None:  # of tl.reduce and tl.associative_scan
        if any(isinstance(x, tl.tensor) and x.dtype == tl.bfloat16 for x in inputs):
            raise BFloat16Arithmetic("reduction or scan of bfloat16: cast to float32 first")
        stock_check(self, inputs)

    builder.cast_impl, builder.create_fp_to_fp, builder.get_bf16 = cast_impl, create_fp_to_fp, get_bf16
    builder.create_dot = create_dot
    ReduceScanOpInterface.check_tensor = check_tensor


# ---------------------------------------------------------------- tf32
def to_tf32(x: Array) -> Array:
    """float32 -> float32 of 10 mantissa bits, rounded to nearest, ties away from zero: PTX's ``cvt.rna.tf32.f32``.

    A tensor core that is given all the bits may drop the lower ones instead, which errs up to twice as much.
    """
    bits = x.view(np.uint32)
    with np.errstate(over="ignore"):  # of a NaN's bits
        rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.asarray(np.where(np.isfinite(x), rounded, bits).view(np.float32))


def _round_tf32() -> None:
    stock = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        if input_precision == ir.INPUT_PRECISION.TF32 and a.dtype == tl.float32 and b.dtype == tl.float32:
            a, b = (TensorHandle(to_tf32(x.data), tl.float32) for x in (a, b))
        return stock(self, a, b, d, input_precision, *rest)

    InterpreterBuilder.create_dot = create_dot


# ---------------------------------------------------------------- memory
NOBODY, SEVERAL = 0, -1  # instead of the number of a program, which begins with 1

# Which accesses by others make an access a race.
CONFLICTS = {"load": ("store", "atomic"), "store": ("store", "load", "atomic"), "atomic": ("store", "load")}


@dataclass
class Launch:
    """A kernel's launch: bytes as its unmasked lanes asked for them, an atomic counts as loaded and stored."""

    kernel: str
    loaded: int = 0
    stored: int = 0


@dataclass(frozen=True)
class _Argument:
    """A tensor among the arguments; ``end`` is past its last element, strides are in elements."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    width: int
    start: int
    end: int
    contiguous: bool

    @classmethod
    def of(cls, name: str, t: torch.Tensor) -> _Argument:
        width, start = t.element_size(), t.data_ptr()
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        end = start + extent * width
        return cls(name, t.dtype, tuple(t.shape), t.stride(), width, start, end, t.is_contiguous())

    def distance(self, address: int) -> int:
        return max(self.start - address, address - self.end + 1, 0)

    def locate(self, address: int) -> str:
        layout = f"shape {self.shape}" if self.contiguous else f"shape {self.shape}, strides {self.strides}"
        size = self.end - self.start
        return f"byte offset {address - self.start} of argument {self.name} ({layout}, {self.dtype}, {size} bytes)"


def _tensors(name: str, value: Any) -> Iterator[_Argument]:
    if isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
        return
    if isinstance(value, TensorDescriptor):
        value = value.base
    value = interpreter._unwrap_tensor(value)
    if isinstance(value, torch.Tensor) and value.numel():
        yield _Argument.of(name, value)


class _Region:
    """The memory of an argument, or of several that overlap, and which programs were at each of its elements.

    An element here has ``width`` bytes, which divides those of all the arguments.
    """

    def __init__(self, arguments: Sequence[_Argument]) -> None:
        self.start = min(a.start for a in arguments)
        self.end = max(a.end for a in arguments)
        self.width = math.gcd(*(n for a in arguments for n in (a.width, a.start - self.start)))
        self.elements = (self.end - self.start) // self.width
        self._owners: dict[str, Owners] = {}
        self._reached = self._reach(arguments)

    def _reach(self, arguments: Sequence[_Argument]) -> npt.NDArray[np.bool_] | None:
        """Whether an argument has the element; None where that holds for all."""
        if any(a.contiguous and (a.start, a.end) == (self.start, self.end) for a in arguments):
            return None
        reached = np.zeros(self.elements, np.bool_)
        for a in arguments:
            parts = a.width // self.width
            np.lib.stride_tricks.as_strided(
                reached[(a.start - self.start) // self.width :],
                (*a.shape, parts),
                (*(s * parts for s in a.strides), 1),
            )[...] = True
        return None if reached.all() else reached

    def indices(self, addresses: Array, width: int) -> Indices:
        """Elements at the addresses, all inside and aligned; with wider accesses, (addresses, elements of each)."""
        at = (addresses - np.uint64(self.start)).view(np.int64)
        if self.width > 1:
            at >>= self.width.bit_length() - 1
        if width > self.width:
            at = at[:, None] + np.arange(width // self.width)
        return at

    def outside(self, at: Indices) -> npt.NDArray[np.bool_] | None:
        """Which of the accesses are to elements that no argument has; None: none."""
        if self._reached is None:
            return None
        missing = ~self._reached[at]
        return missing if missing.ndim == 1 else np.asarray(missing.any(1))

    def claim(self, kind: str, program: int, at: Indices) -> tuple[int, str, int] | None:
        """Note the access; the first race, if any: element, what the other did, and which program it was."""
        for other in CONFLICTS[kind]:
            owners = self._owners.get(other)
            if owners is not None:
                seen = owners[at]
                foreign = (seen != program) & (seen != NOBODY)
                if foreign.any():
                    i = int(foreign.argmax())
                    return int(at[i]), other, int(seen[i])
        owners = self._owners.get(kind)
        if owners is None:
            owners = self._owners[kind] = np.zeros(
                self.elements, np.int32
            )  # NOBODY, and no memory before it is written
        if kind == "store":
            lanes = np.arange(at.size, dtype=np.int32)
            owners[at] = lanes
            twice = owners[at] != lanes
            if twice.any():
                return int(at[twice.argmax()]), "store", program
            owners[at] = program
        else:
            seen = owners[at]
            owners[at] = np.where((seen == NOBODY) | (seen == program), np.int32(program), np.int32(SEVERAL))
        return None


class Guard:
    """Checks each access of a launch; ``log`` has every launch since :func:`install`."""

    def __init__(self) -> None:
        self.log: list[Launch] = []
        self._active = False
        self._atomic = False
        self._arguments: list[_Argument] = []
        self._regions: list[_Region] = []
        self._starts: list[int] = []

    @property
    def launches(self) -> int:
        return len(self.log)

    def begin(self, kernel: str, arguments: Iterable[tuple[str, Any]]) -> None:
        self._arguments = sorted((a for x in arguments for a in _tensors(*x)), key=lambda a: a.start)
        groups: list[list[_Argument]] = []
        end = 0
        for a in self._arguments:
            if a.start < end:
                groups[-1].append(a)
            else:
                groups.append([a])
            end = max(end, a.end)
        self._regions = [_Region(group) for group in groups]
        self._starts = [r.start for r in self._regions]
        self.log.append(Launch(kernel))
        self._active = True

    def end(self) -> None:
        self._active = self._atomic = False
        self._arguments, self._regions, self._starts = [], [], []

    def access(self, builder: Any, kind: str, ptrs: Any, mask: Any) -> None:
        """One instruction: ``ptrs`` and ``mask`` are the builder's handles, no mask is all lanes."""
        if not self._active:
            return
        if self._atomic:
            kind = "atomic"
        addresses: Array = np.asarray(ptrs.data)
        live = np.True_ if mask is None else np.asarray(mask.data, np.bool_)
        addresses = addresses.reshape(-1) if live.all() else addresses[np.broadcast_to(live, addresses.shape)]
        if not addresses.size:
            return
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        launch = self.log[-1]
        launch.loaded += addresses.size * width * (kind != "store")
        launch.stored += addresses.size * width * (kind != "load")
        if int(np.bitwise_or.reduce(addresses)) % width:
            unaligned = addresses % np.uint64(width) != 0
            self._fail(builder, kind, addresses, unaligned, "are not aligned", width)
        first, last = int(addresses.min()), int(addresses.max())
        home = bisect(self._starts, first) - 1
        if home >= 0 and last + width <= self._regions[home].end:
            self._access_region(builder, kind, self._regions[home], addresses, width)
            return
        ends = np.array([0, *(r.end for r in self._regions)], np.uint64)  # none has 0
        homes = np.searchsorted(np.array(self._starts, np.uint64), addresses, side="right")
        outside = addresses + np.uint64(width) > ends[homes]
        if outside.any():
            self._fail(builder, kind, addresses, outside, "are in no tensor argument", width)
        for i in np.unique(homes):
            self._access_region(builder, kind, self._regions[i - 1], addresses[homes == i], width)

    def _access_region(self, builder: Any, kind: str, region: _Region, addresses: Array, width: int) -> None:
        if width < region.width:
            everywhere = np.ones(addresses.shape, np.bool_)
            self._fail(builder, kind, addresses, everywhere, f"are to parts of elements of {region.width} bytes", width)
        at = region.indices(addresses, width)
        outside = region.outside(at)
        if outside is not None and outside.any():
            self._fail(builder, kind, addresses, outside, "are in no tensor argument", width)
        columns, rows = builder.grid_dim[:2]
        x, y, z = builder.grid_idx
        program = 1 + x + columns * (y + rows * z)
        race = region.claim(kind, program, at.reshape(-1))
        if race is None:
            return
        element, what, other = race
        where = self._locate(region.start + element * region.width)
        if other == program:
            raise KernelRaceError(f"one store of program {(x, y, z)} writes {where} twice")
        at_grid = other - 1
        who = f"program {(at_grid % columns, at_grid // columns % rows, at_grid // (columns * rows))}"
        who = "several programs" if other == SEVERAL else who
        raise KernelRaceError(f"{kind} of program {(x, y, z)} meets the {what} of {who} at {where}")

    def _locate(self, address: int) -> str:
        nearest = min(self._arguments, key=lambda a: a.distance(address), default=None)
        return f"address {address:#x}, no argument is a tensor" if nearest is None else nearest.locate(address)

    def _fail(
        self, builder: Any, kind: str, addresses: Array, bad: npt.NDArray[np.bool_], what: str, width: int
    ) -> None:
        where = self._locate(int(addresses[bad][0]))
        raise KernelMemoryError(
            f"{kind} of {width} bytes, program {tuple(builder.grid_idx)}: {int(bad.sum())} of {addresses.size} "
            f"addresses {what}, the first is {where}"
        )


GUARD = Guard()


def _guard_memory() -> None:
    builder = InterpreterBuilder

    def guarding(name: str, kind: str, ptrs: int, mask: int | None) -> None:
        """Check before the builder's method: where ``ptrs`` and ``mask`` are among its arguments."""
        stock = getattr(builder, name)

        @functools.wraps(stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            GUARD.access(self, kind, args[ptrs], None if mask is None else args[mask])
            return stock(self, *args, **kwargs)

        setattr(builder, name, method)

    guarding("create_masked_load", "load", 0, 1)
    guarding("create_masked_store", "store", 0, 2)
    guarding("create_atomic_rmw", "atomic", 1, 3)
    guarding("create_atomic_cas", "atomic", 0, None)

    def atomically(name: str) -> None:
        """They use the plain loads and stores."""
        stock = getattr(builder, name)

        @functools.wraps(stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            GUARD._atomic = True
            try:
                return stock(self, *args, **kwargs)
            finally:
                GUARD._atomic = False

        setattr(builder, name, method)

    for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll"):
        if hasattr(builder, name):  # from 3.9
            atomically(name)

    stock_arguments, stock_call = GridExecutor._init_args_hst, GridExecutor.__call__

    def init_args(self: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        on_host, named = stock_arguments(self, args, kwargs)
        GUARD.begin(self.fn.__name__, [*zip(self.arg_names, on_host, strict=False), *named.items()])
        return on_host, named

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            stock_call(self, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, KernelFault):
                raise cause from None
            raise
        finally:
            GUARD.end()

    GridExecutor._init_args_hst, GridExecutor.__call__ = init_args, call


def _patch_once() -> None:
    """The interpreter changes triton.language anew at every call of a device function, half of all its time: once a
    launch and language module is enough."""
    changed: set[frozenset[int]] = set()
    stock_call = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        changed.clear()
        stock_call(self, *args, **kwargs)

    def device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        languages = frozenset(id(v) for v in self.fn.__globals__.values() if v is tl or v is tl.core)
        if languages not in changed:
            interpreter._patch_lang(self.fn)
            changed.add(languages)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    GridExecutor.__call__, InterpretedFunction.__call__ = launch, device_function


_installed = False


def install() -> None:
    """Change the interpreter of this process, once."""
    global _installed
    if _installed:
        return
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    _installed = True
    _mend_bfloat16()
    _round_tf32()
    _guard_memory()
    _patch_once()

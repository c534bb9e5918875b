"""What a call launches, recorded, and compiled for GPUs that need not be there.

:func:`captured` runs the Triton backend's ordinary host code on CPU tensors, with every launch recorded instead of
run: the kernels, argument types and compile-time constants are those of a call on a GPU. :func:`compile_launch` and
:class:`Compiler` make machine code of them for any compute capability, or for an AMD GPU by its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from queue import SimpleQueue
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from din_fast.backends import triton as backend
from din_fast.backends.triton import operands

Capability = int | str  # 80 for sm_80, "gfx942" for AMD's
WORKERS = 2
DIED = "the compiler ended its process; what it wrote is on stderr"


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch.

    Attributes:
        kernel: the JITFunction. arguments: all of them by name, compile-time constants too.
        options: of the compiler, ``num_warps`` and others. grid: programs along each axis.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    grid: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Compiled:
    """What became of a launch.

    Attributes:
        launch: the first one that needs this kernel with these types and constants.
        capability: 80 for sm_80, or "gfx942".
        kernel: Triton's CompiledKernel, with ``.asm`` and ``.metadata``, or None where there is an error.
        error: what went wrong, or None.
    """

    launch: Launch
    capability: Capability
    kernel: Any = None
    error: str | None = None

    def __str__(self) -> str:
        """One line on what it is, and the error."""
        constants = ", ".join(
            f"{p.name}={self.launch.arguments[p.name]}" for p in self.launch.kernel.params if p.is_constexpr
        )
        types = sorted({str(a.dtype) for a in self.launch.arguments.values() if isinstance(a, torch.Tensor)})
        line = (
            f"{self.launch.kernel.__name__} {gpu_name(self.capability)} {dict(self.launch.options)} {types} {constants}"
        )
        return line if self.error is None else f"{line}\n{self.error}"


# ---------------------------------------------------------------- recording
def captured(call: Callable[[], object]) -> list[Launch]:
    """The launches of a call with CPU tensors and ``backend="triton"``, in order. None of them runs.

    So whatever the call computes is meaningless. While it runs, dispatch lets the backend have CPU tensors and bfloat16
    without the interpreter. Half types compile as on an NVIDIA GPU, see :func:`_as_on_nvidia`.

    Raises:
        RuntimeError: the kernels are the interpreter's; there is nothing to compile.
    """
    if backend.interpreting() or not isinstance(operands._square_kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET: expected it unset when triton is imported, to capture launches; got 1")
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        named = {n: v for n, v in kwargs.items() if n in kernel.arg_names}
        bound = kernel.signature.bind(*args, **named)
        bound.apply_defaults()
        arguments = _as_on_nvidia(bound.arguments)
        options = {n: v for n, v in kwargs.items() if n not in named}
        launches.append(Launch(kernel, arguments, options, tuple(grid(arguments) if callable(grid) else grid)))

    with (
        patch.object(JITFunction, "run", record),
        patch.object(backend, "why_not", lambda device: None),
        patch.object(operands, "_bfloat16_is_right", lambda: True),
    ):
        call()
    return launches


def _as_on_nvidia(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they would be with a history on an NVIDIA GPU.

    One depends on the device: FAST, which half types have there. Every kernel's first argument is the history.
    """
    history = next(iter(arguments.values()), None)
    half = isinstance(history, torch.Tensor) and history.dtype in operands.HALF
    return {n: True if n == "FAST" and half else v for n, v in arguments.items()}


# ---------------------------------------------------------------- compiling
@dataclass(frozen=True)
class _Files:
    """What Triton's cache has of one kernel: paths by name, and the key."""

    paths: Mapping[str, str]
    key: str


@dataclass(frozen=True)
class _Source:
    """What is compiled, fit to be sent to another process; constants and attributes by position."""

    module: str
    name: str
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    capability: Capability

    def source(self) -> Any:
        """The same, as Triton has it."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        return ASTSource(kernel, dict(self.signature), dict(self.constants), dict(self.attributes))

    def compile(self) -> Any:
        """Triton's CompiledKernel, made or from Triton's cache."""
        return triton.compile(self.source(), target=_target(self.capability), options=dict(self.options))

    def files(self) -> _Files | str:
        """Compile, and tell what can be sent to another process: for an exception, its text."""
        try:
            kernel = self.compile()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return _Files(kernel.metadata_group, kernel.hash)

    def load(self, files: _Files) -> Any:
        """Triton's CompiledKernel, from files that another process wrote."""
        return CompiledKernel(self.source(), files.paths, files.key)


def gpu_name(capability: Capability) -> str:
    """``sm_80`` or ``gfx942``."""
    return capability if isinstance(capability, str) else f"sm_{capability}"


def _target(capability: Capability) -> Any:
    """As Triton has it; of AMD's, only GPUs with wavefronts of 64 are known here."""
    return GPUTarget("hip", capability, 64) if isinstance(capability, str) else GPUTarget("cuda", capability, 32)


def _source(launch: Launch, capability: Capability) -> _Source:
    """Specialise as a launch does, by the same function of Triton's: alignment of pointers and integers, ones."""
    arguments = dict(launch.arguments)
    if isinstance(capability, str) and "FAST" in arguments:
        arguments["FAST"] = False  # an instruction of NVIDIA's
    kernel, make = launch.kernel, make_backend(_target(capability))
    specialise = create_function_from_signature(kernel.signature, kernel.params, make)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, (kind, value)) in enumerate(zip(kernel.arg_names, specialise(**arguments)[1], strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[i,] = arguments[name]
        elif value:
            attributes[i,] = make.parse_attr(value)
    return _Source(
        kernel.__module__, kernel.__name__, signature, constants, attributes, dict(launch.options), capability
    )


def compile_launch(launch: Launch, capability: Capability) -> Compiled:
    """Compile in this process, as a launch on a GPU of this capability would; what the compiler raises passes.

    Where LLVM gives up it aborts the process; see :class:`Compiler`.
    """
    return Compiled(launch, capability, _source(launch, capability).compile())


class _Worker:
    """A process that compiles, started when there is work, and again after it died."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def files(self, source: _Source) -> _Files | str:
        """Compile into Triton's cache: where it is, or what went wrong."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            return self._pool.submit(source.files).result()
        except BrokenProcessPool:
            self.close()
            return DIED

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class Compiler:
    """Compiles in processes of its own, a few at a time: a context manager.

    Results come back through Triton's cache, ``TRITON_CACHE_DIR``. Kernels must be found in their modules by name.
    """

    def __init__(self, workers: int = WORKERS) -> None:
        self._workers = [_Worker() for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()

    def compile(self, launches: Iterable[Launch], capability: Capability) -> list[Compiled]:
        """Compile what differs in kernel, types, constants or options, once each; errors are in the results."""
        different: dict[str, Launch] = {}
        for launch in launches:
            different.setdefault(repr(_source(launch, capability)), launch)
        return self.compile_each(different.values(), capability)

    def compile_each(self, launches: Iterable[Launch], capability: Capability) -> list[Compiled]:
        """The same, with a result for each launch."""
        sources = [(launch, _source(launch, capability)) for launch in launches]
        different = {repr(source): source for _, source in sources}
        with ThreadPoolExecutor(len(self._workers)) as threads:
            found = dict(zip(different, threads.map(self._files, different.values()), strict=True))
        return [
            Compiled(launch, capability, error=files)
            if isinstance(files := found[repr(source)], str)
            else Compiled(launch, capability, source.load(files))
            for launch, source in sources
        ]

    def _files(self, source: _Source) -> _Files | str:
        worker = self._idle.get()
        try:
            return worker.files(source)
        finally:
            self._idle.put(worker)

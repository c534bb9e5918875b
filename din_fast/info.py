"""``python -m din_fast.info``: versions, how the library was built, what runs here and what does not, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from din_fast import dispatch
from din_fast.backends import native
from din_fast.version import __version__

_VARIABLES = (
    dispatch.ENVIRONMENT,
    "DIN_FAST_CPU",
    "DIN_FAST_BUILD",
    "DIN_FAST_CHECK",
    "DIN_FAST_TUNE_CACHE",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)
_Lines = list[tuple[str, str]]


def report() -> str:
    """The whole report, several lines of text. It reads the environment at each call; no value there makes it raise."""
    sections: list[tuple[str, _Lines]] = [
        ("versions", _versions()),
        ("build of the C++ library", _build()),
        ("instruction set", _instruction_set()),
        ("backends", list(_backends())),
        ("environment", _environment()),
    ]
    width = max(len(name) for _, lines in sections for name, _ in lines)
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines)]) for title, lines in sections
    ]
    return "\n\n".join(blocks) + "\n"


def _versions() -> _Lines:
    return [
        ("din_fast", __version__),
        ("torch", str(torch.__version__)),
        ("numpy", _installed("numpy")),
        ("triton", _installed("triton")),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
        ("processor", f"{_processor()}, {os.cpu_count()} logical cores"),
    ]


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The model's name where Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _build() -> _Lines:
    facts = native.facts()
    if not facts["built"]:
        return [("built", f"no: {facts['why_not']}")]
    lines = [("built", f"yes, for torch {facts['torch']}"), ("flags", facts["flags"])]
    if "why_no_face" in facts:
        return [*lines, ("compiler", f"unknown: no din_fast._face: {facts['why_no_face']}")]
    return [
        *lines,
        ("compiler", facts["compiler"]),
        ("torch headers", facts["torch_headers"]),
        ("stable ABI of torch", f"{facts['torch_target_version'] >> 56}.{facts['torch_target_version'] >> 48 & 255}"),
        ("cuda", facts["cuda"]),
    ]


def _instruction_set() -> _Lines:
    reason = native.why_not()
    if reason is not None:
        return [("in use", f"none: {reason}")]
    try:
        used = native.instruction_set()
    except RuntimeError as error:  # DIN_FAST_CPU asks for what cannot run
        used = f"none: {str(error).splitlines()[0]}"
    return [("in use", used), ("the processor has", ", ".join(native.instruction_sets()))]


def _backends() -> Iterable[tuple[str, str]]:
    """Every backend but auto, on every kind of device that is here."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for backend in dispatch.BACKENDS:
        for kind in kinds if backend != "auto" else ():
            reason = dispatch.why_not(backend, torch.device(kind))
            yield f"{backend} on {kind}", "available" if reason is None else f"not available: {reason}"


def _environment() -> _Lines:
    return [
        *((name, os.environ.get(name, "not set")) for name in _VARIABLES),
        ("torch threads", str(torch.get_num_threads())),
    ]


if __name__ == "__main__":
    print(report(), end="")

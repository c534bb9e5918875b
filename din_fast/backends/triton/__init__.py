"""The Triton backend: whether it can run. Triton itself is imported with entry.py, at the first call of an op."""

from __future__ import annotations

import importlib.metadata
import os
import re

import torch

OLDEST = (3, 7, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _installed() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


_VERSION = _installed()


def version() -> str | None:
    """The installed Triton, or None."""
    return _VERSION


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, in one sentence; None where they can."""
    found = version()
    if found is None:
        return "triton is not installed; a CUDA build of torch 2.13 or newer brings it"
    if tuple(int(n) for n in re.findall(r"\d+", found)[:3]) < OLDEST:
        return f"triton {found} is too old: expected 3.7.1 or newer, as torch 2.13 pins it"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and interpreting():
        return None
    if device.type == "cpu":
        return "on the CPU it runs in Triton's interpreter only: set TRITON_INTERPRET=1 before triton is imported"
    return f"there are kernels for CUDA and ROCm devices, the history is on {device}"

"""Which backend runs a call, and why.

An explicit choice that cannot be met raises; ``auto`` means ``DIN_FAST_BACKEND`` where that is set, read at each call,
else the fastest backend that the inputs allow; where that is the reference, one warning says why.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from din_fast.backends import native

BACKENDS = ("auto", "native", "triton", "reference")
ENVIRONMENT = "DIN_FAST_BACKEND"
_told: set[str] = set()


def check_name(backend: str) -> None:
    """Raise a ValueError for an unknown backend name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on this device, in one sentence, or None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return "the Triton kernels are not built yet"
    if device.type != "cpu":
        return f"the native backend has CPU kernels only, the history is on {device}"
    return native.why_not()


def choose(backend: str, history: Tensor) -> str:
    """The backend that runs: ``native`` or ``reference``.

    Raises:
        ValueError: an unknown name, in the argument or in ``DIN_FAST_BACKEND``.
        RuntimeError: the backend that was named cannot run; the message says why.
    """
    check_name(backend)
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT) or "auto"
        if backend not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT}: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    device = history.device
    if backend != "auto":
        reason = why_not(backend, device)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
        return backend
    reason = why_not("native", device)
    if reason is None:
        return "native"
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"din_fast uses the plain PyTorch reference: {reason}", RuntimeWarning, stacklevel=4)
    return "reference"

"""Which backend runs a call, and why.

An explicit choice that cannot be met raises; ``auto`` means ``DIN_FAST_BACKEND`` where that is set, read at each call,
else the fastest backend that the inputs allow; where that is the reference, one warning says why.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from din_fast.backends import native, triton
from din_fast.backends.triton import tiling

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
        return triton.why_not(device)
    if device.type != "cpu":
        return f"the native backend has CPU kernels only, the history is on {device}"
    return native.why_not()


def why_not_inputs(backend: str, history: Tensor, hidden_units: Sequence[int]) -> Exception | None:
    """What a backend that can run here has against these inputs, as the error to raise, or None."""
    if backend != "triton":  # the others have every dtype that segments.py lets through
        return None
    if history.dtype not in triton.DTYPES:
        return TypeError(f"history: expected float32, bfloat16 or float16 on the triton backend, got {history.dtype}")
    message = tiling.too_large(history.shape[-1], hidden_units)
    return None if message is None else ValueError(message)


def objection(backend: str, history: Tensor, hidden_units: Sequence[int]) -> str | None:
    """Why a backend cannot run these inputs, or not at all here; None where it can."""
    found = why_not(backend, history.device) or why_not_inputs(backend, history, hidden_units)
    return None if found is None else str(found)


def resolve(backend: str) -> str:
    """The backend that is meant: ``auto`` means ``DIN_FAST_BACKEND`` where that is set.

    Raises:
        ValueError: an unknown name, in the argument or in ``DIN_FAST_BACKEND``.
    """
    check_name(backend)
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT) or "auto"
        if backend not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT}: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def fastest(device: torch.device) -> str:
    """The backend that ``auto`` tries on a device."""
    return "triton" if device.type == "cuda" else "native"


def choose(backend: str, history: Tensor, hidden_units: Sequence[int] = ()) -> str:
    """The backend that runs: ``native``, ``triton`` or ``reference``.

    Raises:
        ValueError: an unknown name, in the argument or in ``DIN_FAST_BACKEND``; a size beyond the named backend's.
        TypeError: a dtype that the named backend does not have.
        RuntimeError: the backend that was named cannot run; the message says why.
    """
    backend = resolve(backend)
    device = history.device
    if backend != "auto":
        reason = why_not(backend, device)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
        error = why_not_inputs(backend, history, hidden_units)
        if error is not None:
            raise error
        return backend
    backend = fastest(device)
    reason = objection(backend, history, hidden_units)
    if reason is None:
        return backend
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"din_fast uses the plain PyTorch reference: {reason}", RuntimeWarning, stacklevel=4)
    return "reference"

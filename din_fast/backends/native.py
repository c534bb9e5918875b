"""The C++ library: loaded once, at import of this module; where that fails nothing raises and the reason is kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = _PACKAGE / "libdin_fast.so"
_RECORD = _PACKAGE / "_build.json"
_GET_IT = "to get it, in the source tree: pip install --no-build-isolation ."


def _read_record() -> dict[str, Any]:
    """What setup.py says that it built."""
    try:
        record: dict[str, Any] = json.loads(_RECORD.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"built": False, "why_not": "this copy of din_fast was never installed"}
    return record


def _load(record: dict[str, Any]) -> str | None:
    """Load the library; None, or in one sentence why it cannot be used."""
    if not record["built"]:
        return f"the C++ kernel was not built: {record['why_not']} ({_GET_IT})"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        cause = error.__cause__ or error
        return (
            f"the C++ kernel did not load: it was built for torch {record['torch']}, "
            f"this is torch {torch.__version__}: {cause}"
        )
    return None


def _import_face() -> Any:
    try:
        return importlib.import_module("din_fast._face")
    except ImportError:  # it is a convenience: facts() says when it is not there
        return None


_record = _read_record()
_why_not = _load(_record)
_face = _import_face()


def why_not() -> str | None:
    """None where the library can be used; else why not, in one sentence."""
    return _why_not


def instruction_set() -> str:
    """The kernel's build that runs now: ``avx512``, ``avx2`` or ``portable``; ``DIN_FAST_CPU`` is read at each call.

    Raises:
        RuntimeError: the library cannot be used, or ``DIN_FAST_CPU`` names a build that is unknown or that this
            processor cannot run.
    """
    if _why_not is not None:
        raise RuntimeError(_why_not)
    name: str = torch.ops.din_fast.instruction_set()
    return name


def instruction_sets() -> list[str]:
    """The kernel's builds that this processor can run, fastest first.

    Raises:
        RuntimeError: the library cannot be used.
    """
    if _why_not is not None:
        raise RuntimeError(_why_not)
    names: str = torch.ops.din_fast.instruction_sets()
    return names.split(",")


def facts() -> dict[str, Any]:
    """What is known of the library.

    Keys: ``requested`` (the DIN_FAST_BUILD at installation), ``built``, ``why_not``; where it was built also ``torch``
    (the version built against) and ``flags``; where din_fast._face is there also ``compiler``, ``torch_headers``,
    ``torch_target_version`` and ``cuda``, else ``why_no_face``.
    """
    if _face is None:
        return {"why_no_face": "it was not built with the library", **_record}
    return {**_record, **_face.build()}

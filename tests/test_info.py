"""python -m din_fast.info: it tells the truth about this installation and never raises for what it finds."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest
import torch

import din_fast
from din_fast import info
from din_fast.backends import native


def entries(report: str) -> dict[str, str]:
    """The report's lines, by name."""
    lines = (line.strip().split("  ", 1) for line in report.splitlines() if line.startswith("  "))
    return {name: value.strip() for name, value in lines}


def test_versions() -> None:
    told = entries(info.report())
    assert (told["din_fast"], told["torch"], told["numpy"]) == (
        din_fast.__version__,
        torch.__version__,
        np.__version__,
    )
    assert told["python"].split()[0] == sys.version.split()[0]
    assert told["torch threads"] == str(torch.get_num_threads())


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert entries(info.report())["triton"] == "not installed"


def test_how_the_library_was_built() -> None:
    told = entries(info.report())
    assert told["built"] == f"yes, for torch {native.facts()['torch']}"
    assert "-ffp-contract=fast" in told["flags"] and "-ffast-math" not in told["flags"]
    assert told["compiler"].split()[0] in ("g++", "clang")
    assert told["stable ABI of torch"] == "2.11"
    assert told["cuda"] == "none"


def test_without_the_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_face", None)
    told = entries(info.report())
    assert told["built"].startswith("yes")
    assert told["compiler"].startswith("unknown: no din_fast._face")


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_face", None)
    monkeypatch.setattr(native, "_record", {"built": False, "why_not": "there was no compiler"})
    monkeypatch.setattr(native, "_why_not", "the C++ kernel was not built: there was no compiler")
    told = entries(info.report())
    assert told["built"] == "no: there was no compiler"
    assert told["in use"] == "none: the C++ kernel was not built: there was no compiler"
    assert told["native on cpu"] == "not available: the C++ kernel was not built: there was no compiler"
    with pytest.raises(RuntimeError, match="there was no compiler"):
        native.instruction_set()
    with pytest.raises(RuntimeError, match="there was no compiler"):
        native.instruction_sets()


def test_instruction_set_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    told = entries(info.report())
    assert told["the processor has"].split(", ") == native.instruction_sets()
    assert told["in use"] == native.instruction_sets()[0]
    assert native.instruction_sets()[-1] == "portable"  # runs everywhere
    monkeypatch.setenv("DIN_FAST_CPU", "portable")
    told = entries(info.report())
    assert (told["in use"], told["DIN_FAST_CPU"]) == ("portable", "portable")


def test_an_unknown_instruction_set_is_told_and_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIN_FAST_CPU", "sse9")
    assert "sse9" in entries(info.report())["in use"]
    with pytest.raises(RuntimeError, match="sse9"):
        native.instruction_set()


def test_backends() -> None:
    told = entries(info.report())
    assert told["native on cpu"] == "available"
    assert told["reference on cpu"] == "available"
    assert told["triton on cpu"].startswith("not available: ")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIN_FAST_BACKEND", "reference")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = entries(info.report())
    assert (told["DIN_FAST_BACKEND"], told["OMP_NUM_THREADS"]) == ("reference", "not set")


def test_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "din_fast.info"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert entries(done.stdout)["din_fast"] == din_fast.__version__

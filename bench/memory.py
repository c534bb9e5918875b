"""How far one call raises the peak of a fresh process's memory, beyond its inputs and weights. Linux only.

``python -m bench.memory JSON`` is the fresh process: it imports what is needed and forks for each contender. Nothing
was run there before but a call with two histories, for libraries and thread pools. A compiled contender compiles in its
first call, at full size; that memory is given back, and the second call counts.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import contenders
from bench.contenders import Case, Contender

STATUS = Path("/proc/self/status")
# Larger blocks go back to the system when they are freed, so that the peak is of what lives at one time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


def megabytes(
    case: Case, mode: str, providers: Sequence[str], backends: Sequence[str], threads: int
) -> dict[str, float]:
    """By how many MiB one call in a mode raises the peak of a fresh process, by provider; NaN where it is not told.

    What lives before the call is left out: inputs and weights. Outputs and gradients count.
    """
    if not STATUS.exists():
        return {provider: math.nan for provider in providers}
    asked = {"case": asdict(case), "mode": mode, "providers": providers, "backends": backends, "threads": threads}
    command = [sys.executable, "-m", "bench.memory", json.dumps(asked)]
    environment = os.environ | ALLOCATOR
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return {name: math.nan if grown is None else float(grown) for name, grown in json.loads(done.stdout).items()}


def _in_a_fork(case: Case, mode: str, provider: str, backends: Sequence[str], threads: int) -> float | None:
    """What a process of its own finds, or None where it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(threads)
            (c,) = (c for c in contenders.build(case, *backends) if c.provider == provider)
            os.write(writer, json.dumps(_grow(case, mode, c)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as f:
        told = f.read()
    os.waitpid(child, 0)
    return float(told) if told else None


def _grow(case: Case, mode: str, c: Contender) -> float:
    """The peak of one call above the memory before it, in MiB."""
    size = case.batch if "compile" in c.provider else min(2, case.batch)
    first = contenders.mode_inputs(replace(case, batch=size), mode)
    with torch.set_grad_enabled(mode == contenders.TRAINING):
        contenders.ready(c, mode, first)()
    del first
    for p in c.unit.parameters():
        p.grad = None
    inputs = contenders.mode_inputs(case, mode)
    call = contenders.ready(c, mode, inputs)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kilobytes("VmRSS:")
    with torch.set_grad_enabled(mode == contenders.TRAINING):
        call()
    c.check_backend()
    return (_kilobytes("VmHWM:") - before) / 1024


def _kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def main(asked: dict[str, Any]) -> None:
    """Print what :func:`megabytes` reads."""
    case = Case(**asked["case"] | {"hidden_units": tuple(asked["case"]["hidden_units"])})
    contenders.host(case)  # its framework is imported before the forks
    names: list[str] = asked["providers"]
    found = {name: _in_a_fork(case, asked["mode"], name, asked["backends"], asked["threads"]) for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

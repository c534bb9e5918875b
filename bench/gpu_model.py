"""A model of how long a compiled kernel takes on a GPU that is not there: what it has to do, over how fast the GPU can.

Every instruction counts as often as it runs: machine code says from which line of source a loop comes, and the
arguments of the launch say how often that loop goes round (histories are all full). Of the bounds that this gives, the
largest is the modelled time. **It is a model**: what it leaves out (bank conflicts, waits between instructions other
than by `latency`, what the caches keep) makes a real GPU slower, never faster, except where L1 answers for L2.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.ahead_of_time import Capability, Launch
from bench.machine_code import (
    CHIPS,
    NUMBERED_ON,
    Code,
    Instruction,
    Source,
    is_asynchronous,
    is_matrix,
    is_special,
    load_bits,
    occupancy,
    store_bits,
)
from din_fast.backends.triton import arithmetic, tiling


# ---------------------------------------------------------------- GPUs
@dataclass(frozen=True)
class Gpu:
    """One product of each architecture, from the vendor's data sheets.

    Attributes:
        name: of the product. processors: multiprocessors (AMD: compute units). clock: GHz, boost.
        memory: GB/s of device memory. l2: GB/s between L2 and the multiprocessors; assumed, as published
            microbenchmarks have it.
        half, tf32, fma: multiplications and additions a clock of a multiprocessor: of the matrix unit in half types and
            in TF32 (sm_90, sm_100: as the instructions that Triton chooses for 2 warps reach them, assumed 62 % of
            sm_90's best), of the float32 unit. special: exponentials and reciprocals a clock of a multiprocessor.
        cache: KiB of L1 and shared memory of a multiprocessor together (AMD: of L1).
        float32: as half, in float32. issue: instructions of a warp a clock of a multiprocessor. l1: bytes a clock
            between registers and shared memory or L1.
    """

    name: str
    processors: int
    clock: float
    memory: float
    l2: float
    half: float
    tf32: float
    fma: float
    cache: int
    float32: float = 0
    special: float = 16
    issue: float = 4
    l1: float = 128

    def __str__(self) -> str:
        """What the model takes of it, on one line."""
        return (
            f"{self.name}, {self.processors} x {self.clock} GHz, memory {self.memory} GB/s, L2 {self.l2} GB/s, "
            f"a clock {self.half:g} / {self.tf32:g} / {self.fma:g} multiplications of the matrix unit in half types / "
            f"TF32 / outside it"
        )


GPUS: dict[Capability, Gpu] = {
    75: Gpu("T4", 40, 1.59, 320, 1270, 512, 0, 64, 96, l1=64),
    80: Gpu("A100 80GB", 108, 1.41, 2039, 7200, 1024, 512, 64, 192),
    86: Gpu("A10", 72, 1.695, 600, 2500, 512, 256, 128, 128),
    89: Gpu("L40S", 142, 2.52, 864, 5000, 512, 256, 128, 128),
    90: Gpu("H100 SXM", 132, 1.83, 3350, 5600, 1270, 635, 128, 256),
    100: Gpu("B200", 148, 1.85, 8000, 10000, 1270, 635, 128, 256),
    120: Gpu("RTX PRO 6000", 188, 2.617, 1792, 7000, 512, 256, 128, 128),
    # A vector instruction of 64 lanes takes a SIMD 4 clocks, a special one 16.
    "gfx942": Gpu("MI300X", 304, 2.1, 5300, 17000, 1024, 512, 64, 32, float32=128, issue=1),
}
# Assumed for `latency`, in clocks: from one instruction of a warp to its next; a round of loads, of weights alone (in
# L1); a barrier. Copies to shared memory are not waited for.
NEXT, LOADS, WEIGHT_LOADS, BARRIER = 2.5, 500.0, 100.0, 30.0


# ---------------------------------------------------------------- how often loops go round
@dataclass(frozen=True)
class For:
    """A loop of the source: its lines, its variable, and what its range begins and ends with."""

    file: str
    first: int
    last: int
    variable: str
    begin: str
    end: str


@cache
def source_loops() -> tuple[For, ...]:
    """All loops of the kernels, inner ones after those around them."""
    found = []
    for path in sorted(Path(arithmetic.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Call):
                given = [ast.unparse(a) for a in node.iter.args]
                begin, end = given[:2] if len(given) > 1 else ("0", given[0])
                found.append(For(path.name, node.lineno, node.end_lineno or 0, node.target.id, begin, end))
    return tuple(sorted(found, key=lambda f: (f.file, f.first)))


def trips(loop: For, launch: Launch) -> float:
    """How often it goes round in a program, on average, with full histories and one candidate for each.

    Raises:
        ValueError: a loop that is not known here.
    """
    given = launch.arguments
    if loop.variable == "l0":  # positions
        if loop.begin == "done":  # what was left out: nothing
            return 0
        rows = min(given.get("part_rows", 1 << 30), given["length"])
        return tiling.ceil_div(rows, given["LP"]) if given.get("BC", 1) == 1 else 1
    if loop.variable == "h0":  # hidden units
        ends = {"hp": "hp0" if loop.file == "arithmetic.py" and "hp0" in given else "hp", "hp2": "hp2"}
        first = given.get("LAYERS", 0) == 1 or ("LAYERS" not in given and given.get("LAYER") == 0)
        ends["width"] = "hp" if first else "hp2"
        return given[ends[loop.end]] / given["BH"]
    if loop.variable == "d0":  # columns of the history
        return tiling.ceil_div(given["dim"], given["BD"])
    if loop.variable == "c1":
        return 1
    if loop.variable == "i":
        groups = launch.grid[0] / given["group_parts"] if "group_parts" in given else 1
        return given["blocks"] / groups if "blocks" in given else given["parts"]
    raise ValueError(f"loop: expected a variable of l0, h0, d0, c1 or i, got {loop.variable} in {loop.file}")


def loop_trips(instructions: Sequence[Instruction], launch: Launch) -> dict[int, float]:
    """For each loop of machine code, by its number, how often it goes round.

    The jump back is of the line of the `for`, or of one inside it. Where the assembler has unrolled a loop, the step of
    its variable says how often. What is of no `for` waits for something, and is taken to go round once.
    """
    around: dict[int, tuple[int, ...]] = {}
    jumps: dict[int, Instruction] = {}
    for i in instructions:
        for depth, n in enumerate(i.loops):
            around.setdefault(n, i.loops[:depth])
        if i.again is not None:
            jumps[i.again] = i
    found: dict[int, float] = {}
    taken: dict[int, For | None] = {}
    for n in sorted(around, key=lambda n: len(around[n])):
        loop = taken[n] = _source_of(jumps[n], [taken[m] for m in around[n]])
        found[n] = trips(loop, launch) / _unrolled(instructions, n, jumps[n], loop, launch) if loop else 1
    return found


def _source_of(jump: Instruction, outer: Sequence[For | None]) -> For | None:
    chain = [(p.file, p.line) for p in jump.at]
    exact = [f for f in source_loops() if (f.file, f.first) in chain]
    inside = [f for f in source_loops() if any(f.file == file and f.first <= line <= f.last for file, line in chain)]
    return next((f for f in exact + inside if f not in outer), None)


def _unrolled(instructions: Sequence[Instruction], n: int, jump: Instruction, loop: For, launch: Launch) -> int:
    step = {"l0": "LP", "h0": "BH", "d0": "BD"}.get(loop.variable)
    if step is None:
        return 1
    found = [
        int(m[1], 16)
        for i in instructions
        if i.loops[-1:] == (n,) and i.at == jump.at and "IADD3" in i.name
        if (m := re.search(r"\b0x([0-9a-f]+)", i.operands))
    ]
    times = {a // launch.arguments[step] for a in found if a % launch.arguments[step] == 0}
    return max(times & {1, 2, 4, 8}, default=1)


# ---------------------------------------------------------------- what a launch has to do
@dataclass(frozen=True)
class Work:
    """What all programs of a launch do together; instructions are of a warp.

    Attributes:
        instructions: all that are issued (AMD: vector instructions). matrix: multiplications and additions of the
            matrix unit, None where the code does not tell. fma: float32 instructions. special: of the special-function
            unit.
        l1: bytes between registers and shared memory or L1. l2: bytes of global loads and stores, as if L1 kept nothing
            but what all programs read (the layers' weights and tables), where it has room for it.
        memory: bytes of the arguments, each once.
        clocks: of one program from its begin to its end, alone. waves: how often as many programs as fit run together.
    """

    instructions: float
    matrix: float | None
    fma: float
    special: float
    l1: float
    l2: float
    memory: float
    clocks: float
    waves: float


_FLOAT = re.compile(r"(FFMA|FMUL|FADD|FSEL|FMNMX)2?\b|v_(pk_)?(fma|fmac|mul|add|sub|max|min)_f32")
_SHARED = re.compile(r"(LDS|STS|LDSM|STSM|ATOMS|SHFL)\b|ds_")
_VECTOR = re.compile(r"v_|ds_|global_|buffer_|scratch_")


def macs(name: str) -> float | None:
    """Multiplications and additions of a matrix instruction of one warp; None where its name does not tell."""
    if m := re.match(r"HMMA\.(16|8)(8)(16|8|4)\b", name):
        return int(m[1]) * int(m[2]) * int(m[3])
    if m := re.match(r"[HIQ]GMMA\.64x(\d+)x(\d+)", name):  # of four warps together
        return 16 * int(m[1]) * int(m[2])
    if m := re.match(r"v_s?mfma_[a-z]*\d+_(\d+)x(\d+)x(\d+)", name):
        return int(m[1]) * int(m[2]) * int(m[3])
    return None


def shared_bytes(name: str) -> int:
    """Bytes a lane of an instruction of shared memory; 0 of another."""
    if not _SHARED.match(name):
        return 0
    if name.startswith(("LDSM", "STSM")):
        m = re.search(r"\.(\d)\b", name)
        return 4 * (int(m[1]) if m else 1)
    m = re.search(r"\.[US]?(8|16|64|128)\b|_b(8|16|32|64|96|128)\b", name)
    return int(m[1] or m[2]) // 8 if m else 4


def work(instructions: Sequence[Instruction], code: Code, launch: Launch, capability: Capability, lanes: int) -> Work:
    """Count, on a chip. ``lanes``: of a warp."""
    gpu = GPUS[capability]
    at_once = max(occupancy(CHIPS[capability], code.registers, code.shared, code.warps).warps // code.warps, 1)
    room = (gpu.cache << 10) - (0 if isinstance(capability, str) else at_once * code.shared)
    keeps_weights = argument_bytes(launch.arguments, WEIGHTS) <= room
    one = _warp(instructions, loop_trips(instructions, launch), lanes, keeps_weights)
    programs = math.prod(launch.grid)
    known = all(macs(i.name) is not None for i in instructions if is_matrix(i.name))
    every = {what: n * code.warps * programs for what, n in one.items() if what not in ("clocks", "matrix")}
    return Work(
        **every,
        matrix=one["matrix"] * code.warps * programs if known else None,
        memory=argument_bytes(launch.arguments),
        clocks=one["clocks"],
        waves=max(1.0, programs / (gpu.processors * at_once)),
    )


def _warp(
    instructions: Sequence[Instruction], rounds: Mapping[int, float], lanes: int, keeps_weights: bool
) -> dict[str, float]:
    """What one warp of one program does, by the names of Work's attributes."""
    sums = dict.fromkeys(("instructions", "matrix", "fma", "special", "l1", "l2", "clocks"), 0.0)
    loads: dict[int, float] = {}  # clocks that each loop waits for its loads
    for i in instructions:
        times = math.prod(rounds[n] for n in i.loops)
        through = lanes * (load_bits(i.name) or store_bits(i.name) or 0) // 8
        in_l1 = through > 0 and keeps_weights and any(source.has(i) for source in weight_loads())
        sums["instructions"] += times * (lanes == 32 or _VECTOR.match(i.name) is not None)
        sums["matrix"] += times * (is_matrix(i.name) and (macs(i.name) or 0))
        sums["fma"] += times * (2 if "FFMA2" in i.name else 1) * (_FLOAT.match(i.name) is not None)
        sums["special"] += times * is_special(i.name)
        sums["l1"] += times * (through + lanes * shared_bytes(i.name))
        sums["l2"] += times * through * (not in_l1)
        sums["clocks"] += times * (NEXT + BARRIER * (i.name.startswith("BAR.SYNC") or i.name == "s_barrier"))
        if load_bits(i.name) and not is_asynchronous(i.name):
            around = i.loops[-1] if i.loops else -1
            loads[around] = max(loads.get(around, 0), times * (WEIGHT_LOADS if in_l1 else LOADS))
    return sums | {"clocks": sums["clocks"] + sum(loads.values())}


WEIGHTS = frozenset({"ak_ptr", "ap_ptr", "w_ptr", "w1_ptr", "w2_ptr", "p_ptr", "p0_ptr", "p1_ptr", "p2_ptr"})


@cache
def weight_loads() -> tuple[Source, ...]:
    """The lines that load what all programs read."""
    found = []
    for path in sorted(Path(arithmetic.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                names = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
                if names & WEIGHTS:
                    found.append(Source(path.name, node.lineno, (node.end_lineno or node.lineno) + NUMBERED_ON))
    return tuple(found)


def argument_bytes(arguments: Mapping[str, Any], names: Collection[str] | None = None) -> int:
    """Bytes of the tensors among a launch's arguments (those named), each once."""
    storages = {}
    for name, a in arguments.items():
        if isinstance(a, torch.Tensor) and (names is None or name in names):
            bytes_each = a.numel() * a.element_size()
            storages[a.data_ptr()] = min(bytes_each, a.untyped_storage().nbytes())
    return sum(storages.values())


# ---------------------------------------------------------------- the bounds
BOUNDS = ("issue", "matrix", "float32", "special", "L1", "L2", "memory", "latency")


def bounds(done: Work, capability: Capability, kind: str, lanes: int) -> dict[str, float]:
    """Microseconds that each of BOUNDS implies. kind: of the products, a half type, ``tf32`` or ``float32``.

    latency: programs come in waves, and each takes at least the clocks of one alone.
    """
    gpu = GPUS[capability]
    clocks = gpu.processors * gpu.clock * 1e3  # of all multiprocessors in a microsecond
    rate = {"tf32": gpu.tf32, "float32": gpu.float32}.get(kind, gpu.half)
    return {
        "issue": done.instructions / gpu.issue / clocks,
        "matrix": (done.matrix or 0) / rate / clocks if rate else 0.0,
        "float32": done.fma * lanes / gpu.fma / clocks,
        "special": done.special * lanes / gpu.special / clocks,
        "L1": done.l1 / gpu.l1 / clocks,
        "L2": done.l2 / gpu.l2 / 1e3,
        "memory": done.memory / gpu.memory / 1e3,
        "latency": done.waves * done.clocks / gpu.clock / 1e3,
    }

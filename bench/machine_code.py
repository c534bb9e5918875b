"""What compiled kernels are made of, read from their machine code, and how many of them a chip holds at a time.

:func:`sass` and :func:`amdgcn` read the text of a disassembler or compiler, :func:`summary` counts what matters in it.
All are functions of text; only :func:`read` runs NVIDIA's disassembler, which Triton brings along.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton

from bench.ahead_of_time import Capability

# ---------------------------------------------------------------- chips
SIMDS = 4  # of a multiprocessor, each with its own registers
REGISTERS = 512  # of a SIMD, a lane: 65536 a multiprocessor with 32 lanes
WIDEST = 16  # bytes of a load or store
GRANULARITY = 8  # registers of a lane are given out in eights


@dataclass(frozen=True)
class Chip:
    """What limits the programs on one multiprocessor (AMD: compute unit), as the vendors' guides have it.

    Attributes:
        capability: as bench.ahead_of_time takes it.
        shared, program_shared: bytes of shared memory, all of it and at most for a program; reserved: what each program
            loses. warps, programs: at most at a time.
    """

    capability: Capability
    shared: int
    program_shared: int
    reserved: int
    warps: int
    programs: int


def _nvidia(capability: int, shared: int, warps: int, programs: int) -> Chip:
    """Shared memory in KiB; from sm_80 the system keeps 1 KiB of each program's."""
    reserved = 1 if capability >= 80 else 0
    return Chip(capability, shared << 10, (shared - reserved) << 10, reserved << 10, warps, programs)


CHIPS: dict[Capability, Chip] = {
    75: _nvidia(75, 64, 32, 16),
    80: _nvidia(80, 164, 64, 32),
    86: _nvidia(86, 100, 48, 16),
    89: _nvidia(89, 100, 48, 24),
    90: _nvidia(90, 228, 64, 32),
    100: _nvidia(100, 228, 64, 32),
    120: _nvidia(120, 100, 48, 24),
    "gfx942": Chip("gfx942", 64 << 10, 64 << 10, 0, 32, 32),
}


@dataclass(frozen=True)
class Occupancy:
    """Warps on a multiprocessor at a time, what part of the most they are, and what keeps more away."""

    warps: int
    share: float
    limit: str


def occupancy(chip: Chip, registers: int, shared: int, warps: int) -> Occupancy:
    """Of a kernel: registers of a lane, bytes of shared memory and warps of a program."""
    rounded = -(-max(registers, 1) // GRANULARITY) * GRANULARITY
    bytes_each = shared + chip.reserved
    programs = {
        "registers": SIMDS * (REGISTERS // rounded) // warps,
        "shared memory": chip.shared // bytes_each if bytes_each else chip.programs,
        "warps": chip.warps // warps,
        "programs": chip.programs,
    }
    if shared > chip.program_shared:
        programs["shared memory"] = 0
    limit = min(programs, key=lambda what: programs[what])
    found = programs[limit] * warps
    return Occupancy(found, found / chip.warps, limit)


# ---------------------------------------------------------------- text -> instructions
@dataclass(frozen=True)
class Place:
    """A line of a source file, which is named without its folder."""

    file: str
    line: int


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: with its suffixes, ``LDG.E.128``. predicated: it may be left out.
        at: where it comes from, the innermost function first, and then where that was called; () where the text has
            none.
        loops: numbers of the loops around it, the outermost first. again: the loop that it jumps back to the beginning
            of, or None.
    """

    name: str
    operands: str
    predicated: bool = False
    at: tuple[Place, ...] = ()
    loops: tuple[int, ...] = ()
    again: int | None = None


_SASS_LABEL = re.compile(r"^([.$\w]+):")
_SASS_LINE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)( inlined at)?')
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
_AMD_LABEL = re.compile(r"^(\.?\w+):")
_AMD_LINE = re.compile(r"^\s+\.loc\s.*;(.*)")
_AMD_PLACE = re.compile(r"([^\s:]+):(\d+):\d+")
_AMD = re.compile(r"^\s+([a-z]\w*)\s*(.*?)\s*(?:;.*)?$")


def sass(text: str) -> list[Instruction]:
    """Instructions of ``nvdisasm -c -gi``."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    at: tuple[Place, ...] = ()
    called = False  # whether the next place is where the function of the last one was called
    for row in text.splitlines():
        if m := _SASS.match(row):
            found.append(Instruction(m[2], m[3], m[1] is not None and not m[1].startswith("@PT "), at))
        elif m := _SASS_LINE.match(row):
            place = Place(Path(m[1]).name, int(m[2]))
            at = (*at, place) if called else (place,)
            called = m[3] is not None
        elif m := _SASS_LABEL.match(row):
            labels[m[1]] = len(found)
    return with_loops(found, labels)


def amdgcn(text: str) -> list[Instruction]:
    """Instructions of what LLVM writes for an AMD GPU, of the first function."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    at: tuple[Place, ...] = ()
    for row in text.splitlines():
        if row.startswith(".Lfunc_end"):
            break
        if m := _AMD_LABEL.match(row):
            labels[m[1]] = len(found)
        elif m := _AMD_LINE.match(row):
            at = tuple(Place(file, int(line)) for file, line in _AMD_PLACE.findall(m[1]))
        elif m := _AMD.match(row):
            found.append(Instruction(m[1], m[2], False, at))
    return with_loops(found, labels)


# ---------------------------------------------------------------- loops
_ENDS = ("EXIT", "RET", "BRX", "JMP", "KILL", "s_endpgm", "s_setpc_b64")


def _leads(i: Instruction) -> tuple[str | None, bool]:
    """The label that an instruction may jump to, and whether the next one may follow it."""
    if i.name.startswith("CALL.REL"):  # often an ordinary jump, out of a loop
        m = re.search(r"`\(([.$\w]+)\)", i.operands)
        return (m[1] if m else None), True
    if i.name.split(".")[0] == "BRA":
        m = re.search(r"`\(([.$\w]+)\)", i.operands)
        return (m[1] if m else None), i.predicated or not i.operands.startswith("`")
    if i.name == "s_branch" or i.name.startswith("s_cbranch"):
        return i.operands.split()[0], i.name != "s_branch"
    return None, i.predicated or i.name.split(".")[0] not in _ENDS


def with_loops(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Instruction]:
    """The same with ``loops``, numbered from the largest: what runs again when a branch goes back to a label that
    every way to the branch has passed."""
    starts = {0, *labels.values()}
    starts |= {n + 1 for n, i in enumerate(instructions) if _leads(i)[0] is not None or not _leads(i)[1]}
    blocks = sorted(s for s in starts if s < len(instructions))
    number = {s: n for n, s in enumerate(blocks)}
    ends = [*blocks[1:], len(instructions)]
    after: list[list[int]] = []
    for end in ends:
        label, falls = _leads(instructions[end - 1])
        at = labels.get(label or "", len(instructions))
        trap = at == end - 1  # behind a kernel's end, it jumps to itself
        to = [number[at]] if at in number and not trap else []
        after.append(to + ([number[end]] if falls and end in number else []))
    natural = _natural_loops(after)
    found = sorted(natural.items(), key=lambda loop: -sum(ends[b] - blocks[b] for b in loop[1]))
    heads = {head: at for at, (head, _) in enumerate(found)}
    told = []
    for n, (begin, end) in enumerate(zip(blocks, ends, strict=True)):
        around = tuple(at for at, (_, loop) in enumerate(found) if n in loop)
        again = next((heads[head] for head in after[n] if heads.get(head) in around), None)
        told += [replace(i, loops=around) for i in instructions[begin : end - 1]]
        told.append(replace(instructions[end - 1], loops=around, again=again))
    return told


def _natural_loops(after: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """The blocks of each loop of a graph by its first, where after[b] may follow b."""
    before: list[list[int]] = [[] for _ in after]
    for b, following in enumerate(after):
        for f in following:
            before[f].append(b)
    dominators = _dominators(before)
    loops: dict[int, set[int]] = {}
    for b, following in enumerate(after):
        for head in following:
            if head in dominators[b]:
                body = loops.setdefault(head, {head})
                open_ = [b]
                while open_:
                    n = open_.pop()
                    if n not in body:
                        body.add(n)
                        open_ += before[n]
    return loops


def _dominators(before: Sequence[Sequence[int]]) -> list[set[int]]:
    """For each block, those that every way to it passes. Blocks that nothing leads to are called from somewhere."""
    roots = {0} | {b for b, found in enumerate(before) if not found}
    dominators = [{b} if b in roots else set(range(len(before))) for b in range(len(before))]
    changed = True
    while changed:
        changed = False
        for b, found in enumerate(before):
            if b not in roots:
                new = set.intersection(*(dominators[p] for p in found)) | {b}
                changed |= new != dominators[b]
                dominators[b] = new
    return dominators


# ---------------------------------------------------------------- instructions -> numbers
_SPILL = re.compile(r"(STL|LDL)\b|scratch_(load|store)_")
_MATRIX = re.compile(r"([HIQOBD]MMA|[HIQ]GMMA|UTC[A-Z]*MMA)\b|v_(s?mfma|wmma)_")
_SPECIAL = re.compile(r"MUFU\b|v_(exp|log|rcp|rsq|sqrt|sin|cos)_f(16|32)")
_LOAD = re.compile(r"(LDG|LDGSTS)\b|(global|buffer)_load_")
_STORE = re.compile(r"STG\b|(global|buffer)_store_")
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def is_spill(name: str) -> bool:
    """Whether an instruction reads or writes what did not fit into registers (or an array of the kernel's own)."""
    return _SPILL.match(name) is not None


def is_matrix(name: str) -> bool:
    """Whether it is one of the matrix unit."""
    return _MATRIX.match(name) is not None


def is_special(name: str) -> bool:
    """Whether it is one of the unit for exponentials, reciprocals and square roots."""
    return _SPECIAL.match(name) is not None


def is_asynchronous(name: str) -> bool:
    """Whether it is a copy from global to shared memory that nothing waits for at once."""
    return name.startswith(("LDGSTS", "UBLKCP", "UTMALDG"))


def load_bits(name: str) -> int | None:
    """Bits a lane of a load from global memory (or a copy from it to shared memory); None of another instruction."""
    return _bits(name) if _LOAD.match(name) else None


def store_bits(name: str) -> int | None:
    """Bits a lane of a store to global memory; None of another instruction."""
    return _bits(name) if _STORE.match(name) else None


def _bits(name: str) -> int:
    if name.startswith(("LDG", "STG")):
        m = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
        return int(m[1]) if m else 32
    m = re.search(r"(?:load|store)_(?:lds_)?[us]?(dwordx\d|dword|short|byte)", name)
    return _AMD_BITS.get(m[1], 32) if m else 32


# A masked load becomes up to six lines of assembly, which the compiler numbers on from the source's line.
NUMBERED_ON = 5


@dataclass(frozen=True)
class Source:
    """Lines of a source file: from ``first`` up to ``last``."""

    file: str
    first: int
    last: int

    def has(self, i: Instruction) -> bool:
        """Whether an instruction was made of them."""
        return bool(i.at) and i.at[0].file == self.file and self.first <= i.at[0].line <= self.last


@dataclass(frozen=True)
class Code:
    """What one kernel is made of; instructions are counted as they stand, not as often as they run.

    Attributes:
        registers: of a lane. shared: bytes. warps: of a program.
        instructions: all of them; looped: those inside loops; loops: of each loop, inner ones included.
        spills_looped, spills_outside: loads and stores of spilled registers inside loops, and elsewhere.
        matrix: instructions of the matrix unit by name. special: of the special-function unit.
        loads: of global memory in innermost loops, by bits a lane. history: those of the history, wherever they are;
            copies: those among them that are asynchronous.
    """

    registers: int
    shared: int
    warps: int
    instructions: int
    looped: int
    loops: tuple[int, ...]
    spills_looped: int
    spills_outside: int
    matrix: Mapping[str, int]
    special: int
    loads: Mapping[int, int]
    history: Mapping[int, int]
    copies: int = 0


def summary(instructions: Sequence[Instruction], registers: int, shared: int, warps: int, history: Source) -> Code:
    """Count. ``history``: the source lines that load it."""
    loops = Counter(n for i in instructions for n in i.loops)
    holds_others = {n for i in instructions for n in i.loops[:-1]}
    innermost = [i for i in instructions if i.loops and i.loops[-1] not in holds_others]
    looped = [i for i in instructions if i.loops]
    return Code(
        registers=registers,
        shared=shared,
        warps=warps,
        instructions=len(instructions),
        looped=len(looped),
        loops=tuple(loops[n] for n in sorted(loops)),
        spills_looped=sum(is_spill(i.name) for i in looped),
        spills_outside=sum(is_spill(i.name) for i in instructions if not i.loops),
        matrix=Counter(_short(i.name) for i in instructions if is_matrix(i.name)),
        special=sum(is_special(i.name) for i in instructions),
        loads=_widths(innermost),
        history=_widths(i for i in instructions if history.has(i)),
        copies=sum(history.has(i) and is_asynchronous(i.name) for i in instructions),
    )


def _widths(instructions: Iterable[Instruction]) -> dict[int, int]:
    bits = (load_bits(i.name) for i in instructions)
    return dict(sorted(Counter(b for b in bits if b is not None).items()))


def _short(name: str) -> str:
    """Without types: ``HMMA.16816``, ``v_mfma_f32_16x16x16``."""
    if name.startswith("v_"):
        return "_".join(name.split("_")[:4])
    return ".".join(name.split(".")[:2])


# ---------------------------------------------------------------- compiled kernels
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def number(pattern: str, text: str) -> int:
    """The number behind the only place where the pattern fits.

    Raises:
        ValueError: it is not there.
    """
    m = re.search(pattern + r"\s*(\d+)", text)
    if m is None:
        raise ValueError(f"text: expected {pattern} and a number, got {text[:200]!r}")
    return int(m[1])


def read(kernel: Any, history: Source) -> tuple[list[Instruction], Code]:
    """The instructions of a CompiledKernel of Triton's, and their summary."""
    shared, warps = int(kernel.metadata.shared), int(kernel.metadata.num_warps)
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        found, registers = amdgcn(text), number(r"\.vgpr_count:", text)
        return found, summary(found, registers, shared, warps, history)
    with _cubin(kernel) as path:  # -ndf: without its dataflow analysis, a quarter of the time, the text is the same
        found, usage = sass(_run("nvdisasm", "-c", "-gi", "-ndf", path)), _run("cuobjdump", "-res-usage", path)
    return found, summary(found, number("REG:", usage), shared, warps, history)


def least_spills(kernel: Any) -> int:
    """How many loads and stores of spilled registers a CompiledKernel for an NVIDIA GPU has at least: none stores more
    than 16 bytes of the stack. Told in milliseconds; :func:`read` takes up to seconds."""
    if "cubin" not in kernel.asm:
        return 0
    with _cubin(kernel) as path:
        return number("STACK:", _run("cuobjdump", "-res-usage", path)) // WIDEST


@contextmanager
def _cubin(kernel: Any) -> Iterator[str]:
    """The machine code of a CompiledKernel as a file."""
    handle, path = tempfile.mkstemp(".cubin")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(kernel.asm["cubin"])
        yield path
    finally:
        Path(path).unlink()

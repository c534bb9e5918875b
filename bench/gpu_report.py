"""``python -m bench.gpu_report``: every Triton kernel compiled for GPUs that need not be there, and judged.

It compiles what calls at the sizes in use would launch, with the tiles that din_fast chooses, writes tables for each
chip to docs/gpu-report.md (what the code is made of, and a model of the time that it takes, bench/gpu_model.py), and
exits with 1 where a kernel is worse than allowed (bench/gpu_pinned.json has those known to be, and how much). No GPU is
needed, and nothing is timed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.ahead_of_time import WORKERS, Capability, Compiled, Compiler, Launch, captured, gpu_name
from bench.gpu_model import BARRIER, BOUNDS, GPUS, LOADS, NEXT, WEIGHT_LOADS, Work, bounds, work
from bench.machine_code import CHIPS, NUMBERED_ON, Code, Source, occupancy, read
from din_fast import FusedActivationUnit, preset
from din_fast.backends.triton import arithmetic, operands, tiling

OUT = Path("docs/gpu-report.md")
PINNED = Path(__file__).parent / "gpu_pinned.json"
MOST_OUTSIDE = 16  # local loads and stores outside loops that a kernel may have
WIDE = 128  # bits a lane of a load


# ---------------------------------------------------------------- what is compiled
@dataclass(frozen=True)
class Size:
    """A unit and its inputs: ``length`` positions for each of ``batch`` candidates; ``training``: a step, too."""

    dim: int
    hidden_units: tuple[int, ...]
    preset: str = "fuxictr"
    softmax: bool = False
    batch: int = 4096
    length: int = 100
    training: bool = True

    def __str__(self) -> str:
        name = f"D {self.dim} {list(self.hidden_units)}"
        name += f" {self.preset}" if self.preset != "fuxictr" else ""
        name += " softmax" if self.softmax else ""
        return name + (f" L {self.length}" if self.length != 100 else "")


MAIN = (
    Size(64, (80, 40)),
    Size(64, (80, 40), "rechub", softmax=True),
    Size(64, (80, 40), softmax=True, batch=64, length=4096, training=False),  # cut into parts, that are merged
    Size(16, (36,)),
)
OTHERS = (
    Size(64, (64,)),
    Size(128, (80, 40)),
    Size(8, (36,)),
    Size(8, (256, 128)),
    Size(36, (80, 40)),
    Size(48, (256, 64)),
    Size(128, (512, 256)),
    Size(10, (256, 256, 256)),
)
# tf32 is float32 with TF32 products. The half types make the same code but for the names of a few instructions, so
# that one is enough but for the main sizes on the chips that are judged most.
KINDS: dict[Capability, tuple[str, ...]] = {
    80: ("bfloat16", "tf32", "float32", "float16"),
    90: ("bfloat16", "tf32", "float32", "float16"),
    75: ("float16", "float32"),
    86: ("bfloat16", "tf32", "float32"),
    89: ("bfloat16", "tf32", "float32"),
    100: ("bfloat16", "tf32", "float32"),
    120: ("bfloat16", "tf32", "float32"),
    "gfx942": ("bfloat16", "float32", "float16"),
}
QUICK: tuple[Capability, ...] = (80, 90)


@dataclass(frozen=True)
class Calls:
    """What is launched: by a training step, and by a call without gradient."""

    training: list[Launch]
    inference: list[Launch]


def limits(capability: Capability) -> tiling.Limits:
    """What tiling is told of a chip."""
    return tiling.Limits(CHIPS[capability].program_shared, gpu_name(capability))


def calls(size: Size, kind: str, capability: Capability) -> Calls:
    """Those of a size on a chip."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    spec = preset(size.preset, list(size.hidden_units), softmax=size.softmax)
    unit = FusedActivationUnit(size.dim, spec=spec, backend="triton").to(dtype)
    history = torch.zeros(size.batch, size.length, size.dim, dtype=dtype, requires_grad=size.training)
    target = torch.zeros(size.batch, size.dim, dtype=dtype, requires_grad=size.training)

    def step() -> None:
        out = unit.train()(history, target)
        out.backward(torch.ones_like(out))

    def infer() -> None:
        with torch.no_grad():
            unit.eval()(history, target)

    with (
        patch.object(operands, "float32_precision", lambda: "tf32" if kind == "tf32" else "ieee"),
        patch.object(operands, "device_limits", lambda device: limits(capability)),
        patch.object(operands, "has_matrix_unit", lambda device: has_matrix_unit(capability)),
    ):
        return Calls(captured(step) if size.training else [], captured(infer))


def history_source() -> Source:
    """The lines of din_fast that load rows of a history."""
    function = arithmetic.load_rows.fn
    lines, first = inspect.getsourcelines(function)
    return Source(Path(inspect.getfile(function)).name, first, first + len(lines) - 1 + NUMBERED_ON)


# ---------------------------------------------------------------- rows
@dataclass(frozen=True)
class Row:
    """A kernel that was compiled for a chip, for the first call that needs it.

    Attributes:
        kernel: its name; several of one call have numbers. tile: candidates x positions.
        code: None where there is an error. products: it multiplies matrices.
        wide: loads of the history could be of WIDE bits. streams: an inner loop goes through the history's columns, for
            products.
        work, bounds: what it has to do, and the microseconds that takes in the model; {} where there is an error.
    """

    capability: Capability
    size: str
    kind: str
    kernel: str
    tile: str = ""
    products: bool = False
    wide: bool = False
    streams: bool = False
    code: Code | None = None
    error: str | None = None
    work: Work | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)

    @property
    def modelled(self) -> float:
        """Microseconds in the model."""
        return max(self.bounds.values(), default=0.0)

    @property
    def binds(self) -> str:
        """Which of the bounds is the largest."""
        return max(self.bounds, key=lambda what: self.bounds[what])

    @property
    def key(self) -> str:
        """What names it among the pinned ones."""
        return f"{gpu_name(self.capability)} | {self.size} | {self.kind} | {self.kernel}"


def row(found: Compiled, size: Size, kind: str, kernel: str) -> Row:
    """Judge what became of a launch by its machine code."""
    if found.error is not None:
        return Row(found.capability, str(size), kind, kernel, error=found.error)
    constants = found.launch.arguments
    instructions, code = read(found.kernel, history_source())
    lanes = found.kernel.metadata.warp_size
    done = work(instructions, code, found.launch, found.capability, lanes)
    return Row(
        found.capability,
        str(size),
        kind,
        kernel,
        f"{constants.get('BC', 1)}x{constants['LP']}" if "LP" in constants else str(constants["BLOCK"]),
        "tt.dot" in found.kernel.asm["ttir"],
        "LP" in constants and _can_load_wide(size, constants, lanes * code.warps),
        bool(constants.get("WIDE")) and "first_chunk" in found.kernel.asm["ttir"],
        code,
        None,
        done,
        bounds(done, found.capability, kind, lanes),
    )


def _can_load_wide(size: Size, constants: Mapping[str, object], lanes: int) -> bool:
    """Triton knows that rows begin at 16 bytes where D is a multiple of 16; and every lane needs 16 bytes of a tile."""
    columns, positions, candidates = constants.get("BD", 0), constants["LP"], constants.get("BC", 1)
    history = constants["k_ptr"]
    assert isinstance(columns, int) and isinstance(positions, int) and isinstance(candidates, int)
    assert isinstance(history, torch.Tensor)
    bits = 8 * history.element_size() * columns * positions * candidates
    return size.dim % 16 == 0 and bits >= WIDE * lanes


def names(found: Sequence[Launch]) -> list[str]:
    """Kernels' names in order, with a number where a call launches one several times."""
    given: list[str] = []
    seen: dict[str, int] = {}
    for launch in found:
        name = launch.kernel.__name__.removesuffix("_kernel")
        seen[name] = seen.get(name, 0) + 1
        given.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return given


@dataclass(frozen=True)
class Task:
    """A size in a type on a chip."""

    size: Size
    kind: str
    capability: Capability


def tasks(sizes: Iterable[Size], chips: Iterable[Capability]) -> list[Task]:
    """All of a run; a chip's types are those of KINDS."""
    return [
        Task(size, kind, chip)
        for chip in chips
        for size in sizes
        for kind in KINDS[chip]
        if size in MAIN or kind != "float16" or "bfloat16" not in KINDS[chip]
    ]


@dataclass(frozen=True)
class Found:
    """What became of a task: rows of the launches of a training step and of a call without gradient, in order."""

    task: Task
    training: list[Row]
    inference: list[Row]

    @property
    def rows(self) -> list[Row]:
        return self.training + self.inference


def rows_of(launched: Sequence[Launch], task: Task, compiler: Compiler, threads: ThreadPoolExecutor) -> list[Row]:
    """A row for each launch; each kernel is compiled once."""
    compiled = compiler.compile_each(launched, task.capability)
    return list(threads.map(lambda f, name: row(f, task.size, task.kind, name), compiled, names(launched)))


def has_matrix_unit(capability: Capability) -> bool:
    """Whether Triton uses the chip's matrix unit."""
    return capability != 75


def compile_task(task: Task, compiler: Compiler, threads: ThreadPoolExecutor) -> Found:
    """Compile all launches of a task, each kernel once."""
    try:
        called = calls(task.size, task.kind, task.capability)
    except ValueError as error:  # din_fast has no tile that fits into the chip's shared memory
        return Found(task, [], [Row(task.capability, str(task.size), task.kind, "all", error=str(error))])
    rows = rows_of(called.training + called.inference, task, compiler, threads)
    return Found(task, rows[: len(called.training)], rows[len(called.training) :])


def compile_all(todo: Iterable[Task], compiler: Compiler, tick: Callable[[str], None]) -> Iterator[Found]:
    """What became of each task, in order."""
    with ThreadPoolExecutor(WORKERS) as threads:
        for task in todo:
            tick(f"{gpu_name(task.capability)} {task.size} {task.kind}")
            yield compile_task(task, compiler, threads)


def different(found: Iterable[Found]) -> list[Row]:
    """Rows in order, a kernel that several calls need once for each chip."""
    seen: set[object] = set()
    rows = []
    for r in (r for f in found for r in f.rows):
        same = (r.capability, r.kernel.split()[0], r.kind, r.code) if r.code else r
        if repr(same) not in seen:
            seen.add(repr(same))
            rows.append(r)
    return rows


# ---------------------------------------------------------------- the gate
def failures(r: Row) -> dict[str, int]:
    """What is not allowed about a row, and how much of it there is."""
    if r.code is None:
        return {"does not compile": 1}
    code, chip = r.code, CHIPS[r.capability]
    found = {
        "local loads and stores in loops": code.spills_looped,
        "local loads and stores outside loops": max(code.spills_outside - MOST_OUTSIDE, 0) and code.spills_outside,
        "bytes of shared memory": code.shared if code.shared > chip.program_shared else 0,
        "products without the matrix unit": int(_needs_matrix(r) and not code.matrix),
        "loads of the history that are waited for": int(r.streams and _copies(r.capability) and not code.copies),
        "narrow loads of the history": sum(n for bits, n in code.history.items() if r.wide and bits < WIDE),
    }
    return {what: n for what, n in found.items() if n}


def _copies(capability: Capability) -> bool:
    """Whether Triton copies to shared memory without waiting: on NVIDIA GPUs from sm_80."""
    return isinstance(capability, int) and capability >= 80


def _needs_matrix(r: Row) -> bool:
    """float32 as it is has no matrix unit on NVIDIA GPUs; for sm_75 Triton uses none."""
    return r.products and r.kind != "float32" and has_matrix_unit(r.capability)


def gate(rows: Iterable[Row], pinned: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Why rows do not pass, a line each: what is not allowed and not pinned, or more of it than is pinned."""
    reasons = []
    for r in rows:
        allowed = pinned.get(r.key, {})
        for what, n in failures(r).items():
            if n > allowed.get(what, 0):
                most = f", pinned {allowed[what]}" if what in allowed else ""
                reasons.append(f"{r.key}: {n} {what}{most}" + (f"\n{r.error}" if r.error else ""))
    return reasons


def judged(path: Path = PINNED) -> bool:
    """Whether the pins are of this triton: other versions make other code, which is reported and not judged."""
    return not path.exists() or json.loads(path.read_text())["triton"] == triton.__version__


def read_pinned(path: Path = PINNED) -> dict[str, dict[str, int]]:
    """Rows that may fail, and how much; none where there is no file."""
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def pin(rows: Iterable[Row], path: Path = PINNED) -> None:
    """Rewrite the pins of these rows, others stay: what fails now may fail as much from now on."""
    now = read_pinned(path)
    for r in rows:
        now.pop(r.key, None)
        if found := failures(r):
            now[r.key] = found
    text = json.dumps({"triton": triton.__version__, "rows": dict(sorted(now.items()))}, indent=1)
    path.write_text(text + "\n")


# ---------------------------------------------------------------- the report
COLUMNS = (
    "unit",
    "type",
    "kernel",
    "tile, warps",
    "registers",
    "occupancy, limit",
    "shared KiB",
    "spills in loops, outside",
    "matrix",
    "special",
    "loads in inner loops",
    "of the history",
    "instructions, in loops",
    "modelled us, bound",
)
INTRO = """# The Triton kernels, compiled

Generated by `{command}` with triton {triton}; do not edit. It compiles what a training step and a call without gradient
launch, for GPUs that are not there. **No GPU has run these kernels; nothing here is a time.** {scope}

Candidates 4096, L 100, preset fuxictr, unless a row says otherwise. Code that several calls share stands once a chip,
at the first of them: `moments 2` is a call's second launch of that kernel, and the `forward` with the highest number is
the one without gradient. tf32 is float32 with TF32 products. float16 makes the same code as bfloat16 but for the names
of a few instructions, and is compiled for the main sizes on sm_80 and sm_90, and where there is no bfloat16 (sm_75).

- tile: candidates x positions. occupancy: warps at a time on a multiprocessor, of the most it can hold, and what limits
  them.
- spills: loads and stores of what did not fit into registers (`STL`, `LDL`; AMD: `scratch_*`). matrix, special:
  instructions of the matrix unit and of the unit for exponentials and reciprocals. loads: bits a lane x how many.
  Instructions are counted as they stand, not as often as they run. `!`: does not pass, see the end.
- modelled us: microseconds that the kernel takes in the model of bench/gpu_model.py, and what binds it there. **A
  model, no measurement.**

The table of calls sums a training step's kernels, and those of a call without gradient (what torch does around them is
not in it), one after the other, each at its largest bound. Beside the sum stand the bounds that all kernels would have
if that were all that they did, and what a position costs: issue slots of a lane, multiplications and additions of the
matrix unit, float32 instructions and special functions, bytes that go between L2 and the multiprocessors, and bytes of
device memory. `latency` is the crudest: how long one program takes alone, at {next} clocks from an instruction to the
next, {loads} for a round of loads, {weights} where it is of weights alone, and {barrier} for a barrier, times the waves
of programs. The GPUs:

{gpus}

Open: bank conflicts, how well loads are hidden, and what the caches do cannot be seen here. A loop with two entries is
not found. On AMD's chip, spills of scalar registers into vector registers are not counted.
"""


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return lines + ["| " + " | ".join(_cells(r)) + " |" for r in rows]


def _cells(r: Row) -> list[str]:
    start = [r.size, r.kind, r.kernel + (" !" if failures(r) else "")]
    code = r.code
    if code is None:
        return [*start, "does not compile", *[""] * (len(COLUMNS) - 4)]
    busy = occupancy(CHIPS[r.capability], code.registers, code.shared, code.warps)
    return [
        *start,
        f"{r.tile}, {code.warps}",
        str(code.registers),
        f"{busy.share:.0%}, {busy.limit}",
        f"{code.shared / 1024:.1f}",
        f"{code.spills_looped}, {code.spills_outside}",
        ", ".join(f"{name} x {n}" for name, n in code.matrix.items()),
        str(code.special),
        _told(code.loads),
        _told(code.history),
        f"{code.instructions}, {code.looped}",
        f"{r.modelled:.0f}, {r.binds}",
    ]


CALLS = (
    "unit",
    "type",
    "call",
    "modelled us",
    *(f"{what} us" for what in BOUNDS),
    "binds most",
    "a position: issue",
    "matrix",
    "float32",
    "special",
    "L2 bytes",
    "memory bytes",
)


def calls_table(found: Sequence[Found]) -> list[str]:
    """The model of whole calls, as lines of a Markdown table."""
    lines = ["| " + " | ".join(CALLS) + " |", "|" + "---|" * len(CALLS)]
    for f in found:
        for call, rows in (("training step", f.training), ("without gradient", f.inference)):
            if rows and all(r.work for r in rows):
                lines.append("| " + " | ".join(_call_cells(f.task, call, rows)) + " |")
    return lines


def _call_cells(task: Task, call: str, rows: Sequence[Row]) -> list[str]:
    modelled = sum(r.modelled for r in rows)
    by_bound = {what: sum(r.modelled for r in rows if r.binds == what) for what in BOUNDS}
    most = max(BOUNDS, key=lambda what: by_bound[what])
    lanes = 64 if isinstance(task.capability, str) else 32
    done = [r.work for r in rows if r.work]
    each = task.size.batch * task.size.length
    matrix = "?" if any(w.matrix is None for w in done) else f"{sum(w.matrix or 0 for w in done) / each:.0f}"
    return [
        str(task.size),
        task.kind,
        call,
        f"{modelled:.0f}",
        *(f"{sum(r.bounds[what] for r in rows):.0f}" for what in BOUNDS),
        f"{most}, {by_bound[most] / modelled:.0%}",
        f"{sum(w.instructions for w in done) * lanes / each:.0f}",
        matrix,
        f"{sum(w.fma for w in done) * lanes / each:.0f}",
        f"{sum(w.special for w in done) * lanes / each:.0f}",
        f"{sum(w.l2 for w in done) / each:.0f}",
        f"{sum(w.memory for w in done) / each:.0f}",
    ]


def _told(widths: Mapping[int, int]) -> str:
    return ", ".join(f"{bits} x {n}" for bits, n in widths.items())


def report(found: Sequence[Found], command: str, scope: str) -> str:
    """The whole text. ``command`` made it; ``scope``: a sentence on what it covers."""
    gpus = "\n".join(f"- {gpu_name(chip)}: {gpu}" for chip, gpu in GPUS.items())
    told = {"command": command, "triton": triton.__version__, "scope": scope, "gpus": gpus}
    lines = [INTRO.format(**told, next=NEXT, loads=LOADS, weights=WEIGHT_LOADS, barrier=BARRIER)]
    rows = different(found)
    for chip in dict.fromkeys(r.capability for r in rows):
        of_chip = [r for r in rows if r.capability == chip]
        bad = sum(bool(failures(r)) for r in of_chip)
        calls = calls_table([f for f in found if f.task.capability == chip])
        lines += [
            f"## {gpu_name(chip)}",
            "",
            f"{len(of_chip)} kernels, {bad} do not pass. Calls on a {GPUS[chip].name}:",
        ]
        lines += ["", *calls, "", "Kernels:", "", *table(of_chip), ""]
    lines += ["## What does not pass", ""]
    lines += [
        f"Allowed are: no local loads and stores in loops and at most {MOST_OUTSIDE} outside; the shared memory that a "
        "program can have; the matrix unit for half types and TF32 (not judged on sm_75); loads of the history of "
        f"{WIDE} bits where D is a multiple of 16 and the tile has as much for every lane, and on NVIDIA GPUs from "
        "sm_80 asynchronous ones where an inner loop goes through its columns. "
        "bench/gpu_pinned.json says which kernels may fail, and how much.",
        "",
    ]
    for r in rows:
        if found_bad := failures(r):
            lines.append(
                f"- {r.key.replace(' | ', ', ')}: " + ", ".join(f"{n} {what}" for what, n in found_bad.items())
            )
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------- the command
def run(todo: Sequence[Task], console: Console) -> list[Found]:
    """All that is found, with a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Compiler() as compiler, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(todo))
        done = iter(range(len(todo)))

        def tick(what: str) -> None:
            progress.update(bar, completed=next(done), description=what.replace("[", "\\["))

        return list(compile_all(todo, compiler, tick))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    known = {gpu_name(chip): chip for chip in KINDS}
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the main sizes on sm_80 and sm_90")
    parser.add_argument("--main", action="store_true", help="the main sizes only")
    parser.add_argument("--chips", nargs="+", choices=known, default=list(known), help="default: all")
    parser.add_argument("--pin", action="store_true", help="rewrite the pins of these rows: what fails now may fail")
    parser.add_argument("--pins", type=Path, default=PINNED, help="where the pins are")
    parser.add_argument("--out", type=Path, default=OUT, help="where the report goes")
    args = parser.parse_args(arguments)
    chips = QUICK if args.quick else [known[name] for name in args.chips]
    sizes = MAIN if args.quick or args.main else MAIN + OTHERS
    console = Console()
    found = run(tasks(sizes, chips), console)
    rows = different(found)
    given = sys.argv[1:] if arguments is None else arguments
    told = ", ".join(map(gpu_name, chips))
    scope = f"This run: {'the main' if sizes == MAIN else 'all'} sizes, {told}."
    args.out.write_text(report(found, " ".join(["python -m bench.gpu_report", *given]), scope))
    if args.pin:
        pin(rows, args.pins)
    if not judged(args.pins):
        console.print(f"{len(rows)} kernels: {args.out}; not judged, {args.pins} is of another triton", markup=False)
        return 0
    reasons = gate(rows, read_pinned(args.pins))
    console.print("\n".join([*reasons, f"{len(rows)} kernels, {len(reasons)} failures: {args.out}"]), markup=False)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())

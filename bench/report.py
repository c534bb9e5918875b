"""What a run prints and writes: where it ran, a table per preset, rows as CSV."""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

import din_fast
from bench import peers
from bench.contenders import OURS, Case
from bench.parity import Check
from bench.timing import Timing
from din_fast.backends import native

MODES = ("forward", "training step")
Timings = Mapping[str, Mapping[str, Timing]]  # by mode, then by provider


@dataclass(frozen=True)
class Row:
    """One line of the CSV.

    ``value`` is the median, in the unit that ``metric`` names; p20 and p80 are percentiles. ``disturbed`` counts the
    rounds, of ``rounds``, in which another process took the processor for over 5 % of the time.
    """

    provider: str
    preset: str
    mode: str
    metric: str
    shape: str
    value: float
    p20: float
    p80: float
    rounds: int
    disturbed: int
    backend: str
    instruction_set: str
    threads: int
    processor: str
    versions: str
    timestamp: str


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_set(provider: str, backend: str) -> str:
    """What a provider's code uses: the kernel's build for din_fast on ``native``, else torch's own capability."""
    if provider == OURS and backend == "native":
        return native.instruction_set()
    return torch.backends.cpu.get_cpu_capability().lower()


def versions() -> dict[str, str]:
    """Versions of din_fast, torch, Python and the frameworks."""
    found = {"din_fast": din_fast.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return found | {package: metadata.version(package) for package in peers.PACKAGES.values()}


def heading(backend: str) -> str:
    """Two lines that say where the numbers come from."""
    line = ", ".join(f"{name} {version}" for name, version in versions().items())
    sets = f"torch {instruction_set('torch', backend)}, din_fast {backend} {instruction_set(OURS, backend)}"
    return f"{line}\n{processor()}, {torch.get_num_threads()} threads; {sets}"


def parity_line(case: Case, checks: Iterable[Check]) -> str:
    """One line: each contender's tensor that comes nearest to what the rule allows, or goes beyond it."""
    by_provider: dict[str, list[Check]] = {}
    for c in checks:
        by_provider.setdefault(c.provider, []).append(c)
    worst = [max(found, key=_share) for found in by_provider.values()]
    told = "; ".join(f"{c.provider}: {c.error:.1e} of {c.allowed:.1e} ({c.tensor}, {c.kind})" for c in worst)
    verdict = "green" if all(c.green for c in worst) else "RED"
    return f"parity {case.preset} {case.shape} {verdict}, worst error of what is allowed: {told}"


def _share(check: Check) -> float:
    """What part of the allowed error was used; infinite for a NaN."""
    return check.error / check.allowed if math.isfinite(check.error) else math.inf


def red_table(case: Case, checks: Iterable[Check]) -> Table:
    """The checks that failed, with the error of the framework's own float32 unit beside them."""
    table = Table(title=f"parity {case.preset} {case.shape}: failed")
    for column in ("contender", "tensor", "kind", "error", "plain float32", "allowed"):
        table.add_column(column)
    for c in checks:
        if not c.green:
            table.add_row(c.provider, c.tensor, c.kind, f"{c.error:.2e}", f"{c.plain:.2e}", f"{c.allowed:.2e}")
    return table


def speed_table(preset: str, cases: Sequence[tuple[Case, Timings]]) -> Table:
    """Median milliseconds with the 20th and 80th percentile, and how many times slower than din_fast by the medians."""
    table = Table(title=f"preset {preset}: milliseconds, median (20th to 80th percentile)")
    table.add_column("contender")
    for mode in MODES:
        table.add_column(mode, justify="right")
        table.add_column("times din_fast", justify="right")
    table.add_column("disturbed rounds", justify="right")
    for case, timings in cases:
        table.add_row(f"[bold]{escape(case.shape)}[/]")
        for provider in timings[MODES[0]]:
            both = [timings[mode][provider] for mode in MODES]
            cells = [provider]
            for mode, t in zip(MODES, both, strict=True):
                cells.append(f"{t.median:.2f} ({t.percentile(20):.2f} to {t.percentile(80):.2f})")
                cells.append(f"{t.median / timings[mode][OURS].median:.2f}")
            cells.append(f"{sum(t.disturbed for t in both)} of {sum(t.rounds for t in both)}")
            table.add_row(*cells, end_section=provider == OURS)
    return table


def rows(case: Case, timings: Timings, backend: str) -> list[Row]:
    """The CSV rows of one case; the time stamp is that of this call, in UTC."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    told = " ".join(f"{name}={version}" for name, version in versions().items())
    return [
        Row(
            provider=provider,
            preset=case.preset,
            mode=mode,
            metric="milliseconds",
            shape=case.shape,
            value=round(t.median, 5),
            p20=round(t.percentile(20), 5),
            p80=round(t.percentile(80), 5),
            rounds=t.rounds,
            disturbed=t.disturbed,
            backend=backend if provider == OURS else "",
            instruction_set=instruction_set(provider, backend),
            threads=torch.get_num_threads(),
            processor=processor(),
            versions=told,
            timestamp=now,
        )
        for mode, found in timings.items()
        for provider, t in found.items()
    ]


def write_csv(path: Path, table: Iterable[Row]) -> None:
    """Write the rows, and the folder where it is missing; an older file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)

"""What a run prints and writes: where it ran, tables, rows as CSV."""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

import din_fast
from bench import cases, peers
from bench.cases import Task
from bench.contenders import CANDIDATES, FORWARD, OURS, TRAINING, Case
from bench.parity import Check
from bench.peak import Peak
from bench.timing import Timing
from din_fast.backends import native

MACHINE = "machine"  # the provider of the rows about the machine itself
MILLISECONDS, SAMPLES, MEBIBYTES = "milliseconds", "samples a second", "MiB beyond inputs"
PEAK, CLOCK, PEAK_SHARE = "FMA peak, GFLOP/s", "clock, GHz", "share of theoretical FMA peak"
DICE = "Dice, 10^9 a second"
MEMORY = "memory, GB a second"
FMA_SHARE, BANDWIDTH, UNIT_SHARE = "share of FMA peak", "GB a second", "share of the units"


@dataclass(frozen=True)
class Row:
    """One line of the CSV.

    ``value`` is the median, of what ``metric`` names; p20 and p80 are percentiles of the same runs, from the smallest.
    ``x_name`` and ``x_value`` say what the case is one of: a shape by its name, a configuration, a point of a sweep.
    ``disturbed`` counts the rounds, of ``rounds``, in which another process took the processor for over 5 % of the
    time.
    """

    provider: str
    preset: str
    mode: str
    metric: str
    shape: str
    x_name: str
    x_value: str
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

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured: two runs of it can be compared."""
        return (
            *(self.provider, self.preset, self.mode, self.metric, self.shape),
            *(self.x_name, self.x_value, self.backend, self.threads),
        )


@dataclass(frozen=True)
class Found:
    """What was measured of one case, or of one whole model.

    Attributes:
        preset, shape, x_name, x_value: as in :class:`Row`.
        batch: samples a call.
        timings: by mode, then by provider.
        backends: by provider; "" for what is not din_fast.
        case: None for a whole model.
        memory: MiB by mode, then by provider.
        unit_share: of a whole model's time, by mode, then by provider.
    """

    preset: str
    shape: str
    x_name: str
    x_value: str
    batch: int
    timings: Mapping[str, Mapping[str, Timing]]
    backends: Mapping[str, str]
    case: Case | None = None
    memory: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unit_share: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def found(
    task: Task,
    timings: Mapping[str, Mapping[str, Timing]],
    backends: Mapping[str, str],
    memory: Mapping[str, Mapping[str, float]],
) -> Found:
    """What was measured of a task."""
    case = task.case
    return Found(case.preset, case.shape, task.x_name, task.x_value, case.batch, timings, backends, case, memory)


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_set(backend: str) -> str:
    """What a provider's code uses: the kernel's build for din_fast on ``native``, else torch's own capability."""
    return native.instruction_set() if backend == "native" else torch.backends.cpu.get_cpu_capability().lower()


def versions() -> dict[str, str]:
    """Versions of din_fast, torch, Python and the frameworks."""
    told = {"din_fast": din_fast.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return told | {package: metadata.version(package) for package in peers.PACKAGES.values()}


def heading(backends: Sequence[str], peak: Peak | str) -> str:
    """Three lines that say where the numbers come from."""
    line = ", ".join(f"{name} {version}" for name, version in versions().items())
    sets = [f"torch {instruction_set('')}", *(f"din_fast {b} {instruction_set(b)}" for b in backends)]
    return f"{line}\n{processor()}, {torch.get_num_threads()} threads; {', '.join(sets)}\n{peak}"


def parity_line(what: str, checks: Iterable[Check]) -> str:
    """One line: each contender's tensor that comes nearest to what the rule allows, or goes beyond it."""
    by_provider: dict[str, list[Check]] = {}
    for c in checks:
        by_provider.setdefault(c.provider, []).append(c)
    worst = [max(of_it, key=_share) for of_it in by_provider.values()]
    told = "; ".join(f"{c.provider}: {c.error:.1e} of {c.allowed:.1e} ({c.tensor}, {c.kind})" for c in worst)
    verdict = "green" if all(c.green for c in worst) else "RED"
    return f"parity {what} {verdict}, worst error of what is allowed: {told}"


def _share(check: Check) -> float:
    """What part of the allowed error was used; infinite for a NaN."""
    return check.error / check.allowed if math.isfinite(check.error) else math.inf


def red_table(what: str, checks: Iterable[Check]) -> Table:
    """The checks that failed, with the error of the framework's own float32 unit beside them."""
    table = Table(title=f"parity {escape(what)}: failed")
    for column in ("contender", "tensor", "kind", "error", "plain float32", "allowed"):
        table.add_column(column)
    for c in checks:
        if not c.green:
            table.add_row(c.provider, c.tensor, c.kind, f"{c.error:.2e}", f"{c.plain:.2e}", f"{c.allowed:.2e}")
    return table


# ---------------------------------------------------------------- rows


def _metrics(f: Found, mode: str, provider: str, t: Timing, peak: Peak | None) -> dict[str, tuple[float, float, float]]:
    """Median, 20th and 80th percentile of each metric that there is."""
    p20, median, p80 = (t.percentile(p) for p in (20, 50, 80))
    told = {MILLISECONDS: (median, p20, p80)}

    def rate(amount: float) -> tuple[float, float, float]:
        """The amount a second; the slowest time is the smallest rate."""
        return amount / (1e-3 * median), amount / (1e-3 * p80), amount / (1e-3 * p20)

    told[SAMPLES] = rate(f.batch)
    if f.case is not None:
        told[BANDWIDTH] = rate(1e-9 * cases.moved_bytes(f.case, mode))
        if peak is not None and f.backends[provider] == "native":
            told[FMA_SHARE] = rate(1e-9 * cases.flops(f.case, mode) / peak.gflops)
    for metric, by_mode in ((MEBIBYTES, f.memory), (UNIT_SHARE, f.unit_share)):
        value = by_mode.get(mode, {}).get(provider, math.nan)
        if not math.isnan(value):
            told[metric] = (value, value, value)
    return told


def rows(f: Found, peak: Peak | None) -> list[Row]:
    """The CSV rows of what was measured; the time stamp is that of this call, in UTC."""
    return [
        _row(f, provider, mode, metric, numbers, t.rounds, t.disturbed)
        for mode, of_mode in f.timings.items()
        for provider, t in of_mode.items()
        for metric, numbers in _metrics(f, mode, provider, t, peak).items()
    ]


def machine_rows(peak: Peak) -> list[Row]:
    """The FMA peak that shares are of, the clock, and the rates at Dice and in memory."""
    f = Found("", "", "", "", 0, {}, {})
    told = {PEAK: peak.gflops, CLOCK: peak.clock, PEAK_SHARE: peak.share, DICE: peak.dice, MEMORY: peak.memory}
    return [_row(f, MACHINE, "", metric, (value, value, value), 1, 0) for metric, value in told.items()]


def _row(
    f: Found, provider: str, mode: str, metric: str, numbers: tuple[float, float, float], rounds: int, disturbed: int
) -> Row:
    value, p20, p80 = (float(f"{x:.6g}") for x in numbers)
    backend = f.backends.get(provider, "")
    return Row(
        provider=provider,
        preset=f.preset,
        mode=mode,
        metric=metric,
        shape=f.shape,
        x_name=f.x_name,
        x_value=f.x_value,
        value=value,
        p20=p20,
        p80=p80,
        rounds=rounds,
        disturbed=disturbed,
        backend=backend,
        instruction_set=instruction_set(backend),
        threads=torch.get_num_threads(),
        processor=processor(),
        versions=" ".join(f"{name}={version}" for name, version in versions().items()),
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def write_csv(path: Path, table: Iterable[Row]) -> None:
    """Write the rows, and the folder where it is missing; an older file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: it does not have the columns of :class:`Row`.
    """
    kinds = {"value": float, "p20": float, "p80": float, "rounds": int, "disturbed": int, "threads": int}
    with path.open(newline="") as f:
        reader = csv.DictReader(f)
        if reader.fieldnames != [field.name for field in fields(Row)]:
            raise ValueError(f"{path}: expected the columns of bench/report.py's Row, got {reader.fieldnames}")
        return [Row(**{name: kinds.get(name, str)(text) for name, text in line.items()}) for line in reader]


def of_most_threads(rows: Iterable[Row]) -> list[Row]:
    """The rows of the run with the most threads, where there are several."""
    rows = list(rows)
    most = max((row.threads for row in rows), default=0)
    return [row for row in rows if row.threads == most]


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows; of two that measured the same, the new one."""
    by_key = {row.key: row for row in old}
    return list((by_key | {row.key: row for row in new}).values())


# ---------------------------------------------------------------- tables for the terminal


def _spread(t: Timing, digits: int = 2) -> str:
    return f"{t.median:.{digits}f} ({t.percentile(20):.{digits}f} to {t.percentile(80):.{digits}f})"


def _disturbed(of: Iterable[Timing]) -> str:
    of = list(of)
    return f"{sum(t.disturbed for t in of)} of {sum(t.rounds for t in of)}"


def speed_table(preset: str, group: Sequence[Found]) -> Table:
    """Median milliseconds with the 20th and 80th percentile, and how many times slower than din_fast by the medians."""
    threads = torch.get_num_threads()
    table = Table(title=f"preset {preset}, {threads} threads: milliseconds, median (20th to 80th percentile)")
    table.add_column("contender")
    modes = [mode for mode in (FORWARD, TRAINING, CANDIDATES) if any(mode in f.timings for f in group)]
    for mode in modes:
        table.add_column(mode, justify="right")
        table.add_column(f"times {OURS}", justify="right")
    table.add_column("disturbed rounds", justify="right")
    for f in group:
        table.add_row(f"[bold]{escape(f'{f.x_name} {f.x_value} {f.shape}')}[/]")
        providers = list(next(iter(f.timings.values())))
        for provider in providers:
            cells = [provider]
            for mode in modes:
                t = f.timings.get(mode, {}).get(provider)
                cells += ["", ""] if t is None else [_spread(t), f"{t.median / f.timings[mode][OURS].median:.2f}"]
            cells.append(_disturbed(of_mode[provider] for of_mode in f.timings.values()))
            table.add_row(*cells, end_section=provider == providers[-1])
    return table


def more_table(preset: str, table_rows: Sequence[Row]) -> Table:
    """The other metrics of din_fast's rows, and the memory of all providers."""
    metrics = (SAMPLES, FMA_SHARE, BANDWIDTH, MEBIBYTES)
    table = Table(title=f"preset {preset}, {torch.get_num_threads()} threads: per second, of the peak, memory")
    for column in ("shape", "mode", "contender", *metrics):
        table.add_column(column, justify="left" if column in ("shape", "mode", "contender") else "right")
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in table_rows:
        if row.metric in metrics:
            text = f"{row.value:.0%}" if row.metric == FMA_SHARE else f"{row.value:.4g}"
            cells.setdefault((f"{row.x_name} {row.x_value}", row.mode, row.provider), {})[row.metric] = text
    for names, of_it in cells.items():
        table.add_row(*names, *(of_it.get(metric, "") for metric in metrics), end_section=names[2] == OURS)
    return table


def model_table(group: Sequence[Found]) -> Table:
    """Whole models: milliseconds, samples a second and the share of the units."""
    table = Table(title=f"whole models, as they are and fused, {torch.get_num_threads()} threads")
    for column in ("model", "mode", "", "milliseconds", SAMPLES, f"times {OURS}", UNIT_SHARE, "disturbed rounds"):
        table.add_column(column, justify="left" if column in ("model", "mode", "") else "right")
    for f in group:
        for mode, of_mode in f.timings.items():
            for provider, t in of_mode.items():
                rate, slower = f.batch / (1e-3 * t.median), t.median / of_mode[OURS].median
                share = f"{f.unit_share[mode][provider]:.0%}"
                numbers = (_spread(t), f"{rate:.0f}", f"{slower:.2f}", share, _disturbed([t]))
                table.add_row(escape(f"{f.x_value} {f.shape}"), mode, provider, *numbers)
    return table

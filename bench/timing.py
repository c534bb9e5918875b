"""Milliseconds a call: contenders take turns, and a turn in which another process took the processor is repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SECONDS_A_TURN = 0.2
MIN_CALLS = 3
ATTEMPTS = 3
TAKEN_LIMIT = 0.05


def processor_use() -> tuple[float, float]:
    """Seconds that this process's threads have run, and seconds that they stood ready while others ran.

    Linux counts both per thread (run-queue waiting, /proc/<pid>/task/*/schedstat), which is right for code that is not
    parallel throughout. Elsewhere the second is wall time less processor time: it is right for one thread, and sees a
    disturbance of several threads only where the processor time falls below the wall time.
    """
    ran = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            on, off, _ = path.read_text().split()
        except OSError:  # the thread ended between the listing and the reading
            continue
        ran, waited = ran + int(on), waited + int(off)
    if ran:
        return ran * 1e-9, waited * 1e-9
    cpu = time.process_time()
    return cpu, time.perf_counter() - cpu


@dataclass(frozen=True)
class Clock:
    """The two clocks, in seconds: wall time, and (ran, waited) as :func:`processor_use`."""

    wall: Callable[[], float] = time.perf_counter
    use: Callable[[], tuple[float, float]] = processor_use


@dataclass
class Timing:
    """What was measured of one contender.

    Attributes:
        milliseconds: one number a call, of all rounds.
        rounds: how many rounds.
        disturbed: how many of them stayed disturbed after the repetitions.
    """

    milliseconds: list[float] = field(default_factory=list)
    rounds: int = 0
    disturbed: int = 0

    def percentile(self, p: float) -> float:
        """The p-th percentile of the milliseconds, linear between neighbours."""
        return float(np.percentile(self.milliseconds, p))

    @property
    def median(self) -> float:
        return self.percentile(50)


def _turn(call: Callable[[], object], seconds: float, clock: Clock) -> tuple[list[float], float]:
    """Call until ``seconds`` are over: milliseconds of each call, and the share of time that others took."""
    call()  # brings caches and thread pools back to this contender
    took: list[float] = []
    ran, waited = clock.use()
    begin = end = clock.wall()
    while end - begin < seconds or len(took) < MIN_CALLS:
        start = clock.wall()
        call()
        end = clock.wall()
        took.append(1e3 * (end - start))
    ran, waited = (max(now - then, 0.0) for now, then in zip(clock.use(), (ran, waited), strict=True))
    return took, waited / (ran + waited) if ran + waited > 0 else 0.0


def _quiet_turn(call: Callable[[], object], seconds: float, clock: Clock) -> tuple[list[float], bool]:
    """The least disturbed of at most three turns, the first quiet one if there is one, and whether it was disturbed."""
    best: tuple[list[float], float] | None = None
    for _ in range(ATTEMPTS):
        took, taken = _turn(call, seconds, clock)
        if best is None or taken < best[1]:
            best = took, taken
        if taken <= TAKEN_LIMIT:
            break
    assert best is not None
    return best[0], best[1] > TAKEN_LIMIT


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = SECONDS_A_TURN,
    clock: Clock | None = None,
    tick: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Time the contenders in turns.

    Args:
        calls: what to time, by name. Each is called once before it is timed in a round.
        rounds: each round gives each contender one turn, in the order of ``calls``.
        seconds: length of a turn; at least three calls are made.
        clock: None for the real clocks.
        tick: called with the name before each turn, for a progress bar.

    Returns:
        A :class:`Timing` per name.
    """
    clock = clock or Clock()
    timings = {name: Timing() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            tick(name)
            took, disturbed = _quiet_turn(call, seconds, clock)
            timing = timings[name]
            timing.milliseconds.extend(took)
            timing.rounds += 1
            timing.disturbed += disturbed
    return timings

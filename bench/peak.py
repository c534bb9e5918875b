"""The FMA peak of the machine, and its rates at Dice and in memory, measured by loops: ``python -m bench.peak``.

bench/peak.cpp is compiled into a temporary folder. The peak of the threads in use should be threads x clock x lanes
x 4: two units, a multiplication and an addition each. Lanes is the width of the data path, in floats: where a loop with
vectors of 16 is no more than 1.3 times as fast as one with vectors of 8, it is 8, whatever the instruction set (AMD's
Zen 4 executes a 512-bit vector in two halves).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCE = Path(__file__).with_name("peak.cpp")
FULL_RATE = 1.3
EXPECTED = 0.9  # of the theoretical peak, on an idle machine


@dataclass(frozen=True)
class Peak:
    """What the loops reached.

    Attributes:
        threads: how many ran at once.
        clock: GHz a thread.
        gflops: GFLOP/s of all threads, with the faster of both vectors.
        lanes: width of the data path, in floats: 8 or 16.
        dice: 10^9 Dice activations a second of all threads, with the kernel's own arithmetic and z in the cache.
        memory: GB a second that all threads move in arrays larger than caches, with the reads that writes cost.
    """

    threads: int
    clock: float
    gflops: float
    lanes: int
    dice: float
    memory: float

    @property
    def share(self) -> float:
        """Of threads x clock x lanes x 4."""
        return self.gflops / (self.threads * self.clock * self.lanes * 4)

    def __str__(self) -> str:
        told = (
            f"FMA peak {self.gflops:.0f} GFLOP/s with {self.threads} threads, clock {self.clock:.2f} GHz, data path "
            f"{self.lanes} floats: {self.share:.0%} of threads x clock x lanes x 4; {self.dice:.1f} G Dice/s; "
            f"memory {self.memory:.1f} GB/s"
        )
        return told if self.share >= EXPECTED else f"{told} (under {EXPECTED:.0%}: is the machine idle?)"


def compiler() -> str | None:
    """The C++ compiler: CXX, or what there is."""
    asked = os.environ.get("CXX")
    return next((found for name in (asked, "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)


def judge(threads: int, clock: float, of_8: float, of_16: float, dice: float, memory: float) -> Peak:
    """From the rates of both loops, in GFLOP/s."""
    return Peak(threads, clock, max(of_8, of_16), 16 if of_16 > FULL_RATE * of_8 else 8, dice, memory)


def measure(threads: int) -> Peak | str:
    """Compile and run the loops, about three seconds; where that cannot be, why."""
    command = compiler()
    if command is None:
        return "FMA peak: not measured, as no C++ compiler was found"
    with TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-pthread"]
        built = subprocess.run([command, *flags, str(SOURCE), "-o", str(program)], capture_output=True, text=True)
        if built.returncode != 0:
            reason = next((line for line in built.stderr.splitlines() if "error" in line), "no message")
            return f"FMA peak: not measured, as {command} failed: {reason}"
        told = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True).stdout
    return judge(threads, *map(float, told.split()))


if __name__ == "__main__":
    for count in (1, os.cpu_count() or 1):
        print(measure(count))

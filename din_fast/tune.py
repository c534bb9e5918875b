"""``python -m din_fast.tune``: time tiles for your shapes on this GPU, and keep the fastest for the Triton backend.

The winners go to the file that din_fast/backends/triton/tuned.py describes and the backend reads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from din_fast.backends import triton
from din_fast.backends.triton import tiling
from din_fast.backends.triton.tiling import Shape, Tile
from din_fast.backends.triton.tuned import Pair, cache_path, key, save, trying
from din_fast.spec import PRESETS, preset
from din_fast.unit import FusedActivationUnit

ROUNDS, CALLS = 5, 10
MARGIN = 0.98  # of the usual tile's time: what is not faster than that is noise
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in triton.DTYPES}


# ---------------------------------------------------------------- the times


def event_times(call: Callable[[], object], calls: int, device: torch.device | None = None) -> list[float]:
    """Milliseconds of each of some calls, between CUDA events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def gpu_milliseconds(call: Callable[[], object]) -> float:
    """The median of some calls."""
    return statistics.median(event_times(call, CALLS))


def medians(tiles: Sequence[Tile], time: Callable[[Tile], float], rounds: int) -> dict[Tile, float]:
    """The median of each tile's turns; without those that do not compile, where the usual one, the first, does."""
    from triton.runtime.errors import TritonError

    took: dict[Tile, list[float]] = {}
    for tile in tiles:
        try:
            time(tile)
        except TritonError:  # out of registers or shared memory
            if tile == tiles[0]:
                raise
            continue
        took[tile] = []
    for _ in range(rounds):
        for tile, found in took.items():
            found.append(time(tile))
    return {tile: statistics.median(found) for tile, found in took.items()}


def fastest(took: Mapping[Tile, float]) -> Tile:
    """The fastest tile; the first, the usual one, unless another is clearly faster."""
    usual, best = next(iter(took)), min(took, key=took.__getitem__)
    return best if took[best] < MARGIN * took[usual] else usual


def tune(
    forward: Callable[[], object],
    step: Callable[[], object],
    milliseconds: Callable[[Callable[[], object]], float] = gpu_milliseconds,
    tell: Callable[[str], object] = lambda line: None,
    rounds: int = ROUNDS,
) -> tuple[Shape, torch.device, Pair]:
    """The fastest tiles of a call, and what they hold for.

    Args:
        forward: makes the call; the forward's tile is chosen by it.
        step: makes the call and its backward; the backward's tile is chosen by it.
        milliseconds: times a function.
        tell: is given a line for each tile.
        rounds: turns of each tile, after one that compiles it.
    """
    with trying(None) as trial:
        forward()
    if trial.seen is None:
        raise RuntimeError("forward: expected a call of the triton backend, got none")
    shape, limits, device = trial.seen
    forwards, backwards = tiling.choices(shape, limits)

    def choose(what: str, tiles: Sequence[Tile], call: Callable[[], object], pair: Callable[[Tile], Pair]) -> Tile:
        def time(tile: Tile) -> float:
            with trying(pair(tile)):
                return milliseconds(call)

        took = medians(tiles, time, rounds)
        best = fastest(took)
        for tile, ms in took.items():
            sign = "*" if tile == best else " "
            tell(f"{sign} {what:8} {tile.candidates:3} x {tile.positions:3} rows, {tile.warps} warps {ms:9.4f} ms")
        return best

    first = choose("forward", forwards, forward, lambda tile: (tile, backwards[0]))
    second = choose("backward", backwards, step, lambda tile: (first, tile))
    return shape, device, (first, second)


# ---------------------------------------------------------------- the command


def calls(args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward and the training step of a unit, both with the statistics of training; full histories."""
    spec = preset(args.preset, args.hidden_units, softmax=args.softmax or None)
    dtype = DTYPES[args.dtype]
    unit = FusedActivationUnit(args.dim, spec=spec, backend="triton").to(device, dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    history, target = normal(args.batch, args.length, args.dim), normal(args.batch, args.dim)
    leaves = history, target, *unit.parameters()

    def forward() -> None:
        with torch.no_grad():
            unit(history, target)

    def step() -> None:
        torch.autograd.grad(unit(history, target).sum(), leaves)

    return forward, step


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(prog="python -m din_fast.tune", description=__doc__.splitlines()[0] if __doc__ else "")
    for name in ("batch", "length", "dim"):
        p.add_argument(f"--{name}", type=int, required=True)
    p.add_argument("--hidden-units", type=int, nargs="+", help="default: the preset's own")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--preset", choices=PRESETS, default="rechub")
    p.add_argument("--softmax", action="store_true")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 without a GPU."""
    args = parser().parse_args(arguments)
    device = torch.device("cuda", 0)
    reason = triton.why_not(device) if torch.cuda.is_available() else "torch sees neither CUDA nor ROCm"
    if reason is not None:
        print(f"no tiles were timed: {reason}", file=sys.stderr)
        return 2
    shape, device, tiles = tune(*calls(args, device), tell=print)
    save(cache_path(), shape, device, tiles)
    print(f"kept in {cache_path()} for {key(shape, device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m din_fast.tune``: time tiles for your shapes on this GPU, and keep the fastest for the Triton backend.

The winners go to a file, ``DIN_FAST_TUNE_CACHE`` or ~/.cache/din_fast/tiles.json, by GPU, versions of din_fast and
triton, and what tiles depend on (:class:`din_fast.backends.triton.tiling.Shape`: another batch size gets the usual
tiles). The backend reads the file once a process: for tensors on a GPU, or wherever the variable is set. Which tiles
there are is data in tiling.py; a choice that is not among them is ignored. Tiles change results by rounding only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from din_fast.backends import triton
from din_fast.backends.triton import tiling
from din_fast.backends.triton.tiling import Limits, Plan, Shape, Tile
from din_fast.spec import PRESETS, preset
from din_fast.version import __version__

VARIABLE = "DIN_FAST_TUNE_CACHE"
FORMAT = "din_fast tiles 1"
ROUNDS, CALLS = 5, 10
MARGIN = 0.98  # of the usual tile's time: what is not faster than that is noise
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in triton.DTYPES}
Pair = tuple[Tile, Tile]  # of the forward and of the backward


# ---------------------------------------------------------------- which tiles a call gets


@dataclass
class Trial:
    """Tiles for all calls while it lasts, None for the usual; and what the last of the calls was."""

    tiles: Pair | None = None
    seen: tuple[Shape, Limits, torch.device] | None = None


_trial: Trial | None = None
_told: set[str] = set()


def plan(shape: Shape, limits: Limits, device: torch.device) -> Plan:
    """The plan of a call: with the tiles that were chosen for it, where there are any, else tiling's own."""
    if _trial is not None:
        _trial.seen = shape, limits, device
        tiles = _trial.tiles
    elif device.type == "cuda" or os.environ.get(VARIABLE):
        tiles = _chosen(cache_path(), shape, limits, device)
    else:
        tiles = None
    return tiling.plan(shape, limits) if tiles is None else tiling.cut(shape, *tiles)


@contextmanager
def trying(tiles: Pair | None) -> Iterator[Trial]:
    """All calls inside get these tiles, whatever was chosen before."""
    global _trial
    _trial = Trial(tiles)
    try:
        yield _trial
    finally:
        _trial = None


# ---------------------------------------------------------------- the file


def cache_path() -> Path:
    """Where the winners are kept."""
    return Path(os.environ.get(VARIABLE) or os.path.expanduser("~/.cache/din_fast/tiles.json"))


def key(shape: Shape, device: torch.device) -> str:
    """What a choice holds for."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{gpu}, din_fast {__version__}, triton {triton.version()}, {astuple(shape)}"


@lru_cache(1024)
def _chosen(path: Path, shape: Shape, limits: Limits, device: torch.device) -> Pair | None:
    found = _read(path).get(key(shape, device))
    if found is None:
        return None
    try:
        allowed = tiling.choices(shape, limits)
        forward, backward = (
            t[t.index(Tile(**found[n]))] for t, n in zip(allowed, ("forward", "backward"), strict=True)
        )
    except (TypeError, KeyError, ValueError):
        _warn(f"{path}: expected tiles of tiling.choices for {key(shape, device)}, got {found}")
        return None
    return forward, backward


@lru_cache(16)
def _read(path: Path) -> Mapping[str, Any]:
    """The choices in a file; none, and a warning, where it is not such a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(f"{path}: {error}")
        return {}
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("tiles"), dict):
        _warn(f"{path}: expected a file of the format {FORMAT!r}")
        return {}
    return found["tiles"]


def _warn(what: str) -> None:
    if what not in _told:
        _told.add(what)
        warnings.warn(f"din_fast uses its usual tiles: {what}", RuntimeWarning, stacklevel=3)


def save(path: Path, shape: Shape, device: torch.device, tiles: Pair) -> None:
    """Put a choice into the file; all at once, so that no reader sees half of it."""
    forget()
    choice = {"forward": asdict(tiles[0]), "backward": asdict(tiles[1])}
    found = {"format": FORMAT, "tiles": {**_read(path), key(shape, device): choice}}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    new.replace(path)
    forget()


def forget() -> None:
    """Read the file again at the next call."""
    _read.cache_clear()
    _chosen.cache_clear()


# ---------------------------------------------------------------- the times


def gpu_milliseconds(call: Callable[[], object]) -> float:
    """The median of some calls, between CUDA events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


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
    from din_fast import FusedActivationUnit  # here, since the backend imports this module

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
    from din_fast import tune as module  # the copy that the backend imports, too

    sys.exit(module.main())

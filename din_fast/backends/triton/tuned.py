"""Tiles that were timed on a GPU (din_fast/tune.py), in the place of tiling's own: a file of them, and who reads it.

The file is ``DIN_FAST_TUNE_CACHE`` or ~/.cache/din_fast/tiles.json. A choice holds for a GPU, the versions of din_fast
and triton, and what tiles depend on (:class:`~din_fast.backends.triton.tiling.Shape`: another batch size gets the usual
tiles). It is read once a process: for tensors on a GPU, or wherever the variable is set. Which tiles there are is data
in tiling.py; a choice that is not among them is ignored, with a warning. Tiles change results by rounding only.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from din_fast.backends import triton
from din_fast.backends.triton import tiling
from din_fast.backends.triton.tiling import Limits, Plan, Shape, Tile
from din_fast.version import __version__

VARIABLE = "DIN_FAST_TUNE_CACHE"
FORMAT = "din_fast tiles 1"
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

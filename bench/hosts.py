"""Import the frameworks as installed, without patching their code and without what their DIN never uses.

A user who installed a framework with all of its requirements imports it as ever. Here they are installed with
``--no-deps``: where an import asks for a package that is missing, an empty module stands in while the import runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

Stubs = Mapping[str, Mapping[str, object]]

_FUXICTR_STUBS: Stubs = {
    "h5py": {},
    "polars": {},
    "yaml": {},
    "ray": {},
    "ray.data": {"SaveMode": object, "TaskPoolStrategy": object},
    "ray.data.datasource": {},
    "ray.data.datasource.filename_provider": {"FilenameProvider": object},
}
# DeepCTR-Torch asks the package index for its newest version at import; this answer ends that without a word.
_DEEPCTR_STUBS: Stubs = {
    "requests": {"get": lambda url: SimpleNamespace(status_code=None), "codes": SimpleNamespace(ok=200)}
}


class _NoWriter:
    """TensorBoard's SummaryWriter, as far as RecBole's trainer calls it."""

    def __init__(self, folder: str) -> None:
        pass

    def add_scalar(self, *arguments: object) -> None:
        pass

    def add_hparams(self, *arguments: object) -> None:
        pass


_RECBOLE_STUBS: Stubs = {
    "colorlog": {},
    "texttable": {"Texttable": object},
    "colorama": {"init": object},
    "torch.utils.tensorboard": {"SummaryWriter": _NoWriter},
}
# By the package's name: what stands in, and whether it does so for an installed package, too.
STANDING_IN: dict[str, tuple[Stubs, bool]] = {
    "torch_rechub": ({}, False),
    "deepctr_torch": (_DEEPCTR_STUBS, True),
    "fuxictr": (_FUXICTR_STUBS, False),
    "model_zoo": (_FUXICTR_STUBS, False),
    "recbole": (_RECBOLE_STUBS, True),
}


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Import modules of a framework within this, by ordinary import statements. They stay imported."""
    stubs, always = STANDING_IN[package]
    anomalies = torch.is_anomaly_enabled()
    if package == "recbole":
        _name_what_numpy_2_dropped()
    try:
        with standing_in(stubs, always), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the frameworks' own imports
            yield
    finally:
        # RecBole's sine.py turns it on for the whole process: every backward would be slower, fused or not.
        torch.autograd.set_detect_anomaly(anomalies)


def load(module: str) -> Any:
    """A module of a framework."""
    with importing(module.partition(".")[0]):
        return importlib.import_module(module)


def _name_what_numpy_2_dropped() -> None:
    """RecBole's Config makes ``np.float`` of ``np.float_`` and so on, which NumPy 2 has no more."""
    for name, kind in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        if name not in vars(np):
            setattr(np, name, kind)


@contextmanager
def standing_in(stubs: Stubs, always: bool = False) -> Iterator[None]:
    """Put stubs in place of packages that are not installed (``always``: of installed ones too), then undo it."""
    absent = [n for n in stubs if always or not _installed(n.partition(".")[0])]
    before = {n: sys.modules[n] for n in absent if n in sys.modules}
    for name in absent:
        module = ModuleType(name)
        vars(module).update(stubs[name])
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        sys.modules.update(before)


def _installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None

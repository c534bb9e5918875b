"""The host frameworks as installed, imported without patching their code; TorchEasyRec as a test double.

Where an import asks for a package that DIN never uses, an empty module stands in for it while the import runs.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

import torch

from bench import peers
from tests import easyrec_double

RECBOLE_STUBS: dict[str, dict[str, object]] = {
    "colorlog": {},
    "texttable": {"Texttable": object},
    "colorama": {"init": object},
    "torch.utils.tensorboard": {"SummaryWriter": object},
}
# By the package's name: what stands in, and whether it does so for an installed package, too.
_STANDING_IN: dict[str, tuple[dict[str, dict[str, object]], bool]] = {
    "torch_rechub": ({}, False),
    "deepctr_torch": (peers._DEEPCTR_STUBS, True),
    "fuxictr": (peers._FUXICTR_STUBS, False),
    "model_zoo": (peers._FUXICTR_STUBS, False),
    "recbole": (RECBOLE_STUBS, True),
}


def load(module: str) -> Any:
    """A module of a framework. It stays imported, as in a user's program; so does the double of TorchEasyRec's."""
    package = module.partition(".")[0]
    if package == "tzrec":
        _install_double()
        return sys.modules[module]
    stubs, always = _STANDING_IN[package]
    anomalies = torch.is_anomaly_enabled()
    with peers._standing_in(stubs, always), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks' own imports
        found = importlib.import_module(module)
    torch.autograd.set_detect_anomaly(anomalies)  # RecBole's sine.py turns it on for the whole process
    return found


def _install_double() -> None:
    """TorchEasyRec cannot be installed here: the double is what its modules' names give."""
    if "tzrec" in sys.modules:
        return
    for name in ("tzrec", "tzrec.modules", *easyrec_double.MODULES):
        sys.modules[name] = ModuleType(name)
    for name, classes in easyrec_double.MODULES.items():
        vars(sys.modules[name]).update({c.__name__: c for c in classes})

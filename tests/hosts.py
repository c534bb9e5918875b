"""The host frameworks as installed (bench/hosts.py); TorchEasyRec as a test double."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from bench import hosts
from tests import easyrec_double


def load(module: str) -> Any:
    """A module of a framework. It stays imported, as in a user's program; so does the double of TorchEasyRec's."""
    if module.partition(".")[0] == "tzrec":
        _install_double()
        return sys.modules[module]
    return hosts.load(module)


def _install_double() -> None:
    """TorchEasyRec cannot be installed here: the double is what its modules' names give."""
    if "tzrec" in sys.modules:
        return
    for name in ("tzrec", "tzrec.modules", *easyrec_double.MODULES):
        sys.modules[name] = ModuleType(name)
    for name, classes in easyrec_double.MODULES.items():
        vars(sys.modules[name]).update({c.__name__: c for c in classes})

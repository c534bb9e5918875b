"""Fused target attention (the activation unit) of the Deep Interest Network for PyTorch."""

from din_fast.functional import activation_unit
from din_fast.spec import HiddenLayer, UnitParameters, UnitSpec, preset
from din_fast.unit import FusedActivationUnit
from din_fast.version import __version__

__all__ = [
    "FusedActivationUnit",
    "HiddenLayer",
    "UnitParameters",
    "UnitSpec",
    "__version__",
    "activation_unit",
    "preset",
]

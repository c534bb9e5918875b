"""Fused target attention (the activation unit) of the Deep Interest Network for PyTorch."""

from din_fast.frameworks import register
from din_fast.functional import activation_unit
from din_fast.fusing import FuseReport, FuseRow, fuse, unfuse
from din_fast.spec import HiddenLayer, UnitParameters, UnitSpec, preset
from din_fast.step_times import StepTime, benchmark
from din_fast.unit import FusedActivationUnit
from din_fast.version import __version__

__all__ = [
    "FuseReport",
    "FuseRow",
    "FusedActivationUnit",
    "HiddenLayer",
    "StepTime",
    "UnitParameters",
    "UnitSpec",
    "__version__",
    "activation_unit",
    "benchmark",
    "fuse",
    "preset",
    "register",
    "unfuse",
]

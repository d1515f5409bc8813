"""Profilers: clocks on real devices. What they write takes the place of formulas and data sheets.

Whatever needs JAX loads on first use, so that the command line can choose the devices before JAX is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._timing import Clock as Clock
from ._timing import MeasurementError as MeasurementError
from ._timing import SystemClock as SystemClock

if TYPE_CHECKING:
    from ._calibrate import calibrate as calibrate
    from ._machine import here as here
    from ._measure import HardwareOrder as HardwareOrder
    from ._measure import HardwareResult as HardwareResult
    from ._measure import measure_hardware as measure_hardware
    from ._model import ModelOrder as ModelOrder
    from ._model import measure_model as measure_model
    from ._runtime import RunMeter as RunMeter

_HOMES = {
    "HardwareOrder": "_measure",
    "HardwareResult": "_measure",
    "ModelOrder": "_model",
    "RunMeter": "_runtime",
    "calibrate": "_calibrate",
    "here": "_machine",
    "measure_hardware": "_measure",
    "measure_model": "_model",
}


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)

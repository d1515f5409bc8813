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
    from ._measure import HardwareOrder as HardwareOrder
    from ._measure import HardwareResult as HardwareResult
    from ._measure import measure_hardware as measure_hardware

_FROM_MEASURE = ("HardwareOrder", "HardwareResult", "measure_hardware")


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    if name not in _FROM_MEASURE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("._measure", __name__), name)

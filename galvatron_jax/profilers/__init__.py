"""Profilers: clocks on real devices. What they write takes the place of formulas and data sheets.

Names load on first use, so that the command line can choose the devices before JAX is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._measure import HardwareOrder as HardwareOrder
    from ._measure import HardwareResult as HardwareResult
    from ._measure import measure_hardware as measure_hardware
    from ._timing import Clock as Clock
    from ._timing import MeasurementError as MeasurementError
    from ._timing import SystemClock as SystemClock

_HOMES = {
    "Clock": "_timing",
    "HardwareOrder": "_measure",
    "HardwareResult": "_measure",
    "MeasurementError": "_timing",
    "SystemClock": "_timing",
    "measure_hardware": "_measure",
}


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)

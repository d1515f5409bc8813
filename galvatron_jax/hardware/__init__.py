"""Bundled hardware: one JSON profile for each kind of GPU, each number with its source (see docs/hardware.md).

These are ceilings from data sheets and public measurements, ``measured`` is False in all of them; a profile that the
profilers wrote on the user's own cluster takes their place by its path.
"""

from ._bundled import as_priced as as_priced
from ._bundled import hardware_names as hardware_names
from ._bundled import load_hardware as load_hardware
from ._freshness import freshness_notes as freshness_notes
from ._freshness import installed_driver as installed_driver

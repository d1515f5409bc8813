"""What clocks and compilers said: figures that take the place of formulas, and where they come from.

``Provenance`` names the devices on which a clock ran, so that figures of one machine never price another. ``Measured``
is what the computation and memory profilers found of one layer kind; the search uses it and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ._document import Bytes, Count, NonNegative, Positive, Value


class Provenance(Value, frozen=True, kw_only=True, omit_defaults=True):
    """Where and when a clock ran: the fingerprint of what a profiler wrote."""

    device: str
    """Name of the hardware profile that stands for these devices, for example ``"h100"``."""
    device_kind: str
    """As JAX calls the devices, for example ``"NVIDIA H100 80GB HBM3"``."""
    driver: str = ""
    """Version of the driver; ``""`` when there is none."""
    jax_version: str
    date: str
    """``"2026-11-22"``, UTC."""

    def differences(self, other: Provenance) -> list[str]:
        """Return what another machine has differently, the date apart: ``"driver 570.86, now 580.65"``."""
        return [
            f"{name.replace('_', ' ')} {getattr(self, name) or 'none'}, now {getattr(other, name) or 'none'}"
            for name in ("device_kind", "driver", "jax_version")
            if getattr(self, name) != getattr(other, name)
        ]


Pass = Literal["forward", "backward", "recompute", "recompute-dots"]
"""What one microbatch runs in a layer; the last two are what remat ``full`` and ``dots`` add to backward."""


class PassTable(Value, frozen=True, kw_only=True):
    """Measured seconds of one pass of one layer on one device, at rising numbers of samples."""

    what: Pass
    tp: Count
    """Tensor-parallel degree: the device ran its share of the classes of the best candidate."""
    samples: tuple[Count, ...]
    """On the device: the microbatch over dp."""
    times_s: tuple[Positive, ...]

    def __post_init__(self) -> None:
        """Refuse tables that cannot be interpolated."""
        check_rising("samples", self.samples, self.times_s)


class MemoryTable(Value, frozen=True, kw_only=True):
    """Bytes of one layer on one device as its compiled programs say, at rising numbers of samples; remat ``none``."""

    tp: Count
    samples: tuple[Count, ...]
    residual_bytes: tuple[Bytes, ...]
    """What forward hands to backward, the stream input and weights left out."""
    workspace_bytes: tuple[Bytes, ...]
    """Temporaries of the backward program."""


class Measured(Value, frozen=True, kw_only=True):
    """What the computation and memory profilers measured of a layer kind, at the kind's sequence length."""

    provenance: Provenance
    fused_attention: bool = False
    """Attention ran as a fused kernel; else the scores were in memory."""
    passes: tuple[PassTable, ...]
    memory: tuple[MemoryTable, ...] = ()
    interpolation_error: NonNegative = 0.0
    """Largest relative error of a measured point as interpolated from its neighbours; 0 where no point has two."""

    def tables(self, what: Pass) -> dict[int, PassTable]:
        """Return the tables of one pass by tensor-parallel degree."""
        return {table.tp: table for table in self.passes if table.what == what}


def check_rising(name: str, sizes: Sequence[float], times_s: Sequence[float]) -> None:
    """Raise for a table whose sizes do not rise or whose times fall."""
    if len(sizes) != len(times_s) or not sizes:
        raise ValueError(f"{name} and times_s need the same length")
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{name} must rise")
    if list(times_s) != sorted(times_s):
        raise ValueError(f"times_s must not fall while {name} rise")

"""What clocks and compilers said: figures that take the place of formulas, and where they come from.

``Provenance`` names the devices on which a clock ran (or for which a program was compiled), so that figures of one
machine never price another. ``Measured`` is what the computation profiler found of one layer kind, ``MeasuredMemory``
what the memory profiler found; the search uses both and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from ._document import Count, NonNegative, Positive, Value

SignedBytes = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]


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


class Measured(Value, frozen=True, kw_only=True):
    """What the computation profiler measured of a layer kind, at the kind's sequence length."""

    provenance: Provenance
    fused_attention: bool = False
    """Attention ran as a fused kernel; else the scores were in memory."""
    passes: tuple[PassTable, ...]
    interpolation_error: NonNegative = 0.0
    """Largest relative error of a measured point as interpolated from its neighbours; 0 where no point has two."""

    def tables(self, what: Pass) -> dict[int, PassTable]:
        """Return the tables of one pass by tensor-parallel degree."""
        return {table.tp: table for table in self.passes if table.what == what}


class MemoryTable(Value, frozen=True, kw_only=True):
    """Bytes of one layer on one device under one strategy, read from compiled training steps of the user's model."""

    tp: Count = 1
    sp: bool = False
    ulysses: Count = 1
    dp: Count = 1
    zero: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    replicas: Count = 1
    remat: Literal["none", "dots", "full"] = "none"
    accumulates: bool = False
    """The steps had several microbatches."""
    samples: tuple[Count, ...]
    """Of one microbatch, on the device; rising."""
    kept_bytes: tuple[SignedBytes, ...]
    """What one more layer adds to the peak besides its parameters, gradients and optimizer state."""
    workspace_bytes: tuple[SignedBytes, ...]
    """The rest of the peak, once for all layers of a stage. Either may be below zero by what the formula of the states
    has too much."""

    def __post_init__(self) -> None:
        """Refuse tables that cannot be interpolated."""
        lengths = {len(self.samples), len(self.kept_bytes), len(self.workspace_bytes)}
        if lengths != {len(self.samples)} or not self.samples:
            raise ValueError("samples, kept_bytes and workspace_bytes need the same length")
        if list(self.samples) != sorted(set(self.samples)):
            raise ValueError("samples must rise")


class MeasuredMemory(Value, frozen=True, kw_only=True):
    """What the memory profiler found of a layer kind, at the kind's sequence length and dtype."""

    provenance: Provenance
    """Of the devices compiled for; they need not have been there."""
    fused_attention: bool = False
    """Attention was compiled as a fused kernel; else the scores were in memory."""
    tables: tuple[MemoryTable, ...]
    interpolation_error: NonNegative = 0.0
    """Largest relative error of what was compiled between fewer and more samples, as interpolated from these; 0 where
    nothing was."""


def check_rising(name: str, sizes: Sequence[float], times_s: Sequence[float]) -> None:
    """Raise for a table whose sizes do not rise or whose times fall."""
    if len(sizes) != len(times_s) or not sizes:
        raise ValueError(f"{name} and times_s need the same length")
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{name} must rise")
    if list(times_s) != sorted(times_s):
        raise ValueError(f"times_s must not fall while {name} rise")

"""What the profilers measured of a layer takes the place of the compute formulas.

Measured is one device's share of a layer under plain tensor parallelism, for a few degrees and numbers of samples. With
E the formula and M the measured seconds, at the measured degree tp' nearest (in ratio) to the strategy's,

    seconds(strategy, samples) = M(tp', samples) * E(strategy, samples) / E(tp', samples)

Where the strategy is the measured one the formulas cancel and the clock alone speaks. Elsewhere (sequence parallelism,
Ulysses, a degree nobody measured) the formula only scales the nearest measurement by the work that the strategy adds or
saves, so that measured and estimated strategies compete on the same ground. Recomputation that was not measured is
scaled by what the clock said of the forward pass, for the same reason.

Between two numbers of samples seconds are linear in them: each sample adds the same work. Beyond the last the line goes
on; below the first it is the line down to one sample's floor, never below proportion. The profile states the largest
error of such an interpolation (``Measured.interpolation_error``).

A measurement counts on the device that it names and with attention run the same way (fused or not), nowhere else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import log
from typing import TypeVar

from ..measured import Measured, MeasuredMemory, Pass, PassTable
from ..profile import HardwareProfile, LayerKind
from ..strategy import Strategy
from ._kind import is_fused

Table = TypeVar("Table", Measured, MeasuredMemory)

Estimate = Callable[[Strategy, int], float]
"""Formula seconds of a pass: (strategy, samples of the microbatch over all its devices)."""


def is_measured(kind: LayerKind, hardware: HardwareProfile) -> bool:
    """Tell whether the compute of ``kind`` on ``hardware`` was measured."""
    return valid_measurement(kind, hardware) is not None


def valid_measurement(kind: LayerKind, hardware: HardwareProfile) -> Measured | None:
    """Return what was measured of ``kind`` on this kind of device, with attention run the same way; None otherwise."""
    return of_device(kind.measured, kind, hardware)


def of_device(table: Table | None, kind: LayerKind, hardware: HardwareProfile) -> Table | None:
    """Return what a profiler found of ``kind`` if it holds for this kind of device and its attention, else None."""
    if table is None or table.provenance.device != hardware.device:
        return None
    has_attention = any(dot.attention for dot in kind.dots)
    return table if not has_attention or table.fused_attention == is_fused(kind, hardware) else None


def pass_seconds(
    kind: LayerKind,
    hardware: HardwareProfile,
    what: Pass,
    strategy: Strategy,
    microbatch: int,
    estimate: Estimate,
    forward: Estimate | None = None,
) -> float:
    """Return the seconds that one device computes in one pass of a layer, measured where possible.

    Args:
        kind: The layer kind.
        hardware: The device.
        what: The pass.
        strategy: How the layer is spread.
        microbatch: Samples over all devices of the strategy.
        estimate: The formula for this pass.
        forward: The formula for the forward pass: scales a pass that runs forward again where it was not measured.
    """
    formula_s = estimate(strategy, microbatch)
    measured = valid_measurement(kind, hardware)
    if measured is None:
        return formula_s
    table, anchor = _nearest(measured, what, strategy.tp), estimate
    if table is None and forward is not None:
        table, anchor = _nearest(measured, "forward", strategy.tp), forward
    if table is None:
        return formula_s
    samples = max(1, microbatch // strategy.dp)
    measured_s, anchor_s = interpolate_samples(table, samples), anchor(Strategy(tp=table.tp), samples)
    return measured_s * formula_s / anchor_s if anchor_s > 0 else measured_s


def interpolate_samples(table: PassTable, samples: int) -> float:
    """Return the seconds of a pass over ``samples`` samples by ``table``."""
    x, y = table.samples, table.times_s
    if len(x) == 1 or samples <= x[0]:
        return _below(x, y, samples)
    i = min(bisect_right(x, samples), len(x) - 1)
    return y[i - 1] + (samples - x[i - 1]) * (y[i] - y[i - 1]) / (x[i] - x[i - 1])


def _below(x: Sequence[int], y: Sequence[float], samples: int) -> float:
    """Below the first number of samples (or with one only): along the first segment, at least in proportion."""
    proportional = y[0] * samples / x[0]
    if len(x) == 1:
        return proportional
    line = y[0] - (x[0] - samples) * (y[1] - y[0]) / (x[1] - x[0])
    return max(line, proportional)


def _nearest(measured: Measured, what: Pass, tp: int) -> PassTable | None:
    tables = measured.tables(what)
    return min(tables.values(), key=lambda table: abs(log(table.tp / tp)), default=None)

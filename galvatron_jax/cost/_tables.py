"""Measured tables of collectives: look-up, interpolation, extrapolation.

Between two sizes the time is a power law (linear in log size, log time). Beyond the largest size it grows by the last
segment's bytes/s. Below the smallest it follows the first segment's line down, but never below the time in proportion
to the bytes. So the time never falls while the bytes rise.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from ..profile import CollectiveKind, CollectiveTable, HardwareProfile
from ._memo import remembered


@remembered
def nearest_table(
    hardware: HardwareProfile, kind: CollectiveKind, group: int, inside_node: bool
) -> CollectiveTable | None:
    """Return the table of ``kind`` whose group size is nearest to ``group`` (in ratio), None when there is none."""
    found = [t for t in hardware.collectives if t.kind == kind and t.inside_node == inside_node and t.group > 1]
    return min(found, key=lambda table: abs(math.log(table.group / group)), default=None)


def interpolate(table: CollectiveTable, size_bytes: float) -> float:
    """Return the seconds of a collective of ``size_bytes`` by ``table``."""
    x, y = table.sizes_bytes, table.times_s
    if size_bytes >= x[-1]:
        return y[-1] + (size_bytes - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])
    if size_bytes <= x[0]:
        line = y[0] - (x[0] - size_bytes) * (y[1] - y[0]) / (x[1] - x[0])
        return max(line, y[0] * size_bytes / x[0])
    i = bisect_right(x, size_bytes)
    slope = math.log(y[i] / y[i - 1]) / math.log(x[i] / x[i - 1])
    return float(y[i - 1] * (size_bytes / x[i - 1]) ** slope)

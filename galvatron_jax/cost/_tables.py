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
from ._portable import portable


@remembered
def nearest_table(
    hardware: HardwareProfile, kind: CollectiveKind, group: int, inside_node: bool, per_node: int | None = None
) -> CollectiveTable | None:
    """Return the table of ``kind`` that is nearest to a group, None when there is none.

    Args:
        hardware: With its tables.
        kind: The collective.
        group: Members: the nearest in ratio is taken.
        inside_node: Whether all of them share a node; only such tables count.
        per_node: Members on each node, of several: with that many, then of unknown placement, before others.
    """
    found = [t for t in hardware.collectives if t.kind == kind and t.inside_node == inside_node and t.group > 1]

    def distance(table: CollectiveTable) -> tuple[float, int]:
        elsewhere = 2 if table.per_node is not None else 1
        return abs(math.log(table.group / group)), 0 if table.per_node == per_node else elsewhere

    return min(found, key=distance, default=None)


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
    return portable(float(y[i - 1] * (size_bytes / x[i - 1]) ** slope))

"""Fits of measured times: monotone, and a straight line.

**Monotone.** The time of a collective never falls while its bytes rise, measured times sometimes do. Isotonic
regression finds the rising sequence f nearest to the measured y: the pool-adjacent-violators algorithm (Ayer et al.
1955; Best and Chakravarti 1990) merges neighbours whose centres fall and gives each block its centre: the mean for
sum (y - f)^2, the median for sum |y - f|. Both on log y, so that relative errors count alike at 1 KB and 256 MB;
linear time.

The median comes first and names outliers, points further than ``OUTLIER_RATIO`` from it, because one wild point moves
it little; the mean of what is left is the fit. A point that is too slow at the largest size alone stays: no later
point contradicts it.

**Line.** t = latency + size * seconds per byte, weighted by 1 / t (small sizes fix the latency, large ones the rate),
both kept from being negative.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

OUTLIER_RATIO = 1.5
"""Measured over fitted time (or the inverse) from which a point is an outlier: spells of a busy machine exceed it, the
steps between algorithms of one library do not appear, as they rise."""

Centre = Callable[[Sequence[float]], float]


class Point(NamedTuple):
    """A size (bytes or FLOP) and the seconds it takes."""

    size: float
    seconds: float


class MonotoneFit(NamedTuple):
    """A rising curve through measured points."""

    points: tuple[Point, ...]
    """Sizes rise, seconds never fall, and rise over the last two points: extrapolation has a slope."""
    outliers: tuple[Point, ...]
    """As measured, left out of the fit."""


class Line(NamedTuple):
    """Seconds = ``latency_s`` + size * ``seconds_per_byte``."""

    latency_s: float
    seconds_per_byte: float


def isotonic(values: Sequence[float], centre: Centre = statistics.fmean) -> list[float]:
    """Return the rising sequence nearest to ``values``, one value for each.

    Args:
        values: What was measured, in the order in which it should rise.
        centre: ``statistics.fmean`` for least squares, ``statistics.median_low`` for least absolute distance.
    """
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and centre(blocks[-2]) > centre(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [centre(block) for block in blocks for _ in block]


def monotone_fit(points: Sequence[Point]) -> MonotoneFit:
    """Return the rising curve through ``points`` with its outliers named.

    Args:
        points: At rising sizes, seconds above 0.
    """
    logs = [math.log(point.seconds) for point in points]
    robust = isotonic(logs, statistics.median_low)
    limit = math.log(OUTLIER_RATIO)
    far = {i for i, (log, fit) in enumerate(zip(logs, robust, strict=True)) if abs(log - fit) > limit}
    kept = [i for i in range(len(points)) if i not in far]
    fitted = isotonic([logs[i] for i in kept])
    curve = [Point(points[i].size, math.exp(fit)) for i, fit in zip(kept, fitted, strict=True)]
    return MonotoneFit(_rising_end(curve), tuple(points[i] for i in sorted(far)))


def fit_line(points: Sequence[Point]) -> Line:
    """Return the line through ``points`` (two at least) that is best in relative error, neither part negative."""
    size = np.array([point.size for point in points])
    time = np.array([point.seconds for point in points])
    columns = np.stack([1 / time, size / time], axis=1)
    latency_s, rate = (float(part) for part in np.linalg.lstsq(columns, np.ones(len(points)), rcond=None)[0])
    if latency_s < 0:
        return Line(0.0, _share(columns[:, 1]))
    if rate < 0:
        return Line(_share(columns[:, 0]), 0.0)
    return Line(latency_s, rate)


def _share(column: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Return c such that c * column is nearest to ones."""
    return float(column.sum() / (column @ column))


def _rising_end(curve: list[Point]) -> tuple[Point, ...]:
    """Return ``curve`` with a flat end made one point, in the middle of its sizes (in ratio)."""
    flat = [point for point in curve if point.seconds == curve[-1].seconds]
    if len(flat) == 1:
        return tuple(curve)
    size = math.exp(statistics.fmean(math.log(point.size) for point in flat))
    return (*curve[: -len(flat)], Point(size, flat[-1].seconds))

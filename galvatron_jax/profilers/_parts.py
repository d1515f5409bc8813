"""Parts of a hardware profile: fields, how each was measured, and notes; and what all parts need.

Corrections, on the seconds of one operation:

    loop, launch    one tiny kernel per trip takes t1 = loop + launch, n of them take tn = loop + n * launch
    operation       reading - loop / operations in a trip - tiny kernels beside it * launch
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..units import format_seconds
from ._fit import MonotoneFit, Point
from ._readings import LAUNCH, LOOP, Reading, Series, Subject
from ._text import format_si

_LEAST_SHARE = 0.2
"""Of a reading that corrections must leave: beyond it they are noise themselves."""

UNSTEADY_SPREAD = 0.5
"""Spread of a reading (see ``Slope``) above which it is named, and counts only where steady ones are missing."""

_ENOUGH_STEADY = 3
"""Steady readings of a series that make a curve without the unsteady ones."""

Fields = dict[str, Any]


class Part(NamedTuple):
    """Some fields of a profile."""

    fields: Fields
    how: dict[str, str]
    """How each was measured."""
    notes: list[str]


NOTHING = Part({}, {}, [])


def without_unsteady(readings: Mapping[Subject, Reading]) -> dict[Subject, Reading]:
    """Return the readings that curves go through: of each series the steady ones, or all when these are too few."""
    steady = {s: r for s, r in readings.items() if r.spread <= UNSTEADY_SPREAD}
    count = Counter(subject.series for subject in steady)
    return {s: r for s, r in readings.items() if s in steady or count[s.series] < _ENOUGH_STEADY}


class Overheads(NamedTuple):
    """Seconds that belong to the way of measuring."""

    loop_s: float
    launch_s: float

    def corrected(self, reading: Reading) -> float:
        """Return the seconds of one operation alone."""
        rest = reading.seconds - self.loop_s / reading.operations - reading.glue * self.launch_s
        return max(rest, _LEAST_SHARE * reading.seconds)


def find_overheads(known: Mapping[Subject, Reading]) -> Overheads:
    """Return the seconds of an empty trip and of a tiny kernel; 0 when they were not measured."""
    one, many = known.get(Subject(what=LOOP)), known.get(Subject(what=LAUNCH))
    if one is None or many is None:
        return Overheads(0.0, 0.0)
    if many.operations == 1:  # the compiler made one kernel of them: loop and launch can not be told apart
        return Overheads(0.0, min(one.seconds, many.seconds))
    launch_s = max(0.0, (many.seconds * many.operations - one.seconds) / (many.operations - 1))
    return Overheads(max(0.0, one.seconds - launch_s), launch_s)


def by_series(items: Iterable[tuple[Subject, float]]) -> dict[Series, list[Point]]:
    """Return the points of each series, sizes rising."""
    ordered = sorted(items, key=lambda item: (item[0].series, item[0].size))
    return {
        series: [Point(subject.size, seconds) for subject, seconds in part]
        for series, part in itertools.groupby(ordered, key=lambda item: item[0].series)
    }


def outlier_notes(label: str, fit: MonotoneFit, unit: str) -> list[str]:
    """Return a note for each outlier of ``fit``."""
    return [
        f"outlier left out: {label} at {format_si(p.size, unit)}: {format_seconds(p.seconds)}" for p in fit.outliers
    ]

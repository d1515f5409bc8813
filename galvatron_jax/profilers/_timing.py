"""Seconds of one operation, by the slope of a program that repeats it.

A program runs the operation in a loop of k trips, k given at run time. One call takes

    t(k) = call + k * trip

where ``call`` (dispatch, transfer of k, synchronisation) is 10 to 20 times a small collective, so one call tells
nothing about it. The slope does:

    trip = (min t(2k) - min t(k)) / k

over several repetitions. Disturbances by the system only ever add time, so the minimum is the estimate that they move
least. Not so where the operation itself varies from call to call, as messages over a network do (windows, segments and
waits fall differently each time): a step pays for all of them, and the minimum of twenty calls is a call that hardly
ever comes. There the medians take the place of the minima. The distance of both slopes is reported as the spread. k is
chosen so that k trips take a given time, long against the resolution and the jitter of the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from ..errors import GalvatronError

Timer = Callable[[int], float]
"""Seconds of one call with so many trips; 0 trips are allowed."""

Agree = Callable[[float], float]
"""Makes one number of those that several processes have: they must make the same calls with the same trips."""

MAX_TRIPS = 2**20
"""An end for the search of k when the operation takes no time at all."""

STEADY_SPREAD = 0.25
"""Spread (see ``Slope``) above which the measurement is made again, with longer calls."""

ATTEMPTS = 3
"""Measurements of one program at most; the steadiest counts."""

LONG_TARGETS = 8.0
"""Calls that take as many times the target already do not become longer."""


VERY_LONG_TARGETS = 25.0
"""Trips that take as many times the target (half a second) dwarf what a call costs: two of them are enough."""

_FIRST_TRIPS = 4
"""Before the repeated calls: warming up and choosing k."""


class MeasurementError(GalvatronError, RuntimeError):
    """One measurement that could not be made; the others go on."""

    exit_code = 4


class Clock(Protocol):
    """The only source of time: tests put a deterministic one in its place."""

    def now_s(self) -> float:
        """Return seconds since an arbitrary moment, never falling."""

    def today(self) -> str:
        """Return the date as ``"2026-11-22"``."""


class SystemClock:
    """The clock of this machine."""

    def now_s(self) -> float:
        """Return the seconds of the monotonic performance counter."""
        return time.perf_counter()

    def today(self) -> str:
        """Return the date, UTC."""
        return datetime.now(UTC).date().isoformat()


class Effort(NamedTuple):
    """How much time one measurement may take."""

    target_s: float
    """Duration of the k trips."""
    repeats: int
    """Pairs of calls, with k and with 2k trips."""
    varies: bool = False
    """The operation itself takes now less, now more: the middle counts, not the least."""

    def is_long(self, trip_s: float) -> bool:
        """Tell whether a trip of ``trip_s`` seconds is so long that one call beside an empty one tells it."""
        return trip_s > VERY_LONG_TARGETS * self.target_s

    def trips_of(self, trip_s: float) -> int:
        """Return about how many trips measuring one of ``trip_s`` seconds takes, when it is longer than the target."""
        return 3 if self.is_long(trip_s) else _FIRST_TRIPS + 3 * self.repeats


class Slope(NamedTuple):
    """Seconds of one trip."""

    seconds: float
    spread: float
    """Distance between the slopes of the minima and of the medians, as a share of the one that counts."""
    trips: int
    """k."""


def alone(number: float) -> float:
    """Return ``number``: what a single process agrees on with itself."""
    return number


def measure_slope(timer: Timer, effort: Effort, agree: Agree = alone) -> Slope:
    """Return the seconds of one trip.

    Args:
        timer: Calls the program with a number of trips.
        effort: Duration and number of the calls.
        agree: With the other processes, which measure the same program.

    Raises:
        MeasurementError: twice the trips took no longer, after all attempts.
    """
    timer(1)  # allocations, communicators, code pages
    trips, trip_s = _choose_trips(timer, effort.target_s, agree)
    if effort.is_long(trip_s):
        again_s = agree(timer(1))
        middle_s = (trip_s + again_s) / 2
        return Slope(middle_s if effort.varies else min(trip_s, again_s), abs(trip_s - again_s) / trip_s, 1)
    best: Slope | None = None
    for _ in range(ATTEMPTS):
        # by turns, so that a slow spell of the machine meets both
        times = [(timer(trips), timer(2 * trips)) for _ in range(effort.repeats)]
        slope = _slope(times, trips, effort, agree)
        if slope is not None and (best is None or slope.spread < best.spread):
            best = slope
        if best is not None and best.spread <= STEADY_SPREAD:
            break
        if agree(min(times)[0]) < LONG_TARGETS * effort.target_s:
            trips *= 2
    if best is None:
        raise MeasurementError(
            "took no longer with twice the repetitions",
            expected="a time that rises with the work",
            action="measure again on an idle machine",
        )
    return best


def _slope(times: list[tuple[float, float]], trips: int, effort: Effort, agree: Agree) -> Slope | None:
    """Return the slope of pairs of calls with k and 2k trips, None when it is not positive."""
    once, twice = zip(*times, strict=True)
    least = agree((min(twice) - min(once)) / trips)
    middle = agree((statistics.median(twice) - statistics.median(once)) / trips)
    slope = middle if effort.varies else least
    return Slope(slope, abs(middle - least) / slope, trips) if slope > 0 else None


def _choose_trips(timer: Timer, target_s: float, agree: Agree) -> tuple[int, float]:
    """Return k such that k trips take about ``target_s`` seconds, at least 1; and about how long one takes."""
    call_s = min(timer(0), timer(0))
    trips = 1
    while trips < MAX_TRIPS:
        work_s = agree(timer(trips) - call_s)
        if work_s >= target_s / 4:
            return min(MAX_TRIPS, max(1, round(trips * target_s / work_s))), work_s / trips
        trips *= 4
    return MAX_TRIPS, 0.0

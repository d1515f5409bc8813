"""Work through an agenda within a time budget: build, time, record, go on when one subject fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from ..units import KIB, format_seconds
from ._readings import Reading, Subject
from ._timing import Agree, Clock, Effort, MeasurementError, alone, measure_slope

_SLOW_SHARE = 1 / 10
"""Share of the budget that one subject may be expected to take: all groups have to fit in."""

_LATENCY_BYTES = 64 * KIB
"""Assumed: up to this size a collective takes as long as an empty one, or not much longer."""


class Program(Protocol):
    """What the runner needs of a ``Loop``."""

    @property
    def operations(self) -> int:
        """Operations in one trip."""

    @property
    def glue(self) -> int:
        """Tiny kernels beside each operation."""

    @property
    def products(self) -> int:
        """Products beside each all-reduce."""

    @property
    def flops(self) -> float:
        """FLOP of one trip, as the compiler counts them."""

    def run(self, trips: int, /) -> None:
        """Do so many trips and wait for them."""


class Progress(NamedTuple):
    """How far the runner is."""

    subject: Subject
    done: int
    total: int
    left_s: float
    """At the pace so far, never more than the budget leaves."""


class Outcome(NamedTuple):
    """What came of an agenda."""

    readings: tuple[Reading, ...]
    failed: dict[Subject, str]
    """Subjects that could not be measured, and why."""
    skipped: dict[Subject, str]
    """Subjects for which the budget was too short."""


def _ignore(_: object) -> None:
    pass


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Measures subjects one after the other."""

    build: Callable[[Subject, Mapping[Subject, Reading]], Program]
    clock: Clock
    effort: Effort
    budget_s: float
    agree: Agree = alone
    record: Callable[[Sequence[Reading]], None] = _ignore
    """Called with all readings after each new one."""
    show: Callable[[Progress], None] = _ignore

    def measure(self, agenda: Sequence[Subject], known: Sequence[Reading] = ()) -> Outcome:
        """Return readings of the subjects of ``agenda`` that the budget allows.

        Args:
            agenda: Most needed first; sizes of one series rising within a round.
            known: Readings from an earlier run, which are not taken again.
        """
        readings = {reading.subject: reading for reading in known}
        failed: dict[Subject, str] = {}
        skipped: dict[Subject, str] = {}
        todo = [subject for subject in agenda if subject not in readings]
        start_s = self.clock.now_s()
        for done, subject in enumerate(todo):
            spent_s = self.agree(self.clock.now_s() - start_s)
            left_s = self.budget_s - spent_s
            expected_s = self._expected_s(subject, readings)
            if expected_s > min(left_s, self.budget_s * _SLOW_SHARE) or left_s <= 0:
                skipped[subject] = f"would take about {format_seconds(expected_s)}" if left_s > 0 else "no time left"
                continue
            pace_s = spent_s / done if done else 0.0
            self.show(Progress(subject, done, len(todo), min(left_s, pace_s * (len(todo) - done))))
            try:
                readings[subject] = self._reading(subject, readings)
            except MeasurementError as error:
                failed[subject] = error.problem
            else:
                self.record(tuple(readings.values()))
        return Outcome(tuple(readings.values()), failed, skipped)

    def _reading(self, subject: Subject, readings: Mapping[Subject, Reading]) -> Reading:
        program = self.build(subject, readings)

        def timer(trips: int) -> float:
            start_s = self.clock.now_s()
            program.run(trips)
            return self.clock.now_s() - start_s

        slope = measure_slope(timer, self.effort._replace(varies=subject.has_partners), self.agree)
        return Reading(
            subject=subject,
            seconds=slope.seconds / program.operations,
            spread=slope.spread,
            operations=program.operations,
            glue=program.glue,
            products=program.products,
            flops=program.flops / program.operations,
        )

    def _expected_s(self, subject: Subject, readings: Mapping[Subject, Reading]) -> float:
        """Return a guess from the next smaller size of the same series, at its seconds per byte; 0 without one."""
        smaller = [r for s, r in readings.items() if s.series == subject.series and s.size < subject.size]
        if not smaller:
            return 0.0
        nearest = max(smaller, key=lambda reading: reading.subject.size)
        growth = max(subject.size, _LATENCY_BYTES) / max(nearest.subject.size, _LATENCY_BYTES)
        trip_s = nearest.seconds * nearest.operations * growth
        return max(trip_s, self.effort.target_s) * self.effort.trips_of(trip_s)

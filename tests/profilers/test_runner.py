from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from galvatron_jax.profilers._readings import Reading, Subject
from galvatron_jax.profilers._runner import Progress, Runner
from galvatron_jax.profilers._timing import Effort, MeasurementError

from .fakes import FakeClock, FakeProgram

EFFORT = Effort(target_s=0.01, repeats=3)
SIZES = (1 << 10, 1 << 20, 1 << 22)
AGENDA = tuple(Subject(what="all-gather", size=size, group=group) for size in SIZES for group in (2, 8))
SECONDS_PER_BYTE = 1e-9


class Machine:
    """Builds fake programs: 8 operations in a trip, 10 us and 1 ns per byte each; building takes ``build_s``."""

    def __init__(self, build_s: float = 0.0) -> None:
        self.clock = FakeClock()
        self.build_s = build_s
        self.built: list[Subject] = []

    def build(self, subject: Subject, readings: Mapping[Subject, Reading]) -> FakeProgram:
        self.built.append(subject)
        self.clock.time_s += self.build_s
        trip_s = 8 * (1e-5 + subject.size * SECONDS_PER_BYTE)
        return FakeProgram(self.clock, trip_s, call_s=1e-3, operations=8, glue=1)

    def runner(self, budget_s: float = 1e6) -> Runner:
        return Runner(build=self.build, clock=self.clock, effort=EFFORT, budget_s=budget_s)


def test_measure_returns_seconds_of_one_operation() -> None:
    outcome = Machine().runner().measure(AGENDA)
    assert [reading.subject for reading in outcome.readings] == list(AGENDA)
    for reading in outcome.readings:
        assert reading.seconds == pytest.approx(1e-5 + reading.subject.size * SECONDS_PER_BYTE, rel=1e-8)
        assert (reading.operations, reading.glue) == (8, 1)
    assert not outcome.failed
    assert not outcome.skipped


def test_measure_does_not_take_known_readings_again() -> None:
    machine = Machine()
    known = machine.runner().measure(AGENDA[:4]).readings
    machine.built.clear()
    outcome = machine.runner().measure(AGENDA, known)
    assert machine.built == list(AGENDA[4:])
    assert [reading.subject for reading in outcome.readings] == list(AGENDA)


def test_measure_records_after_each_reading() -> None:
    machine, lengths = Machine(), []

    def record(readings: Sequence[Reading]) -> None:
        lengths.append(len(readings))

    Runner(build=machine.build, clock=machine.clock, effort=EFFORT, budget_s=1e6, record=record).measure(AGENDA)
    assert lengths == [1, 2, 3, 4, 5, 6]


def test_measure_goes_on_when_one_subject_fails() -> None:
    machine = Machine()

    def build(subject: Subject, readings: Mapping[Subject, Reading]) -> FakeProgram:
        if subject == AGENDA[1]:
            raise MeasurementError("out of memory")
        return machine.build(subject, readings)

    outcome = Runner(build=build, clock=machine.clock, effort=EFFORT, budget_s=1e6).measure(AGENDA)
    assert outcome.failed == {AGENDA[1]: "out of memory"}
    assert len(outcome.readings) == len(AGENDA) - 1


def test_measure_stays_within_the_budget() -> None:
    machine = Machine(build_s=1.0)
    start_s = machine.clock.now_s()
    outcome = machine.runner(budget_s=3.5).measure(AGENDA)
    assert len(outcome.readings) == 4
    assert set(outcome.skipped) == set(AGENDA[4:])
    assert machine.clock.now_s() - start_s < 3.5 + 1.5


def test_measure_leaves_out_what_would_take_too_long() -> None:
    machine = Machine()
    huge = Subject(what="all-gather", size=1 << 34, group=2)  # 8 x 17 s for one trip
    outcome = machine.runner(budget_s=60.0).measure([*AGENDA, huge])
    assert list(outcome.skipped) == [huge]
    assert "would take about" in outcome.skipped[huge]
    assert len(outcome.readings) == len(AGENDA)


def test_small_sizes_are_never_left_out_for_their_ratio() -> None:
    slow = FakeClock()
    agenda = [Subject(what="all-to-all", size=size, group=8) for size in (1 << 10, 1 << 16)]
    runner = Runner(
        build=lambda subject, readings: FakeProgram(slow, 2e-3, operations=8), clock=slow, effort=EFFORT, budget_s=10.0
    )
    assert len(runner.measure(agenda).readings) == 2


def test_progress_counts_up_and_time_left_falls() -> None:
    machine, seen = Machine(build_s=2.0), []

    def show(progress: Progress) -> None:
        seen.append(progress)

    Runner(build=machine.build, clock=machine.clock, effort=EFFORT, budget_s=100.0, show=show).measure(AGENDA)
    assert [progress.done for progress in seen] == list(range(6))
    left_s = [progress.left_s for progress in seen[1:]]
    assert left_s == sorted(left_s, reverse=True)
    assert 2.0 < left_s[-1] < 3.0


def test_durations_are_agreed_on_with_the_other_processes() -> None:
    machine = Machine()
    runner = Runner(
        build=machine.build, clock=machine.clock, effort=EFFORT, budget_s=1e6, agree=lambda seconds: 2 * seconds
    )
    plain, agreed = Machine().runner().measure(AGENDA), runner.measure(AGENDA)
    for one, two in zip(plain.readings, agreed.readings, strict=True):
        assert two.seconds == pytest.approx(2 * one.seconds, rel=1e-8)

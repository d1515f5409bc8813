from __future__ import annotations

import math

import pytest

from galvatron_jax.profilers._timing import MAX_TRIPS, Effort, MeasurementError, SystemClock, measure_slope

from .fakes import FakeClock, FakeProgram

EFFORT = Effort(target_s=0.02, repeats=5)


@pytest.mark.parametrize("trip_s", [3e-7, 5e-5, 2e-3, 0.4])
@pytest.mark.parametrize("call_s", [0.0, 1e-3, 0.05])
def test_slope_of_steady_program_is_its_trip_whatever_the_call_costs(trip_s: float, call_s: float) -> None:
    program = FakeProgram(FakeClock(), trip_s, call_s=call_s)
    slope = measure_slope(program.timer, EFFORT)
    assert slope.seconds == pytest.approx(trip_s, rel=1e-8)
    assert slope.spread < 1e-6


@pytest.mark.parametrize("trip_s", [3e-7, 5e-5, 2e-3])
def test_trips_fill_the_target_time(trip_s: float) -> None:
    slope = measure_slope(FakeProgram(FakeClock(), trip_s, call_s=1e-3).timer, EFFORT)
    assert slope.trips * trip_s == pytest.approx(EFFORT.target_s, rel=0.06)


def test_slow_operation_is_called_once_and_twice_only() -> None:
    program = FakeProgram(FakeClock(), 0.3)
    assert measure_slope(program.timer, EFFORT).trips == 1
    assert max(program.calls) == 2


def test_outliers_in_some_calls_do_not_change_the_slope() -> None:
    warm, delays = [0.0] * 4, [0.0, 0.7, 0.3, 0.0, 0.0, 0.0, 0.9, 0.9, 0.0, 0.0]  # warm-up, two empty, choice of k
    program = FakeProgram(FakeClock(), 0.02, call_s=1e-3, delays_s=[*warm, *delays])
    assert measure_slope(program.timer, EFFORT).seconds == pytest.approx(0.02, rel=1e-8)


def test_operation_that_varies_counts_with_its_middle() -> None:
    """Messages over a network: one call in five is quick by chance, most pay a wait, one pays many."""
    warm, delays = [0.0] * 4, [4e-3, 8e-3, 0, 8e-3, 4e-3, 0, 4e-3, 8e-3, 0.05, 0.09]  # once and twice, by turns
    slopes = {
        varies: measure_slope(
            FakeProgram(FakeClock(), 0.02, call_s=1e-3, delays_s=[*warm, *delays]).timer, EFFORT._replace(varies=varies)
        )
        for varies in (False, True)
    }
    assert slopes[False].seconds == pytest.approx(0.02, rel=1e-8)
    assert slopes[True].seconds == pytest.approx(0.024, rel=1e-8)
    assert slopes[True].spread == pytest.approx(1 / 6)


def test_very_long_operation_that_varies_is_the_mean_of_two_calls() -> None:
    program = FakeProgram(FakeClock(), trip_s=2.0, call_s=1e-3, delays_s=[0.0, 0.0, 0.0, 0.1])
    slope = measure_slope(program.timer, EFFORT._replace(varies=True))
    assert slope.seconds == pytest.approx(2.05, rel=1e-3)


def test_first_call_is_a_warm_up() -> None:
    program = FakeProgram(FakeClock(), 0.02, delays_s=[30.0])
    assert measure_slope(program.timer, EFFORT).seconds == pytest.approx(0.02, rel=1e-8)


def test_unsteady_calls_are_made_again_and_longer() -> None:
    warm, spell = [0.0] * 4, [0.0, 0.3, 0.0, 0.5, 0.0, 0.7, 0.0, 0.9, 0.0, 1.1]  # every second call is slow
    program = FakeProgram(FakeClock(), 0.02, delays_s=[*warm, *spell])
    slope = measure_slope(program.timer, EFFORT)
    assert slope.seconds == pytest.approx(0.02, rel=1e-8)
    assert len(program.calls) == 4 + 4 * EFFORT.repeats
    assert max(program.calls) == 4


def test_program_that_takes_no_time_raises() -> None:
    program = FakeProgram(FakeClock(), 0.0, call_s=1e-3)
    with pytest.raises(MeasurementError, match="took no longer"):
        measure_slope(program.timer, EFFORT)
    assert max(program.calls) == 8 * MAX_TRIPS  # twice the trips, which two more attempts doubled


def test_system_clock_goes_forward() -> None:
    clock = SystemClock()
    assert math.isfinite(clock.now_s())
    assert clock.now_s() <= clock.now_s()
    assert len(clock.today().split("-")) == 3


def test_very_long_trip_is_measured_by_two_calls() -> None:
    """A slow network: hundreds of milliseconds for one collective."""
    clock = FakeClock()
    program = FakeProgram(clock, trip_s=2.0, call_s=1e-3, delays_s=[0.0, 0.0, 0.0, 0.1])
    slope = measure_slope(program.timer, EFFORT)
    assert slope.seconds == pytest.approx(2.0, rel=0.01)
    assert slope.spread == pytest.approx(0.05, abs=0.005)
    assert sum(program.calls) == 3

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.profilers._fit import Centre, Point, fit_line, isotonic, monotone_fit

VALUES = st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=7)


def squares(values: Sequence[float], fit: Sequence[float]) -> float:
    return sum((v - f) ** 2 for v, f in zip(values, fit, strict=True))


def distances(values: Sequence[float], fit: Sequence[float]) -> float:
    return sum(abs(v - f) for v, f in zip(values, fit, strict=True))


def brute_force(
    values: Sequence[float], centre: Centre, loss: Callable[[Sequence[float], Sequence[float]], float]
) -> float:
    """Least loss over all ways to cut ``values`` into blocks that take their centres, where these rise."""
    best = math.inf
    for cuts in itertools.product([False, True], repeat=len(values) - 1):
        blocks = [[values[0]]]
        for value, cut in zip(values[1:], cuts, strict=True):
            if cut:
                blocks.append([])
            blocks[-1].append(value)
        fit = [centre(block) for block in blocks for _ in block]
        if fit == sorted(fit):
            best = min(best, loss(values, fit))
    return best


@given(VALUES)
def test_isotonic_by_means_is_the_least_squares_optimum(values: list[float]) -> None:
    fit = isotonic(values)
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(fit))
    assert squares(values, fit) == pytest.approx(brute_force(values, statistics.fmean, squares), abs=1e-9)


@given(VALUES)
def test_isotonic_by_medians_is_the_least_distance_optimum(values: list[float]) -> None:
    fit = isotonic(values, statistics.median_low)
    assert fit == sorted(fit)
    assert distances(values, fit) == brute_force(values, statistics.median_low, distances)


def test_isotonic_keeps_rising_values() -> None:
    assert isotonic([1.0, 2.0, 2.0, 5.0]) == [1.0, 2.0, 2.0, 5.0]


def test_monotone_fit_names_the_spike_and_keeps_the_rest() -> None:
    # notes/runtime.md: 8-way reduce-scatter on CPU, 16 KB took 225 us and 256 KB took 80 us
    points = [Point(1e3, 60e-6), Point(16e3, 225e-6), Point(64e3, 70e-6), Point(256e3, 80e-6), Point(1e6, 300e-6)]
    fit = monotone_fit(points)
    assert fit.outliers == (points[1],)
    assert [point.size for point in fit.points] == [1e3, 64e3, 256e3, 1e6]
    assert [point.seconds for point in fit.points] == pytest.approx([60e-6, 70e-6, 80e-6, 300e-6])


def test_monotone_fit_pools_small_noise_to_the_geometric_mean() -> None:
    fit = monotone_fit([Point(1, 1.0), Point(2, 1.21), Point(4, 1.0), Point(8, 3.0)])
    assert not fit.outliers
    assert [point.seconds for point in fit.points] == pytest.approx([1.0, 1.1, 1.1, 3.0])


def test_monotone_fit_makes_a_flat_end_one_point() -> None:
    fit = monotone_fit([Point(1, 1.0), Point(4, 3.0), Point(16, 2.7)])
    assert [point.size for point in fit.points] == pytest.approx([1, 8])


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12))
def test_monotone_fit_always_rises_at_the_end(seconds: list[float]) -> None:
    points = monotone_fit([Point(2.0**i, s) for i, s in enumerate(seconds)]).points
    times = [point.seconds for point in points]
    sizes = [point.size for point in points]
    assert sizes == sorted(set(sizes))
    assert times == sorted(times)
    assert len(times) == 1 or times[-2] < times[-1]


@given(st.floats(1e-6, 1e-3), st.floats(1e-12, 1e-8))
def test_fit_line_recovers_latency_and_rate(latency_s: float, seconds_per_byte: float) -> None:
    line = fit_line([Point(size, latency_s + size * seconds_per_byte) for size in (1e3, 1e5, 1e7)])
    assert line.latency_s == pytest.approx(latency_s, rel=1e-3)
    assert line.seconds_per_byte == pytest.approx(seconds_per_byte, rel=1e-3)


def test_fit_line_never_gives_a_negative_part() -> None:
    steep = fit_line([Point(1, 0.1), Point(2, 4.0), Point(3, 9.0)])
    falling = fit_line([Point(1, 3.0), Point(2, 2.0)])
    assert steep.latency_s == 0
    assert steep.seconds_per_byte > 0
    assert falling.seconds_per_byte == 0
    assert 2.0 <= falling.latency_s <= 3.0

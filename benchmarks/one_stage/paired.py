"""Two step functions timed against each other on a machine whose speed wanders.

Steps come in fours, A B B A and B A A B in turn: a drift that is linear over four steps falls out of the sum of each
side. The ratio is taken four by four. What one start of the process gives both programs for its whole life (addresses
of their code and buffers) does not fall out, however many fours it takes: so several processes are started, which build
the two sides in changing order, and the bootstrap draws processes first, then fours of each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

WARM_UP, RESAMPLES, COVERED = 3, 4000, 0.95

Step = Callable[[], None]
"""Takes one step and waits for it."""


def paired_times(a: Step, b: Step, fours: int) -> list[tuple[float, float]]:
    """Return the mean seconds of a step of ``a`` and of ``b`` in each of ``fours``."""
    for _ in range(WARM_UP):
        a()
        b()
    return [_four(a, b) if turn % 2 else _four(b, a)[::-1] for turn in range(fours)]


def pooled(starts: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Return median seconds of both sides, and the median ratio a / b with its quartiles and bootstrap interval.

    Args:
        starts: What ``paired_times`` gave in each process, the same number of fours in each.
    """
    found = np.array(starts)
    ratios = found[..., 0] / found[..., 1]
    low, middle, high = statistics.quantiles(ratios.ravel().tolist(), n=4)
    rng, (processes, fours) = np.random.default_rng(0), ratios.shape
    drawn = ratios[rng.integers(processes, size=(RESAMPLES, processes))]
    drawn = np.take_along_axis(drawn, rng.integers(fours, size=drawn.shape), axis=2)
    interval = np.quantile(np.median(drawn, axis=(1, 2)), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return {
        "starts": processes,
        "fours": fours,
        "a_s": float(np.median(found[..., 0])),
        "b_s": float(np.median(found[..., 1])),
        "ratio_median": middle,
        "ratio_by_start": np.median(ratios, axis=1).tolist(),
        "ratio_quartiles": [low, high],
        "ratio_interval_95": interval.tolist(),
    }


def _four(outer: Step, inner: Step) -> tuple[float, float]:
    """Return the mean seconds of a step of each: outer, inner, inner, outer."""
    seconds = [_seconds(step) for step in (outer, inner, inner, outer)]
    return (seconds[0] + seconds[3]) / 2, (seconds[1] + seconds[2]) / 2


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start

"""Two step functions timed against each other on a machine whose speed wanders.

Steps come in fours, A B B A and B A A B in turn: a drift that is linear over four steps falls out of the sum of each
side. The ratio is taken four by four, and its median is given with the interval that a bootstrap over the fours gives.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WARM_UP, RESAMPLES, COVERED = 3, 4000, 0.95

Step = Callable[[], None]
"""Takes one step and waits for it."""


def paired_times(a: Step, b: Step, fours: int) -> dict[str, Any]:
    """Return median seconds of both, and the median ratio a / b with its quartiles and bootstrap interval."""
    for _ in range(WARM_UP):
        a()
        b()
    found = np.array([_four(a, b) if turn % 2 else _four(b, a)[::-1] for turn in range(fours)]) / 2
    ratios = found[:, 0] / found[:, 1]
    low, middle, high = statistics.quantiles(ratios.tolist(), n=4)
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, fours))
    interval = np.quantile(np.median(drawn, axis=1), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return {
        "fours": fours,
        "a_s": statistics.median(found[:, 0].tolist()),
        "b_s": statistics.median(found[:, 1].tolist()),
        "ratio_median": middle,
        "ratio_quartiles": [low, high],
        "ratio_interval_95": interval.tolist(),
    }


def _four(outer: Step, inner: Step) -> tuple[float, float]:
    """Return the seconds of two steps of each: outer, inner, inner, outer."""
    seconds = [_seconds(step) for step in (outer, inner, inner, outer)]
    return seconds[0] + seconds[3], seconds[1] + seconds[2]


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start

"""Goodput: the share of the wall clock that went into steps which count.

wall = setup (analysis, search, compilation, restore) + steps + data (waiting for a batch) + checkpoint (what blocked
       training) + evaluation + other
lost = steps that an earlier attempt had done after its last checkpoint, and the time until this one began
goodput = steps / (wall + lost)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

LEAST_SHARE = 0.005
"""Smaller ones are not told."""

Category = Literal["setup", "steps", "data", "checkpoint", "evaluation"]


def describe(summary: Mapping[str, float]) -> str:
    """Say in one line where the time went: the shares of the wall clock and of what was lost before it."""
    whole_s = max(summary["wall"] + summary["lost"], 1e-9)
    others = ("setup", "data", "checkpoint", "evaluation", "other", "lost")
    shares = [f"{name} {summary[name] / whole_s:.0%}" for name in others if summary[name] / whole_s >= LEAST_SHARE]
    return f"goodput {summary['goodput']:.0%}" + f" ({', '.join(shares)})" * bool(shares)


class Goodput:
    """Seconds by category."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin now."""
        self._clock, self._start = clock, clock()
        self.seconds: dict[str, float] = dict.fromkeys(("setup", "steps", "data", "checkpoint", "evaluation"), 0.0)
        self.lost_s = 0.0

    def add(self, category: Category, duration_s: float) -> None:
        """Count some seconds."""
        self.seconds[category] += duration_s

    @contextlib.contextmanager
    def measure(self, category: Category) -> Iterator[None]:
        """Count the block."""
        start = self._clock()
        try:
            yield
        finally:
            self.add(category, self._clock() - start)

    def summary(self) -> dict[str, float]:
        """Return seconds by category, the rest, what was lost, and the goodput (0 to 1)."""
        wall_s = self._clock() - self._start
        other_s = max(0.0, wall_s - sum(self.seconds.values()))
        good = self.seconds["steps"] / max(wall_s + self.lost_s, 1e-9)
        return {**self.seconds, "other": other_s, "lost": self.lost_s, "wall": wall_s, "goodput": min(good, 1.0)}

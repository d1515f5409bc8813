"""Goodput: the share of the wall clock that went into steps which count.

wall = setup (analysis, search, compilation, restore) + steps + data (waiting for a batch) + checkpoint (what blocked
       training) + evaluation + other
lost = steps that an earlier attempt had done after its last checkpoint, and the time until this one began
goodput = steps / (wall + lost)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

Category = Literal["setup", "steps", "data", "checkpoint", "evaluation"]


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

"""The least memory of the fullest stage of a pipeline, over all boundaries.

**Farthest ends.** What a stage needs rises with every layer. So for a limit, the latest layer at which stage ``s`` can
begin is where the stages before it end when each takes all it can, and the earliest follows likewise from the end of
the model; with the smallest message for every boundary both hold for every plan within the limit. Is the latest
beginning of "stage S" not the end of the model, none exists.

**Windows.** Bisect the limit by what can be cut that way, then choose among the few beginnings between the earliest and
the latest by dynamic programming, with the true messages: ``rest[s](i) = min over j of max(peak[s](i, j),
rest[s + 1](j))``.

Complexity: O(stages) for a limit, and O(stages * window^2); a window is some layers wide once the limit is near.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..cost import boundary_bytes
from ..schedule import in_flight_microbatches
from ._engine import Candidate
from ._footprint import Footprint
from ._knapsack import Floats, Ints
from ._stage import ROUNDING

HALVINGS = 12
"""Steps of the bisection; more would make the windows no narrower."""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """The stages of one candidate."""

    footprint: Footprint
    in_flight: tuple[int, ...]
    """Microbatches, by stage."""
    microbatches: int
    poll: Callable[[], None]

    @classmethod
    def of(cls, footprint: Footprint, candidate: Candidate, poll: Callable[[], None]) -> Line:
        """Return the stages of ``candidate``; ``poll`` is called often and may raise to end the work."""
        slices = candidate.slices
        flights = (in_flight_microbatches(candidate.schedule, s, slices, candidate.microbatches) for s in range(slices))
        return cls(footprint, tuple(flights), candidate.microbatches, poll)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.in_flight)

    def least_peak(self, below: float) -> tuple[float, int] | None:
        """Return the least peak of the fullest stage and that stage; None when every peak is at least ``below``."""
        limit = float(np.nextafter(below, -np.inf))
        latest = self._latest(limit) if self._mean() * (1 - ROUNDING) <= limit else None
        if latest is None:
            return None
        limit, latest = self._tightened(limit, latest)
        windows = [np.arange(first, last + 1) for first, last in zip(self._earliest(limit), latest, strict=True)]
        tables, rests = self._tables(windows)
        return self._fullest(tables, rests) if rests[0][0] < below else None

    def _mean(self) -> float:
        """Lower bound on the mean over the stages: no more than one microbatch in flight, the least live layer."""
        one = self.footprint.least_menu()
        whole = self.footprint.ahead_LK[-1] @ one.smallest_KT[:, -1]
        return float(whole / self.stages + one.thresholds_T[0])

    def _tightened(self, limit: float, latest: list[int]) -> tuple[float, list[int]]:
        """Bisect the limit between what nothing fits and what some boundaries need."""
        even = [s * self.footprint.layers // self.stages for s in range(self.stages + 1)]
        lowest, high = 0.0, min(limit, self._peak(latest), self._peak(even))
        for _ in range(HALVINGS):
            middle = (lowest + high) / 2
            cuts = self._latest(middle)
            if cuts is None:
                lowest = middle
                continue
            lower = max(middle, self._peak(cuts))
            if lower >= high:
                break  # true messages are larger than the smallest one: no narrower this way
            high = lower
        found = self._latest(high)
        return (high, found) if found is not None else (limit, latest)

    def _latest(self, limit: float) -> list[int] | None:
        """Latest beginning of each stage, and the end of the model; None when no boundaries keep to the limit."""
        begins, layers = [0], self.footprint.layers
        for s in range(self.stages):
            self.poll()
            start, room = begins[-1], layers - (self.stages - 1 - s) - begins[-1]
            taken = _most(functools.partial(self._ends_within, limit, s, start), room, self._stride)
            if not taken:
                return None
            begins.append(start + taken)
        return begins if begins[-1] == layers else None

    def _earliest(self, limit: float) -> list[int]:
        """Earliest beginning of each stage, and the end of the model."""
        begins = [self.footprint.layers]
        for s in range(self.stages - 1, 0, -1):
            stop, room = begins[0], begins[0] - s
            taken = _most(functools.partial(self._begins_within, limit, s, stop), room, self._stride)
            begins.insert(0, stop - taken)
        return [0, *begins]

    @property
    def _stride(self) -> int:
        return 2 * -(-self.footprint.layers // self.stages) + 4

    def _tables(self, windows: list[Ints]) -> tuple[list[Floats], list[Floats]]:
        """Peaks by (beginning, end) of each stage, and the least peak from each beginning on, by stage."""
        tables: list[Floats] = []
        rests = [np.zeros(1)]
        for s in range(self.stages - 1, -1, -1):
            self.poll()
            table = self._peaks(s, windows[s][:, None], windows[s + 1][None, :])
            tables.insert(0, table)
            rests.insert(0, np.maximum(table, rests[0]).min(axis=1))
        return tables, rests

    def _fullest(self, tables: list[Floats], rests: list[Floats]) -> tuple[float, int]:
        at, peaks = 0, []
        for table, after in zip(tables, rests[1:], strict=True):
            stop = int(np.maximum(table[at], after).argmin())
            peaks.append(float(table[at, stop]))
            at = stop
        return max(peaks), int(np.argmax(peaks))

    def _peak(self, cuts: list[int]) -> float:
        """Peak of the fullest stage of some boundaries."""
        every = np.array(cuts)
        return max(float(self._peaks(s, every[s], every[s + 1])) for s in range(self.stages))

    def _ends_within(self, limit: float, s: int, start: int, layers: Ints) -> npt.NDArray[np.bool_]:
        return self._least(s, np.full_like(layers, start), start + layers) <= limit

    def _begins_within(self, limit: float, s: int, stop: int, layers: Ints) -> npt.NDArray[np.bool_]:
        return self._least(s, stop - layers, np.full_like(layers, stop)) <= limit

    def _least(self, s: int, start: Ints, stop: Ints) -> Floats:
        """Least bytes of stage ``s``, with the smallest message; rises with every layer."""
        inner = self.footprint.message_bytes_J[1:-1]
        return self._held(s, start, stop) + self._buffers(s, float(inner.min()) if len(inner) else 0.0)

    def _peaks(self, s: int, start: Ints, stop: Ints) -> Floats:
        """Least bytes of stage ``s`` by its layers; infinite where it has none."""
        messages = self.footprint.message_bytes_J[start if s else stop]
        peaks = self._held(s, start, stop) + self._buffers(s, 1.0) * messages
        return np.where(start < stop, peaks, np.inf)

    def _buffers(self, s: int, message_bytes: float) -> float:
        more = self.in_flight[s] < self.microbatches
        return 0.0 if self.stages == 1 else boundary_bytes(self.stages, s, message_bytes, goes_on=more)

    def _held(self, s: int, start: Ints, stop: Ints) -> Floats:
        ahead = self.footprint.ahead_LK
        counts = np.maximum(ahead[stop] - ahead[start], 0).astype(np.float64)
        peaks = self.footprint.peaks(self.in_flight[s], counts.reshape(-1, counts.shape[-1]))
        return peaks.reshape(counts.shape[:-1])


def _most(fits: Callable[[Ints], npt.NDArray[np.bool_]], most: int, stride: int) -> int:
    """Return the largest number up to ``most`` that fits; whatever is smaller than one that fits does too."""
    taken = 0
    while taken < most:
        tried = np.arange(taken + 1, min(taken + stride, most) + 1)
        good = int(np.count_nonzero(fits(tried)))
        taken += good
        if good < len(tried):
            break
    return taken

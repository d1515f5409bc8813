"""What the slices of a pipeline hold under given boundaries, when they are fullest, and what their messages cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from ..cost import Crossing, goes_on
from ..events import Event, global_order
from ..schedule import build_schedule, in_flight_microbatches, in_flight_units
from ._assignment import Assigner
from ._pricing import Prices, message_buffers
from ._space import Shape
from ._stage import Section, Span

SAME_AGAIN = 4
"""Groups of S microbatches after which an interleaved schedule only repeats itself: the fill takes less than two, the
drain as many (a test compares)."""


def fullest_moments(shape: Shape, microbatches: int, s: int) -> tuple[tuple[int, ...], ...]:
    """Return the fullest moments of slice ``s``, as microbatches in flight by chunk (``schedule.in_flight_units``)."""
    slices, schedule, chunks = shape
    if chunks == 1:
        return ((in_flight_microbatches(schedule, s, slices, microbatches),),)
    return _interleaved_moments(s, slices, min(microbatches, SAME_AGAIN * slices), chunks)


def fills_on(shape: Shape, microbatches: int, s: int) -> bool:
    """Return whether slice ``s`` has forward passes left when it is fullest."""
    return goes_on(shape.schedule, s, shape.slices, microbatches, shape.chunks)


@functools.lru_cache(maxsize=4096)
def _interleaved_moments(s: int, slices: int, microbatches: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    return tuple(sorted(in_flight_units("interleaved-1f1b", s, slices, microbatches, chunks), reverse=True))


@dataclass(slots=True, eq=False)
class Slices:
    """One (microbatches, shape) at one set of prices."""

    prices: Prices
    assigner: Assigner
    shape: Shape
    microbatches: int
    _order: tuple[Event, ...] = ()
    _held: tuple[tuple[int, ...], dict[int, Span]] = field(default_factory=lambda: ((), {}))
    """Spans of the boundaries asked for last."""

    @property
    def order(self) -> tuple[Event, ...]:
        """All events of a step, made when they are first needed: they are many."""
        if not self._order:
            slices, schedule, chunks = self.shape
            self._order = global_order(build_schedule(schedule, slices, self.microbatches, chunks), self.shape.stages)
        return self._order

    def crossings(self, boundaries: tuple[int, ...]) -> list[Crossing]:
        """Return a message over each boundary."""
        prices, slices = self.prices, self.shape.slices
        return [prices.crossing(k % slices, j) for k, j in enumerate(boundaries[1:-1])]

    def span(self, s: int, boundaries: tuple[int, ...]) -> Span:
        """Return what slice ``s`` holds."""
        if self._held[0] != boundaries:
            self._held = boundaries, {}
        spans = self._held[1]
        if s not in spans:
            spans[s] = self._made_span(s, boundaries)
        return spans[s]

    def _made_span(self, s: int, boundaries: tuple[int, ...]) -> Span:
        stages = range(s, self.shape.stages, self.shape.slices)
        more = fills_on(self.shape, self.microbatches, s)
        buffers = sum(
            message_buffers(self.prices, self.shape.stages, k, (boundaries[k], boundaries[k + 1]), goes_on=more)
            for k in stages
        )
        return Span(
            tuple(self._section(k, boundaries) for k in stages),
            fullest_moments(self.shape, self.microbatches, s),
            buffers,
        )

    def _section(self, k: int, boundaries: tuple[int, ...]) -> Section:
        """What stage ``k`` holds."""
        start, stop = boundaries[k], boundaries[k + 1]
        runs: list[tuple[int, int]] = []
        for kind in self.prices.order[start:stop].tolist():
            last = runs.pop() if runs and runs[-1][0] == kind else (kind, 0)
            runs.append((kind, last[1] + 1))
        follows = int(self.prices.order[stop]) if stop < len(self.prices.order) else -1
        return Section(tuple(runs), k > 0, follows)

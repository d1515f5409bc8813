"""In which layouts a stage's layers may stand, in order: all patterns, the most promising first.

A stage is runs of layers of one kind. A *pattern* gives each run a list of *stops*, the layouts (tp, sp) that its
layers pass through; every stop holds at least one layer, and each change between neighbours costs a relayout.

**Bound.** Let ``h[k, l]`` be the least ``cost + p * bytes`` of a layer of run ``k`` in layout ``l`` at byte price
``p``. A pattern costs at least

    sum over stops h[k, stop] + sum over runs (layers - stops) * min over the run's stops h[k, .]
    + relayouts - p * capacity

(one layer in each stop, the others where they are cheapest). Patterns come in the order of this bound: a best-first
search over beginnings, each valued at its own cost plus the cheapest way to go on (a shortest path over layouts,
``_Tour``). Nothing is assumed about relayout costs except that they are not negative: a detour through a third layout
is a pattern like any other.

**Dominance** (when one best pattern is enough). Layers of a run are alike, so of beginnings with the same stops in
another order, and the same last one, only the cheapest counts. And a stop in a layout that the run has elsewhere too
can give its layers away; it stays only where the way round it is dearer than the way through it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ._knapsack import Floats


class Step(NamedTuple):
    """One run of a stage as the patterns see it."""

    layers: int
    priced: Floats
    """``h[k, l]`` by layout; infinite where the run has no option in a layout."""
    smallest: Floats
    """Least bytes of a layer by layout."""
    arriving: Floats
    """Relayout cost from the run before, by (layout before, layout after); from outside the stage: one row."""
    inside: Floats
    """Relayout cost between two layers of this run, by (layout before, layout after)."""


class Pattern(NamedTuple):
    """Stops of every run, and a lower bound on what the stage costs (without ``- p * capacity``)."""

    stops: tuple[tuple[int, ...], ...]
    bound: float


def patterns(steps: Sequence[Step], leaving: Floats, room: float, *, every: bool) -> Iterator[Pattern]:
    """Yield the patterns whose smallest options fit, the lowest bound first (stop reading when the bound is too high).

    Args:
        steps: The runs in order.
        leaving: Relayout cost at the end of the stage, by the layout of its last layer.
        room: Bytes that the layers may use.
        every: Yield dominated patterns too.
    """
    tour = _Tour.plan(steps, leaving)
    heap = [place for place in tour.first() if place.bound < np.inf and tour.size(place) <= room]
    heapq.heapify(heap)
    seen: set[tuple[object, ...]] = set()
    while heap:
        place = heapq.heappop(heap)
        if not every:
            key = place.key()
            if key in seen or tour.wastes(place):
                continue
            seen.add(key)
        if place.complete:
            yield Pattern(place.stops, place.bound)
        else:
            for onward in tour.after(place):
                if onward.bound < np.inf and tour.size(onward) <= room:
                    heapq.heappush(heap, onward)


class _Place(NamedTuple):
    """A beginning of a pattern: the least bound of what it can become comes first, so heaps order by it."""

    bound: float
    stops: tuple[tuple[int, ...], ...]
    complete: bool
    spent: float
    """Cost of all runs before the last one of ``stops``, and of one layer in each stop of that one."""
    held: float
    """Least bytes of the same layers."""

    def key(self) -> tuple[object, ...]:
        """Return what decides how a beginning can go on: all stops in any order, and the last one."""
        return (*(tuple(sorted(stops)) for stops in self.stops), self.stops[-1][-1], self.complete)


class _Tour(NamedTuple):
    """The way through the runs. Costs are Python floats: the matrices are tiny and read one by one."""

    layers: list[int]
    priced: list[list[float]]
    least: list[float]
    smallest: list[list[float]]
    size_to_go: list[float]
    """Least bytes of all runs after a run."""
    arriving: list[list[list[float]]]
    inside: list[list[list[float]]]
    onward: list[list[float]]
    """Least cost of everything after a run, by the layout in which it ends."""
    to_go: list[list[float]]
    """The same by the layout of its present stop, with further stops in the run allowed."""

    @classmethod
    def plan(cls, steps: Sequence[Step], leaving: Floats) -> _Tour:
        """Compute the least costs to go, from the last run to the first."""
        onward, to_go = [leaving] * len(steps), [leaving] * len(steps)
        for run in range(len(steps) - 1, -1, -1):
            if run < len(steps) - 1:
                after = steps[run + 1]
                ahead = after.priced + (after.layers - 1) * after.priced.min() + to_go[run + 1]
                onward[run] = (after.arriving + ahead).min(axis=1)
            to_go[run] = _with_further_stops(steps[run], onward[run])
        return cls(
            [step.layers for step in steps],
            [step.priced.tolist() for step in steps],
            [float(step.priced.min()) for step in steps],
            [step.smallest.tolist() for step in steps],
            [
                sum(after.layers * float(after.smallest.min()) for after in steps[run + 1 :])
                for run in range(len(steps))
            ],
            [step.arriving.tolist() for step in steps],
            [step.inside.tolist() for step in steps],
            [costs.tolist() for costs in onward],
            [costs.tolist() for costs in to_go],
        )

    def first(self) -> list[_Place]:
        """Return the beginnings with one stop."""
        return list(self._entering((), 0, 0.0, 0.0))

    def after(self, place: _Place) -> Iterator[_Place]:
        """Yield the beginnings with one stop more, or the complete pattern."""
        done, stops = place.stops[:-1], place.stops[-1]
        run, last = len(done), stops[-1]
        rest, priced, smallest = self.layers[run] - len(stops), self.priced[run], self.smallest[run]
        spent = place.spent + (rest * min(priced[stop] for stop in stops) if rest else 0.0)
        held = place.held + rest * min(smallest[stop] for stop in stops)
        if run == len(self.layers) - 1:
            yield _Place(spent + self.onward[run][last], place.stops, True, spent, held)
        else:
            yield from self._entering(place.stops, last, spent, held)
        for layout, more in enumerate(self.inside[run][last]) if rest else ():
            if layout != last:
                cost = place.spent + more + priced[layout]
                yield self._place(done, (*stops, layout), cost, place.held + smallest[layout])

    def wastes(self, place: _Place) -> bool:
        """Return whether the last stop but one stands in a layout that its run has elsewhere, and is no short cut."""
        stops, run = place.stops[-1], len(place.stops) - 1
        if len(stops) < 3:
            return False
        before, between, last = stops[-3:]
        if between not in stops[:-2] and between != last:
            return False
        inside = self.inside[run]
        return inside[before][last] <= inside[before][between] + inside[between][last]

    def size(self, place: _Place) -> float:
        """Return the least bytes of all layers."""
        run = len(place.stops) - 1
        rest = 0 if place.complete else self.layers[run] - len(place.stops[run])
        return place.held + rest * min(self.smallest[run]) + self.size_to_go[run]

    def _entering(self, done: tuple[tuple[int, ...], ...], before: int, spent: float, held: float) -> Iterator[_Place]:
        run = len(done)
        for layout, priced in enumerate(self.priced[run]):
            cost = spent + self.arriving[run][before][layout] + priced
            yield self._place(done, (layout,), cost, held + self.smallest[run][layout])

    def _place(self, done: tuple[tuple[int, ...], ...], stops: tuple[int, ...], spent: float, held: float) -> _Place:
        run = len(done)
        bound = spent + (self.layers[run] - len(stops)) * self.least[run] + self.to_go[run][stops[-1]]
        return _Place(bound, (*done, stops), False, spent, held)


def _with_further_stops(step: Step, onward: Floats) -> Floats:
    """Shortest path over further stops of a run; the layers of the run are counted at its cheapest layout already."""
    best, extra = onward, step.priced - step.priced.min()
    for _ in range(len(best)):
        shorter = np.minimum(best, (step.inside + extra + best).min(axis=1))
        if np.array_equal(shorter, best):
            break
        best = shorter
    return best

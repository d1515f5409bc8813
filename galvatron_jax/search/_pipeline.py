"""A pipeline of given slices, schedule, microbatches and batch: where to cut it, and how to spread each stage.

    minimise the longest path of the schedule over boundaries and strategies, every slice within the memory budget

The longest path is a maximum of linear functions (``_paths``), and for one linear function a slice's best strategies
are known exactly (``_assignment``). So every path seen gives a *cut* (``_bounds``): with ``phi[k](i, j)`` the least
contribution of stage ``k`` when it holds the layers ``i`` to ``j``, any plan with boundaries ``c`` takes at least
``sum_k phi[k](c[k], c[k + 1])``.

**Boundaries** of one stage on each slice are searched depth first, from the first stage on. ``phi`` is bounded from
below for all ``(i, j)`` at once (``_relaxation``), and so is what the remaining stages add, by dynamic programming over
the position. A beginning whose bound reaches the best step time known is left. Interleaved stages have few boundaries
(``_space.even_cuts``): they are bounded one by one, by their bottleneck paths.

**Strategies** for complete boundaries: ``_partition``.

Complexity: the bounds take O(stages * layers^2) for each cut; the search visits the boundaries that the bounds leave.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..schedule import Schedule, build_schedule, in_flight_microbatches, in_flight_units
from ._assignment import Assigner
from ._bounds import Bounds
from ._even import even_bounds
from ._partition import Partition, Solution
from ._paths import Path
from ._pricing import Prices, message_buffers
from ._space import Shape, even_cuts
from ._stage import ROUNDING, Section, Span, Weights, normalised
from ._whole import fastest_seconds

SAME_AGAIN = 4
"""Groups of S microbatches after which an interleaved schedule only repeats itself: the fill takes less than two, the
drain as many (a test compares)."""


def fullest_moments(shape: Shape, microbatches: int, s: int) -> tuple[tuple[int, ...], ...]:
    """Return the fullest moments of slice ``s``, as microbatches in flight by chunk (``schedule.in_flight_units``)."""
    slices, schedule, chunks = shape
    if chunks == 1:
        return ((in_flight_microbatches(schedule, s, slices, microbatches),),)
    return _interleaved_moments(s, slices, min(microbatches, SAME_AGAIN * slices), chunks)


@functools.lru_cache(maxsize=4096)
def _interleaved_moments(s: int, slices: int, microbatches: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    return tuple(sorted(in_flight_units("interleaved-1f1b", s, slices, microbatches, chunks), reverse=True))


@dataclass(slots=True, eq=False)
class Pipeline:
    """One (global batch, microbatches, shape); holds the bounds that it learns."""

    prices: Prices
    assigner: Assigner
    shape: Shape
    microbatches: int
    report: Callable[[Solution | None], None] = lambda best: None
    """Called between steps of the search with the best solution so far; may raise to stop it."""
    limit: float = np.inf
    """Step time that a solution must stay below."""
    bounds: Bounds | None = field(init=False)
    """None when there are few boundaries."""
    _ranked: list[tuple[float, bool, tuple[int, ...]]] = field(default_factory=list)
    """(bound, whether slices were solved for it, boundaries) of interleaved stages, as a heap."""
    _fastest: list[float] = field(default_factory=list)
    """Least seconds of one microbatch through the first ``n`` layers, at index ``n``."""
    _schedule: Schedule = ()
    _span: tuple[tuple[int, ...], dict[int, Span]] | None = None
    """Spans of the boundaries asked for last."""

    def __post_init__(self) -> None:
        """Bound all bottleneck paths for all boundaries."""
        chunks = self.shape.chunks
        self.bounds = None
        if chunks == 1:
            every = range(self.shape.slices)
            in_flight = tuple(fullest_moments(self.shape, self.microbatches, s)[0][0] for s in every)
            self.bounds = Bounds(self.prices, self.assigner, self.shape, self.microbatches, in_flight, self.limit)
        else:
            self._fastest = fastest_seconds(self.prices)
            cuts = even_cuts(self.shape.stages, self.prices.work)
            bounds = even_bounds(self.prices, self.assigner, self.shape, self.microbatches, cuts, self.limit)
            self._ranked = [
                (bound, False, tuple(row)) for bound, row in zip(bounds.tolist(), cuts.tolist(), strict=True)
            ]
            heapq.heapify(self._ranked)

    @property
    def bound_s(self) -> float:
        """No choice of boundaries and strategies takes less."""
        if self.bounds is not None:
            return self.bounds.whole_s
        while self._ranked and not self._ranked[0][1] and self._ranked[0][0] < self.limit:
            _, _, boundaries = self._ranked[0]
            heapq.heapreplace(self._ranked, (self._own_bound_s(boundaries), True, boundaries))
        return self._ranked[0][0] if self._ranked else np.inf

    @property
    def paths(self) -> list[Path]:
        """The paths that bound all boundaries."""
        return self.bounds.paths if self.bounds is not None else []

    @property
    def schedule(self) -> Schedule:
        """The action lists, made when they are first needed: they are long."""
        if not self._schedule:
            slices, schedule, chunks = self.shape
            self._schedule = build_schedule(schedule, slices, self.microbatches, chunks)
        return self._schedule

    def solve(self, limit: float) -> Solution | None:
        """Return the best solution if it takes less than ``limit`` seconds, else None."""
        self.limit, best = limit, None
        for boundaries in self._boundaries():
            self.report(best)
            found = Partition(self, boundaries).solve(best)
            if found is not None:
                self.limit, best = found.step_time_s, found
        return best

    def transfers(self, boundaries: tuple[int, ...]) -> list[float]:
        """Return the seconds of a message over each boundary."""
        seconds, slices = self.prices.transfer_BJ, self.shape.slices
        return [float(seconds[k % slices, j]) for k, j in enumerate(boundaries[1:-1])]

    def span(self, s: int, boundaries: tuple[int, ...]) -> Span:
        """Return what slice ``s`` holds."""
        if self._span is None or self._span[0] != boundaries:
            self._span = boundaries, {}
        spans = self._span[1]
        if s not in spans:
            spans[s] = self._made_span(s, boundaries)
        return spans[s]

    def _made_span(self, s: int, boundaries: tuple[int, ...]) -> Span:
        stages = range(s, self.shape.stages, self.shape.slices)
        buffers = sum(
            message_buffers(self.prices, self.shape.stages, k, (boundaries[k], boundaries[k + 1])) for k in stages
        )
        return Span(
            tuple(self._section(k, boundaries) for k in stages),
            fullest_moments(self.shape, self.microbatches, s),
            buffers,
        )

    def learn(self, path: Path) -> None:
        """Use a path as a bound for all boundaries."""
        if self.bounds is not None:
            self.bounds.learn(path)

    def _section(self, k: int, boundaries: tuple[int, ...]) -> Section:
        """What stage ``k`` holds."""
        start, stop = boundaries[k], boundaries[k + 1]
        runs: list[tuple[int, int]] = []
        for kind in self.prices.order[start:stop].tolist():
            last = runs.pop() if runs and runs[-1][0] == kind else (kind, 0)
            runs.append((kind, last[1] + 1))
        follows = int(self.prices.order[stop]) if stop < len(self.prices.order) else -1
        return Section(tuple(runs), k > 0, follows)

    def _boundaries(self) -> Iterator[tuple[int, ...]]:
        """Yield boundaries whose bound is below the limit, the most promising first."""
        if self.bounds is not None:
            yield from self._depth_first(self.bounds)
        ranked = self._ranked.copy()  # the bound of all boundaries stays what it is until all of them are done
        while self._ranked and self.bound_s < self.limit * (1 - ROUNDING):
            yield heapq.heappop(self._ranked)[2]
        self._ranked = ranked

    def _own_bound_s(self, boundaries: tuple[int, ...]) -> float:
        """The bottleneck paths with each slice's own strategies solved; no better than needed to reach the limit."""
        bound, m = 0.0, float(self.microbatches)
        for s, fill in reversed(list(enumerate(self._fills(boundaries)))):
            weights = (Weights(m, m, float(s == 0)),) * self.shape.chunks
            choice = self.assigner.cheapest(self.span(s, boundaries), normalised(weights)[0])
            bound = max(bound, np.inf if choice is None else fill + choice.cost(weights))
            if bound >= self.limit:
                break
        return bound

    def _fills(self, boundaries: tuple[int, ...]) -> list[float]:
        """What precedes and follows a slice's own actions on its bottleneck path, at least."""
        ways = zip(self._spent(boundaries), self.transfers(boundaries), strict=False)
        return list(itertools.accumulate((spent + 2 * wire for spent, wire in ways), initial=0.0))[: self.shape.slices]

    def _spent(self, boundaries: tuple[int, ...]) -> list[float]:
        return [self._fastest[b] - self._fastest[a] for a, b in itertools.pairwise(boundaries)]

    def _depth_first(self, bounds: Bounds) -> Iterator[tuple[int, ...]]:
        """Take the most promising next stage first."""
        stack: list[tuple[float, tuple[int, ...]]] = [(self.bound_s, (0,))]
        while stack:
            bound, cuts = stack.pop()
            known = float(bounds.after(cuts[:-1])[cuts[-1]]) if len(cuts) > 1 else self.bound_s
            if max(bound, known) >= self.limit * (1 - ROUNDING):
                continue
            if len(cuts) == self.shape.slices + 1:
                yield cuts
                continue
            ends = bounds.after(cuts)
            order = np.argsort(-ends, kind="stable")
            stack += [(float(ends[j]), (*cuts, int(j))) for j in order if ends[j] < self.limit * (1 - ROUNDING)]

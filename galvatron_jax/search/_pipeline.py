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

Complexity: the bounds take O(stages * layers * longest stage) for each cut; the search visits the boundaries that the
bounds leave, and never more than ``MOST_BOUNDARIES`` (``TooHard``).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ._bounds import Bounds
from ._even import even_bounds
from ._knapsack import TooHard
from ._partition import Partition, Solution
from ._paths import path_messages
from ._slices import Slices, fullest_moments
from ._space import even_cuts
from ._stage import ROUNDING, Weights, normalised
from ._whole import fastest_seconds

MOST_BOUNDARIES = 20_000
"""Of one pipeline, complete or not."""


@dataclass(slots=True, eq=False)
class Pipeline:
    """One (global batch, microbatches, shape); holds the bounds that it learns."""

    line: Slices
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

    def __post_init__(self) -> None:
        """Bound all bottleneck paths for all boundaries."""
        prices, assigner, shape, microbatches = (
            self.line.prices,
            self.line.assigner,
            self.line.shape,
            self.line.microbatches,
        )
        self.bounds = None
        if shape.chunks == 1:
            in_flight = tuple(fullest_moments(shape, microbatches, s)[0][0] for s in range(shape.slices))
            self.bounds = Bounds(prices, assigner, shape, microbatches, in_flight, self.limit)
        else:
            self._fastest = fastest_seconds(prices)
            cuts = even_cuts(shape.stages, prices.work)
            bounds = even_bounds(prices, assigner, shape, microbatches, cuts, self.limit)
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

    def solve(self, limit: float) -> Solution | None:
        """Return the best solution if it takes less than ``limit`` seconds, else None.

        Raises:
            TooHard: there is too much to look at; what ``report`` was told stands, and so does ``bound_s``.
        """
        self.limit, best = limit, None
        for boundaries in self._boundaries():
            self.report(best)
            found = Partition(self.line, self.bounds, boundaries, self.limit, self.report).solve(best)
            if found is not None:
                self.limit, best = found.step_time_s, found
        return best

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
        bound, m = 0.0, float(self.line.microbatches)
        for s, fill in reversed(list(enumerate(self._fills(boundaries)))):
            weights = (Weights(m, m, float(s == 0)),) * self.line.shape.chunks
            choice = self.line.assigner.cheapest(self.line.span(s, boundaries), normalised(weights)[0])
            bound = max(bound, np.inf if choice is None else fill + choice.cost(weights))
            if bound >= self.limit:
                break
        return bound

    def _fills(self, boundaries: tuple[int, ...]) -> list[float]:
        """What is on each slice's bottleneck path beside its actions: other slices', at least, and messages."""
        m, meets = self.line.microbatches, self.line.prices.meets_B
        spent = list(itertools.accumulate(self._spent(boundaries), initial=0.0))
        crossings = self.line.crossings(boundaries)
        return [
            spent[s] + sum(path_messages(m, s, meets, k).seconds(crossing) for k, crossing in enumerate(crossings))
            for s in range(self.line.shape.slices)
        ]

    def _spent(self, boundaries: tuple[int, ...]) -> list[float]:
        return [self._fastest[b] - self._fastest[a] for a, b in itertools.pairwise(boundaries)]

    def _depth_first(self, bounds: Bounds) -> Iterator[tuple[int, ...]]:
        """Take the most promising next stage first."""
        stack: list[tuple[float, tuple[int, ...]]] = [(self.bound_s, (0,))]
        for visited in itertools.count():
            if not stack:
                return
            if visited > MOST_BOUNDARIES:
                raise TooHard
            self.report(None)
            bound, cuts = stack.pop()
            known = float(bounds.after(cuts[:-1])[cuts[-1]]) if len(cuts) > 1 else self.bound_s
            if max(bound, known) >= self.limit * (1 - ROUNDING):
                continue
            if len(cuts) == self.line.shape.slices + 1:
                yield cuts
                continue
            ends = bounds.after(cuts)
            order = np.argsort(-ends, kind="stable")
            stack += [(float(ends[j]), (*cuts, int(j))) for j in order if ends[j] < self.limit * (1 - ROUNDING)]

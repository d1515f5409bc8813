"""Strategies for the layers of one stage, exactly: the best one for a linear objective, or all that may matter.

    minimise    a * forward + b * backward + c * step_end                       (``Weights``; relayouts included)
    subject to  sum of states + in-flight microbatches * sum of residuals + largest live layer + buffers <= capacity

over sequences of strategies, one for each layer. Layers of one kind are alike, so a solution is a pattern of layouts
and, for each stop of the pattern, how many layers take which strategy. The largest live layer is a maximum, not a
sum: for every value ``t`` that it can have, options that need more than ``t`` are left out and ``t`` is taken off the
capacity. So the optimum is the minimum over thresholds and patterns of a knapsack, and each threshold and pattern
carries a lower bound (Lagrangian; for the threshold all layouts together, relayouts free) that leaves most of them
out.

Complexity: (thresholds * patterns that the bounds leave) knapsacks, a few in practice.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ._knapsack import Floats
from ._pricing import Prices, undominated
from ._stage import ROUNDING, Board, Case, Span, StageChoice, Weights


@dataclass(slots=True)
class Assigner:
    """Solves stages at one set of prices, and remembers what it solved."""

    prices: Prices
    capacity_bytes: float
    poll: Callable[[], None] = lambda: None
    """Called before every knapsack; may raise to stop the search."""
    _boards: dict[tuple[Weights, int, bool], Board] = field(default_factory=dict)
    _solved: dict[tuple[Span, Weights], StageChoice | None] = field(default_factory=dict)

    def cheapest(self, span: Span, weights: Weights) -> StageChoice | None:
        """Return the best strategies for ``weights``; None when nothing fits."""
        key = (span, weights)
        if key not in self._solved:
            self._solved[key] = self._cheapest(span, weights)
        return self._solved[key]

    def within(self, span: Span, weights: Weights, limit: float) -> list[StageChoice]:
        """Return all choices that cost at most ``limit`` and that no other one beats or equals in all three times."""
        found = []
        for threshold, bound in self._thresholds(span, weights, exhaustive=True):
            if bound <= limit * (1 + ROUNDING):
                case = self._case(span, weights, threshold, exhaustive=True)
                found += case.all(limit) if case is not None else []
        times = np.array([(c.forward_s, c.backward_s, c.step_end_s) for c in found]).reshape(-1, 3)
        keep = undominated(times, np.zeros(len(found), np.int64))
        return [choice for choice, kept in zip(found, keep, strict=True) if kept]

    def bounds(self, weights: Weights, in_flight: int, counts_SK: Floats, buffer_bytes: float) -> Floats:
        """Return lower bounds on the cost of stages, one per row of layer counts by kind; infinite: nothing fits."""
        relaxation = self.board(weights, in_flight).relaxation
        return np.asarray(relaxation.bounds(counts_SK, self.capacity_bytes - buffer_bytes))

    def board(self, weights: Weights, in_flight: int, *, exhaustive: bool = False) -> Board:
        """Return the options under one objective."""
        key = (weights, in_flight, exhaustive)
        if key not in self._boards:
            self._boards[key] = Board.make(self.prices, weights, in_flight, exhaustive=exhaustive, poll=self.poll)
        return self._boards[key]

    def _cheapest(self, span: Span, weights: Weights) -> StageChoice | None:
        """Take the cases best first: by a coarse bound, then by their own, then solve them."""
        best, limit = None, np.inf
        heap: list[tuple[float, float, Case | None]] = [
            (bound, threshold, None) for threshold, bound in self._thresholds(span, weights, exhaustive=False)
        ]
        while heap and heap[0][0] <= limit * (1 + ROUNDING):
            _, threshold, case = heapq.heappop(heap)
            if case is None:
                case = self._case(span, weights, threshold, exhaustive=False)
                if case is not None:
                    heapq.heappush(heap, (case.dual.bound, threshold, case))
                continue
            found = case.best(limit)
            if found is not None and found.cost(weights) < limit:
                best, limit = found, found.cost(weights)
        return best

    def _thresholds(self, span: Span, weights: Weights, *, exhaustive: bool) -> list[tuple[float, float]]:
        """(threshold, bound) for each value that the largest live layer can have, the lowest bound first."""
        board = self.board(weights, span.in_flight, exhaustive=exhaustive)
        thresholds = sorted({live for kind, _ in span.runs for live in board.live[kind].tolist()})
        room = self.capacity_bytes - span.buffer_bytes
        bounds = board.relaxation.bounds_at(board.counts(span.runs), room, np.array(thresholds))
        pairs = zip(thresholds, bounds.tolist(), strict=True)
        return sorted((pair for pair in pairs if pair[1] < np.inf), key=lambda pair: (pair[1], pair[0]))

    def _case(self, span: Span, weights: Weights, threshold: float, *, exhaustive: bool) -> Case | None:
        board = self.board(weights, span.in_flight, exhaustive=exhaustive)
        return Case.make(board, span, threshold, self.capacity_bytes - span.buffer_bytes - threshold)

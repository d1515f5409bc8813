"""Strategies for the layers of one slice of devices, exactly: the best ones for a linear objective, or all of use.

A slice with several stages is ``_shared``'s. With one:

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

from ._dominance import undominated
from ._knapsack import Floats
from ._pricing import Prices
from ._shared import SharedSlice
from ._stage import ROUNDING, Board, Case, SliceChoice, SliceWeights, Span, StageChoice, Weights


@dataclass(slots=True)
class Assigner:
    """Solves slices at one set of prices, and remembers what it solved."""

    prices: Prices
    capacity_bytes: float
    poll: Callable[[], None] = lambda: None
    """Called before every knapsack; may raise to stop the search."""
    exact: bool = True
    """False: stages of one section get good strategies that fit, at once (``_knapsack.rounded``)."""
    _boards: dict[tuple[Weights, int, int, str], Board] = field(default_factory=dict)
    _slices: dict[Span, SharedSlice] = field(default_factory=dict)
    _solved: dict[tuple[Span, SliceWeights], SliceChoice | None] = field(default_factory=dict)

    def cheapest(self, span: Span, weights: SliceWeights) -> SliceChoice | None:
        """Return the best strategies for ``weights``; None when nothing fits."""
        key = (span, weights)
        if key not in self._solved:
            shared = len(weights) > 1
            self._solved[key] = self._shared(span).cheapest(weights) if shared else self._cheapest(span, weights[0])
        return self._solved[key]

    def within(self, span: Span, weights: SliceWeights, limit: float) -> list[SliceChoice]:
        """Return all choices that cost at most ``limit`` and that no other one beats or equals in all times."""
        if len(weights) > 1:
            return self._shared(span).within(weights, limit)
        found: list[StageChoice] = []
        for threshold, bound in self._thresholds(span, weights[0], exhaustive=True):
            if bound <= limit * (1 + ROUNDING):
                case = self._case(span, weights[0], threshold, exhaustive=True)
                found += case.all(limit) if case is not None else []
        times = np.array([(c.forward_s, c.backward_s, c.step_end_s) for c in found]).reshape(-1, 3)
        return [SliceChoice((choice,)) for choice, kept in zip(found, undominated(times), strict=True) if kept]

    def bounds(self, weights: Weights, in_flight: int, counts_SK: Floats, buffer_bytes: float) -> Floats:
        """Return lower bounds on the cost of stages, one per row of layer counts by kind; infinite: nothing fits."""
        bounds, straight = np.empty(len(counts_SK)), self.prices.straight_layers(counts_SK)
        for layers in np.unique(straight).tolist():
            relaxation, these = self.board(weights, in_flight, layers).relaxation, straight == layers
            bounds[these] = relaxation.bounds(counts_SK[these], self.capacity_bytes - buffer_bytes)
        return bounds

    def board(self, weights: Weights, in_flight: int, straight: int, *, keeps: str = "best") -> Board:
        """Return the options under one objective on stages of one sort (``Prices.holding``)."""
        key = (weights, in_flight, straight, keeps)
        if key not in self._boards:
            prices = self.prices.holding(straight)
            self._boards[key] = Board.make(prices, weights, in_flight, keeps=keeps, poll=self.poll, exact=self.exact)
        return self._boards[key]

    def _shared(self, span: Span) -> SharedSlice:
        if span not in self._slices:
            self._slices[span] = SharedSlice(self.prices, span, self.capacity_bytes, self.poll)
        return self._slices[span]

    def _cheapest(self, span: Span, weights: Weights) -> SliceChoice | None:
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
                best, limit = SliceChoice((found,)), found.cost(weights)
        return best

    def _thresholds(self, span: Span, weights: Weights, *, exhaustive: bool) -> list[tuple[float, float]]:
        """(threshold, bound) for each value that the largest live layer can have, the lowest bound first."""
        board, section = self._board(span, weights, exhaustive), span.sections[0]
        thresholds = sorted({live for kind, _ in section.runs for live in board.live[kind].tolist()})
        bounds = board.relaxation.bounds_at(self.prices.counts(section.runs), self._room(span), np.array(thresholds))
        pairs = zip(thresholds, bounds.tolist(), strict=True)
        return sorted((pair for pair in pairs if pair[1] < np.inf), key=lambda pair: (pair[1], pair[0]))

    def _case(self, span: Span, weights: Weights, threshold: float, *, exhaustive: bool) -> Case | None:
        board = self._board(span, weights, exhaustive)
        return Case.make(board, span.sections[0], threshold, self._room(span) - threshold)

    def _board(self, span: Span, weights: Weights, exhaustive: bool) -> Board:
        counts = self.prices.counts(span.sections[0].runs)
        straight = int(self.prices.straight_layers(counts))
        return self.board(weights, span.moments[0][0], straight, keeps="all" if exhaustive else "best")

    def _room(self, span: Span) -> float:
        return self.capacity_bytes - span.buffer_bytes

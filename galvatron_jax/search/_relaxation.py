"""Lower bounds on the cost of many stages at once: layouts for free, fractions of layers allowed.

With ``A[k](p, t) = min over options of kind k that need at most t live bytes of (cost + p * bytes)``, a stage with
``n[k]`` layers of kind ``k``, ``room`` bytes and largest live layer ``t`` costs at least

    max over p of  sum_k n[k] A[k](p, t) - p (room - t)

for every byte price ``p >= 0`` (Lagrangian duality). ``A`` is tabulated once for the prices at which two options of a
kind tie and for all live thresholds; a bound is then one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._dominance import undominated
from ._knapsack import Floats, Ints, Menu

MANY_ENTRIES = 2**24
"""(stages * prices * thresholds) above which bounds are coarse."""
COARSE_PRICES = 12
STEEPER, STEEPER_STEPS = 1.5, 4


@dataclass(frozen=True, slots=True, eq=False)
class Relaxation:
    """``A`` on a grid. Arrays are indexed by kind, byte price and threshold."""

    prices: Floats
    thresholds: Floats
    least_KPT: Floats
    smallest_KT: Floats
    """Least bytes of a layer (states and residuals)."""
    absent_KT: Floats
    """1 where a kind has no option within a threshold."""

    @classmethod
    def make(cls, costs: Sequence[Floats], sizes: Sequence[Floats], lives: Sequence[Floats]) -> Relaxation:
        """Tabulate the options of all kinds; those that another one beats in (cost, bytes, live bytes) do not count."""
        tables = [np.stack(columns, axis=1) for columns in zip(costs, sizes, lives, strict=True)]
        tables = [table[undominated(table, np.zeros(len(table), np.int64))] for table in tables]
        costs, sizes, lives = ([table[:, column] for table in tables] for column in range(3))
        prices = _price_grid(costs, sizes)
        thresholds = np.array(sorted(set().union(*(live.tolist() for live in lives))))
        least = np.full((len(costs), len(prices), len(thresholds)), np.inf)
        smallest = np.full((len(costs), len(thresholds)), np.inf)
        for k, (cost, size, live) in enumerate(zip(costs, sizes, lives, strict=True)):
            if len(cost):
                allowed = live[:, None] <= thresholds
                priced = cost[:, None] + size[:, None] * prices
                least[k] = np.where(allowed[:, None, :], priced[:, :, None], np.inf).min(axis=0)
                smallest[k] = np.where(allowed, size[:, None], np.inf).min(axis=0)
        absent = np.isinf(smallest).astype(np.float64)
        least[np.isinf(least)] = 0.0
        return cls(prices, thresholds, least, np.where(absent, 0.0, smallest), absent)

    def bounds(self, counts_SK: Floats, room: float) -> Floats:
        """Return the bound of each stage (row of layer counts by kind); infinite where nothing fits."""
        if counts_SK.shape[0] * self.least_KPT[0].size > MANY_ENTRIES:
            return self._coarse_bounds(counts_SK, room)
        every = np.arange(len(self.thresholds))
        return np.asarray(self._bounds(counts_SK, every, room - self.thresholds).min(axis=1))

    def bounds_at(self, counts_K: Floats, room: float, thresholds: Floats) -> Floats:
        """Return the bound of one stage by the bytes of its largest live layer; infinite where nothing fits."""
        at = np.searchsorted(self.thresholds, thresholds, side="right") - 1
        bounds = self._bounds(counts_K[None, :], np.maximum(at, 0), room - thresholds)[0]
        return np.where(at < 0, np.inf, bounds)

    def _coarse_bounds(self, counts_SK: Floats, room: float) -> Floats:
        """The same for very many stages: with all options, the least live layer of all, and a few byte prices."""
        chosen = np.unique(np.linspace(0, len(self.prices) - 1, COARSE_PRICES).round().astype(np.int64))
        left, bounds = room - float(self.thresholds[0]), np.full(len(counts_SK), -np.inf)
        for p in chosen.tolist():
            total = weighted_sum(counts_SK, self.least_KPT[:, p, -1:])[:, 0]
            np.maximum(bounds, total - self.prices[p] * left, out=bounds)
        small = weighted_sum(counts_SK, self.smallest_KT[:, -1:])[:, 0]
        return np.where(small > left, np.inf, bounds)

    def whole_bound(self, counts_K: Floats, room: float) -> float:
        """Return the bound of layers that share ``room`` bytes, whatever is alive besides."""
        total = weighted_sum(counts_K[None, :], self.least_KPT[:, :, -1])[0] - self.prices * room
        return float(total.max())

    def _bounds(self, counts_SK: Floats, at: Ints, left: Floats) -> Floats:
        """Bounds by (stage, threshold), for columns ``at`` of the tables and room ``left`` beside the live layer."""
        kinds, prices, _ = self.least_KPT.shape
        total = weighted_sum(counts_SK, self.least_KPT[:, :, at].reshape(kinds, -1)).reshape(-1, prices, len(at))
        total -= self.prices[:, None] * left
        small, absent = weighted_sum(counts_SK, self.smallest_KT[:, at]), weighted_sum(counts_SK, self.absent_KT[:, at])
        return np.where((small > left) | (absent > 0), np.inf, total.max(axis=1))


def weighted_sum(counts_SK: Floats, values_KX: Floats) -> Floats:
    """Return ``counts @ values``, summed kind by kind: a matrix product's order of summation depends on the machine."""
    total = np.zeros((len(counts_SK), values_KX.shape[1]))
    for k in range(len(values_KX)):
        total += counts_SK[:, k, None] * values_KX[k]
    return total


def _price_grid(costs: Sequence[Floats], sizes: Sequence[Floats]) -> Floats:
    """0, the prices at which options of a kind tie, and steeper ones for thresholds that leave few options."""
    slopes = [Menu(c, s, np.arange(len(c))).slopes for c, s in zip(costs, sizes, strict=True)]
    ties = sorted(set().union(*(slope.tolist() for slope in slopes)))
    steeper = [ties[-1] * STEEPER**step for step in range(1, STEEPER_STEPS + 1)] if ties else []
    return np.array([0.0, *ties, *steeper])

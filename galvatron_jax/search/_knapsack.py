"""How many of each group's equal items take which option: a multiple-choice knapsack, solved exactly.

    minimise    sum_g sum_i cost[g,i] x[g,i]
    subject to  sum_i x[g,i] = count[g]  for each group g,   sum_g sum_i bytes[g,i] x[g,i] <= capacity,   x integer >= 0

**Bound.** For a price ``p >= 0`` of one byte, ``D(p) = sum_g count[g] min_i (cost + p bytes)[g,i] - p capacity`` is a
lower bound (Lagrangian duality). It is concave and piecewise linear in ``p``; its maximum lies at 0 or where two
options of a group on the lower convex hull of (bytes, cost) tie, so looking at those slopes gives the best bound,
which equals the linear relaxation's optimum.

**Reduced costs.** With ``r[g,i] = (cost + p bytes)[g,i] - min_i (...)``, any feasible ``x`` costs
``D(p) + sum r x + p (capacity - bytes used)``. So for a solution below a limit, ``sum r x < limit - D(p)``: an option
with a large reduced cost is taken a few times or never, and all assignments left can be listed.

**Deepening.** The relaxed optimum splits one item between two options that tie; rounding it to the smaller one is
feasible and costs at most the difference of the two. So a list up to that difference holds the optimum. The list is
made for a part of that difference first: if it is not empty, its best entry is the optimum.

**Thinning.** When only the best assignment is wanted, a beginning that is neither cheaper nor smaller than another
one of as many items can go.

Complexity: the number of listed beginnings, in practice tens; at most the number of assignments, and never more than
``MOST_ROWS`` (``TooHard``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

RELATIVE_ROUNDING = 1e-10
"""Sums of some hundred float64 terms agree to about 1e-13; differences below this share of a sum are ties."""
FIRST_DEPTH = 16.0
"""Part of the rounding gap that is listed first."""
DEEPENING = 4.0
"""How much further each next list goes."""
MOST_ROWS = 100_000
"""Beginnings that are listed; each takes some hundred bytes."""
FEW_ROWS = 32
"""Shorter lists are not worth thinning."""


class TooHard(Exception):  # noqa: N818  (an answer, not an error: the engine keeps the bound that it has)
    """An exact solution was given up: more cases than the search is willing to list."""


@dataclass(frozen=True, slots=True, eq=False)
class Menu:
    """The options of one item, and the byte prices at which two of them tie on the lower hull."""

    cost: Floats
    size: Floats
    ids: Ints
    """What the options are called by whoever made the menu."""
    slopes: Floats = field(init=False)

    def __post_init__(self) -> None:
        """Find the hull once: a menu serves many problems."""
        object.__setattr__(self, "slopes", _hull_slopes(self.cost, self.size))


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` equal items that choose from one menu."""

    count: int
    menu: Menu


@dataclass(frozen=True, slots=True, eq=False)
class Assignments:
    """Feasible assignments, one per row; columns are the options of all groups one after the other."""

    cost: Floats
    size: Floats
    counts: Ints


@dataclass(frozen=True, slots=True)
class Dual:
    """The best lower bound, and the byte price that gives it."""

    bound: float
    price: float


def best_dual(groups: Sequence[Group], capacity: float) -> Dual | None:
    """Return the best lower bound on the cost; None when even the smallest options exceed ``capacity``."""
    if sum(group.count * group.menu.size.min() for group in groups) > capacity:
        return None
    prices = np.concatenate([[0.0], *(group.menu.slopes for group in groups)])
    bounds = -prices * capacity
    for group in groups:
        bounds += group.count * (group.menu.cost + prices[:, None] * group.menu.size).min(axis=1)
    best = int(bounds.argmax())
    return Dual(float(bounds[best]), float(prices[best]))


def assignments_within(
    groups: Sequence[Group], capacity: float, limit: float, dual: Dual, *, thin: bool = False
) -> Assignments:
    """Return all feasible assignments that cost at most ``limit``; with ``thin``, at least the best of them."""
    rows = _Rows.first(_slack(limit - dual.bound, dual.bound), thin)
    for group in groups:
        rows = rows.extended(group, dual.price)
    keep = (rows.size <= capacity) & (rows.cost <= limit)
    return Assignments(rows.cost[keep], rows.size[keep], rows.counts[keep])


def cheapest(groups: Sequence[Group], capacity: float, limit: float = np.inf) -> Assignments | None:
    """Return the cheapest feasible assignment that costs at most ``limit`` as one row; None when there is none.

    Of equally cheap assignments the smaller one is returned, then the one that comes first.
    """
    dual = best_dual(groups, capacity)
    if dual is None or dual.bound > _slack(limit, limit):
        return None
    smallest = sum(g.count * float(g.menu.cost[g.menu.size == g.menu.size.min()].min()) for g in groups)
    most = min(limit, _slack(smallest, smallest))
    gap = _rounding_gap(groups, dual.price) / FIRST_DEPTH
    while True:
        within = min(most, _slack(dual.bound + gap, dual.bound))
        found = assignments_within(groups, capacity, within, dual, thin=True)
        if len(found.cost):
            row = np.lexsort((found.size, found.cost))[:1]
            return Assignments(found.cost[row], found.size[row], found.counts[row])
        if within >= most:
            return None
        gap = DEEPENING * gap + RELATIVE_ROUNDING * abs(dual.bound)


def _rounding_gap(groups: Sequence[Group], price: float) -> float:
    """The most that rounding one item from a tied option to a smaller one can cost."""
    gap = 0.0
    for group in groups:
        priced = group.menu.cost + price * group.menu.size
        tied = group.menu.cost[priced <= priced.min() + _slack(0.0, float(priced.min()))]
        gap = max(gap, float(tied.max() - tied.min()))
    return gap


def _slack(gap: float, scale: float) -> float:
    """``gap`` plus what rounding errors in sums of size ``scale`` can amount to."""
    return gap + RELATIVE_ROUNDING * abs(scale) if np.isfinite(scale) else gap


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Beginnings of assignments: what is left of the gap, and what was chosen so far."""

    left: Floats
    cost: Floats
    size: Floats
    counts: Ints
    """By option of all complete groups."""
    remaining: Ints
    """Items of the present group that have no option yet."""
    thin: bool

    @classmethod
    def first(cls, gap: float, thin: bool) -> _Rows:
        """The empty assignment."""
        return cls(np.full(1, gap), np.zeros(1), np.zeros(1), np.zeros((1, 0), np.int64), np.zeros(1, np.int64), thin)

    def extended(self, group: Group, price: float) -> _Rows:
        """All ways to assign one more group within the gap."""
        menu = group.menu
        priced = menu.cost + price * menu.size
        reduced = priced - priced.min()
        reduced[reduced <= _slack(0.0, float(priced.min()))] = 0.0
        widest, base = self.left.max(initial=0.0), self.counts.shape[1]
        options = [int(i) for i in np.argsort(-reduced, kind="stable") if reduced[i] <= widest]
        counts = np.concatenate([self.counts, np.zeros((len(self.left), len(reduced)), np.int64)], axis=1)
        rows = replace(self, counts=counts, remaining=np.full(len(self.left), group.count))
        for option in options[:-1]:
            most = _most(rows.left, float(reduced[option]), rows.remaining)
            rows = rows._taking(*_up_to(most), menu, option, base, float(reduced[option]))._thinned()
        everything = np.arange(len(rows.left))
        return rows._taking(everything, rows.remaining, menu, options[-1], base, 0.0)._thinned()

    def _taking(self, parent: Ints, taken: Ints, menu: Menu, option: int, base: int, reduced: float) -> _Rows:
        counts = self.counts[parent]
        counts[:, base + option] = taken
        return _Rows(
            self.left[parent] - taken * reduced,
            self.cost[parent] + taken * menu.cost[option],
            self.size[parent] + taken * menu.size[option],
            counts,
            self.remaining[parent] - taken,
            self.thin,
        )

    def _thinned(self) -> _Rows:
        """Without the rows that another row with as many remaining items beats or equals in cost and size."""
        if not self.thin or len(self.left) < FEW_ROWS:
            return self
        order = np.lexsort((self.cost, self.size, self.remaining))
        rank = np.empty(len(order), np.int64)
        rank[np.argsort(self.cost[order], kind="stable")] = np.arange(len(order))
        # cheapest so far within each number of remaining items: every next number starts below all ranks before it
        keys = rank - len(order) * (self.remaining[order] - self.remaining.min())
        keep = order[keys < np.concatenate([[keys[0] + 1], np.minimum.accumulate(keys)[:-1]])]
        return _Rows(
            self.left[keep], self.cost[keep], self.size[keep], self.counts[keep], self.remaining[keep], self.thin
        )


def _most(left: Floats, reduced: float, remaining: Ints) -> Ints:
    """How many items of a row can take an option of reduced cost ``reduced``."""
    if reduced == 0.0:
        return remaining
    return np.minimum(remaining, (left / reduced).astype(np.int64))


def _up_to(most: Ints) -> tuple[Ints, Ints]:
    """Each row index repeated for 0, 1, ... ``most[row]`` items, and those numbers."""
    if len(most) + int(most.sum()) > MOST_ROWS:
        raise TooHard
    parent = np.repeat(np.arange(len(most)), most + 1)
    starts = np.cumsum(most + 1) - (most + 1)
    return parent, np.arange(len(parent)) - starts[parent]


def _hull_slopes(cost: Floats, size: Floats) -> Floats:
    """Byte prices between neighbours on the lower convex hull of (size, cost), from its smallest option on."""
    hull: list[tuple[float, float]] = []
    for at_size, at_cost in sorted(zip(size.tolist(), cost.tolist(), strict=True)):
        if hull and at_cost >= hull[-1][1]:
            continue
        while len(hull) > 1 and _price(hull[-2], hull[-1]) <= _price(hull[-1], (at_size, at_cost)):
            hull.pop()
        hull.append((at_size, at_cost))
    return np.array([_price(a, b) for a, b in zip(hull, hull[1:], strict=False)])


def _price(small: tuple[float, float], large: tuple[float, float]) -> float:
    return (small[1] - large[1]) / (large[0] - small[0])

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
one of as many items can go. A group is listed option by option: one step each, however many items there are. Where
the numbers of items left make that list long, it is listed item by item instead: a step for every item, but
beginnings of equally many items, of which few stay.

**Rounding.** All items at the options that are least at the price of the bound, the smaller ones where two tie, is
feasible; then as many take the larger one as there is room for (``rounded``).

Complexity: the number of listed beginnings, in practice tens; at most the number of assignments, and never more than
``MOST_ROWS`` in one step (``TooHard``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
"""Beginnings that are listed in one step; each takes some hundred bytes."""
LONG_ROWS = 20_000
"""Thinned lists are not made longer than this option by option."""
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
    groups: Sequence[Group],
    capacity: float,
    limit: float,
    dual: Dual,
    *,
    thin: bool = False,
    poll: Callable[[], None] = lambda: None,
) -> Assignments:
    """Return all feasible assignments that cost at most ``limit``; with ``thin``, at least the best of them."""
    rows = _Rows.first(_slack(limit - dual.bound, dual.bound), thin)
    for group in groups:
        rows = rows.extended(group, dual.price, poll)
    keep = (rows.size <= capacity) & (rows.cost <= limit)
    return Assignments(rows.cost[keep], rows.size[keep], rows.counts[keep])


def cheapest(
    groups: Sequence[Group], capacity: float, limit: float = np.inf, poll: Callable[[], None] = lambda: None
) -> Assignments | None:
    """Return the cheapest feasible assignment that costs at most ``limit`` as one row; None when there is none.

    Of equally cheap assignments the smaller one is returned, then the one that comes first. ``poll`` is called between
    the steps of long lists; what it raises ends the search.
    """
    dual = best_dual(groups, capacity)
    if dual is None or dual.bound > _slack(limit, limit):
        return None
    near = rounded(groups, capacity)
    most = limit if near is None else min(limit, _slack(float(near.cost[0]), float(near.cost[0])))
    gap = _rounding_gap(groups, dual.price) / FIRST_DEPTH
    while True:
        within = min(most, _slack(dual.bound + gap, dual.bound))
        found = assignments_within(groups, capacity, within, dual, thin=True, poll=poll)
        if len(found.cost):
            row = np.lexsort((found.size, found.cost))[:1]
            return Assignments(found.cost[row], found.size[row], found.counts[row])
        if within >= most:
            return None
        gap = DEEPENING * gap + RELATIVE_ROUNDING * abs(dual.bound)


def rounded(groups: Sequence[Group], capacity: float, limit: float = np.inf) -> Assignments | None:
    """Return the relaxed optimum rounded to whole items, as one row; None when it exceeds ``limit`` or nothing fits."""
    dual = best_dual(groups, capacity)
    if dual is None:
        return None
    counts, room = [np.zeros(len(group.menu.cost), np.int64) for group in groups], capacity
    cost, pairs = 0.0, [_tied(group.menu, dual.price) for group in groups]
    for group, taken, (small, _) in zip(groups, counts, pairs, strict=True):
        taken[small] = group.count
        room -= group.count * float(group.menu.size[small])
    for group, taken, (small, large) in zip(groups, counts, pairs, strict=True):
        more = float(group.menu.size[large] - group.menu.size[small])
        moved = min(group.count, int(room / more)) if more > 0 else 0
        taken[small], taken[large] = group.count - moved, taken[large] + moved
        room -= moved * more
        cost += float(sum(taken * group.menu.cost))
    if cost > limit or room < 0:
        return None
    return Assignments(np.array([cost]), np.array([capacity - room]), np.concatenate(counts)[None])


def _tied(menu: Menu, price: float) -> tuple[int, int]:
    """The smallest and the cheapest of the options that are least at a byte price."""
    priced = menu.cost + price * menu.size
    tied = np.flatnonzero(priced <= _slack(float(priced.min()), float(priced.min())))
    by_size, by_cost = (
        np.lexsort(keys)[0] for keys in ((menu.cost[tied], menu.size[tied]), (menu.size[tied], menu.cost[tied]))
    )
    return int(tied[by_size]), int(tied[by_cost])


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

    def extended(self, group: Group, price: float, poll: Callable[[], None]) -> _Rows:
        """All ways to assign one more group within the gap."""
        priced = group.menu.cost + price * group.menu.size
        reduced = priced - priced.min()
        reduced[reduced <= _slack(0.0, float(priced.min()))] = 0.0
        widest = self.left.max(initial=0.0)
        options = np.argsort(-reduced, kind="stable")
        options = options[reduced[options] <= widest]
        rows = self._option_by_option(group, reduced, options)
        if rows is None and self.thin:
            rows = self._item_by_item(group, reduced, options, poll)
        if rows is None:
            raise TooHard
        return rows

    def _option_by_option(self, group: Group, reduced: Floats, options: Ints) -> _Rows | None:
        """Take every option 0, 1, 2, ... times; None when that is too long a list."""
        base, longest = self.counts.shape[1], LONG_ROWS if self.thin else MOST_ROWS
        counts = np.concatenate([self.counts, np.zeros((len(self.left), len(reduced)), np.int64)], axis=1)
        rows = replace(self, counts=counts, remaining=np.full(len(self.left), group.count))
        for option in options[:-1].tolist():
            most = _most(rows.left, float(reduced[option]), rows.remaining)
            if len(most) + int(most.sum()) > longest:
                return None
            rows = rows._taking(*_up_to(most), group.menu, option, base, float(reduced[option]))._thinned()
        everything = np.arange(len(rows.left))
        return rows._taking(everything, rows.remaining, group.menu, int(options[-1]), base, 0.0)._thinned()

    def _item_by_item(self, group: Group, reduced: Floats, options: Ints, poll: Callable[[], None]) -> _Rows | None:
        """Give every item in turn an option; None when that is too long a list too."""
        start, taken = np.arange(len(self.left)), np.zeros((len(self.left), len(reduced)), np.int64)
        rows = self
        for _ in range(group.count):
            poll()
            parent, which = np.nonzero(rows.left[:, None] >= reduced[options])
            if len(parent) > MOST_ROWS:
                return None
            option = options[which]
            cost, size = rows.cost[parent] + group.menu.cost[option], rows.size[parent] + group.menu.size[option]
            keep = _front(cost, size, np.zeros(len(cost), np.int64))
            start, taken = start[parent[keep]], taken[parent[keep]]
            taken[np.arange(len(keep)), option[keep]] += 1
            rows = self._with(start, taken, group.menu, reduced)
        return rows

    def _with(self, start: Ints, taken: Ints, menu: Menu, reduced: Floats) -> _Rows:
        """Rows that took so many of each option of one group; equal numbers give equal sums, to the last bit."""
        left, cost, size = self.left[start], self.cost[start], self.size[start]
        for option, number in enumerate(taken.T):
            left = left - number * reduced[option]
            cost, size = cost + number * menu.cost[option], size + number * menu.size[option]
        counts = np.concatenate([self.counts[start], taken], axis=1)
        return _Rows(left, cost, size, counts, np.zeros(len(start), np.int64), self.thin)

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
        keep = _front(self.cost, self.size, self.remaining)
        return _Rows(
            self.left[keep], self.cost[keep], self.size[keep], self.counts[keep], self.remaining[keep], self.thin
        )


def _front(cost: Floats, size: Floats, remaining: Ints) -> Ints:
    """The rows that no row with as many remaining items beats or equals in cost and size."""
    order = np.lexsort((cost, size, remaining))
    rank = np.empty(len(order), np.int64)
    rank[np.argsort(cost[order], kind="stable")] = np.arange(len(order))
    # cheapest so far within each number of remaining items: every next number starts below all ranks before it
    keys = rank - len(order) * (remaining[order] - remaining.min())
    return np.asarray(order[keys < np.concatenate([[keys[0] + 1], np.minimum.accumulate(keys)[:-1]])])


def _most(left: Floats, reduced: float, remaining: Ints) -> Ints:
    """How many items of a row can take an option of reduced cost ``reduced``."""
    if reduced == 0.0:
        return remaining
    return np.minimum(remaining, (left / reduced).astype(np.int64))


def _up_to(most: Ints) -> tuple[Ints, Ints]:
    """Each row index repeated for 0, 1, ... ``most[row]`` items, and those numbers."""
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

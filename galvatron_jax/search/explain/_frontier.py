"""The frontier of memory against throughput: the fastest plan for every of several memory budgets.

Every point is the optimum for its own peak: no plan of the space is faster with as much memory. Between two points lie
further ones, a layer's remat apart; the budgets are spaced so that about ``POINTS`` remain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from ...plan import Plan
from .._engine import Engine
from .._find import best_plan
from .._infeasible import least_peak_bytes
from .._split import Split
from ._scope import explored
from ._summary import peak_of, plan_summary

POINTS = 10
MORE_MEMORY = (2.0, 1.5, 1.25)
"""Larger budgets, as multiples of the given one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The fastest plan within ``peak_bytes``."""

    peak_bytes: int
    tokens_per_s: float
    fits: bool
    """Within the given budget."""
    summary: str
    plan: Plan


def memory_frontier(split: Split, batches: Sequence[int], plan: Plan) -> tuple[Point, ...]:
    """Return the points of the frontier, the most memory first; up to twice the given budget.

    Args:
        split: The problem, with the budget.
        batches: Global batches to choose from.
        plan: Its best plan.
    """
    split = explored(split, plan)
    engine = Engine(split.problem, batches)
    least = least_peak_bytes(engine)
    if least is None:
        return ()
    points: list[Point] = []
    given = split.problem.budget_bytes
    for budget in _budgets(given, least, points):
        best = best_plan(
            replace(split, problem=replace(split.problem, budget_bytes=budget)), batches, prices=engine.prices
        )
        if best is None or best.predicted is None:
            continue
        peak = peak_of(best)
        if all(point.peak_bytes > peak for point in points):
            points.append(
                Point(
                    peak_bytes=peak,
                    tokens_per_s=best.predicted.tokens_per_s,
                    fits=peak <= given,
                    summary=plan_summary(best),
                    plan=best,
                )
            )
    return tuple(points)


def _budgets(given: float, least: float, points: Sequence[Point]) -> Iterator[int]:
    """Yield budgets, falling; each one is below the peak of the point before."""
    for factor in MORE_MEMORY:
        yield int(factor * given)
    yield int(given)
    highest = min([given, *(point.peak_bytes for point in points)])  # of the plan within the given budget
    step = max(1, int((highest - least) / POINTS))
    budget = int(highest) - step
    while budget >= least:
        yield budget
        budget = min(budget - step, points[-1].peak_bytes - 1)
    yield ceil(least) + 8  # each memory category is rounded up to whole bytes

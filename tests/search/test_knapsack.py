from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from galvatron_jax.search._knapsack import Group, Menu, assignments_within, best_dual, cheapest


def random_groups(seed: int) -> tuple[list[Group], float]:
    """Groups of small whole numbers (many ties) or of fractions, and a capacity from too little to plenty."""
    draw = random.Random(seed)

    def value() -> float:
        return float(draw.randint(1, 12)) if seed % 2 else draw.random()

    groups = []
    for _ in range(draw.randint(1, 3)):
        options = draw.randint(1, 4)
        cost, size = np.array([value() for _ in range(options)]), np.array([value() for _ in range(options)])
        groups.append(Group(draw.randint(1, 5), Menu(cost, size, np.arange(options))))
    least = sum(g.count * g.menu.size.min() for g in groups)
    most = sum(g.count * g.menu.size.max() for g in groups)
    return groups, least + (most - least) * draw.uniform(-0.05, 0.9)


def every_assignment(groups: list[Group]) -> list[tuple[float, float, tuple[int, ...]]]:
    """(cost, size, counts) of all assignments."""
    choices = [
        [
            tuple(np.bincount(c, minlength=len(g.menu.cost)).tolist())
            for c in itertools.combinations_with_replacement(range(len(g.menu.cost)), g.count)
        ]
        for g in groups
    ]
    cost, size = (np.concatenate([getattr(g.menu, name) for g in groups]) for name in ("cost", "size"))
    joined = [tuple(itertools.chain(*parts)) for parts in itertools.product(*choices)]
    return [(float(np.dot(counts, cost)), float(np.dot(counts, size)), counts) for counts in joined]


@pytest.mark.parametrize("seed", range(120))
def test_cheapest_equals_trying_all_assignments(seed: int) -> None:
    groups, capacity = random_groups(seed)
    feasible = [cost for cost, size, _ in every_assignment(groups) if size <= capacity]
    found = cheapest(groups, capacity)
    if not feasible:
        assert found is None
    else:
        assert found is not None
        assert found.cost[0] == pytest.approx(min(feasible), rel=1e-12)
        assert found.size[0] <= capacity


@pytest.mark.parametrize("seed", range(60))
def test_assignments_within_a_limit_are_all_listed(seed: int) -> None:
    groups, capacity = random_groups(seed)
    feasible = [(cost, counts) for cost, size, counts in every_assignment(groups) if size <= capacity]
    dual = best_dual(groups, capacity)
    if dual is None:
        assert not feasible
        return
    limit = float(np.quantile([cost for cost, _ in feasible], 0.4))
    listed = {tuple(counts) for counts in assignments_within(groups, capacity, limit, dual).counts.tolist()}
    assert {counts for cost, counts in feasible if cost < limit * (1 - 1e-9)} <= listed
    assert listed <= {counts for cost, counts in feasible if cost <= limit * (1 + 1e-9)}


@pytest.mark.parametrize("seed", range(60))
def test_dual_bound_stays_below_the_optimum(seed: int) -> None:
    groups, capacity = random_groups(seed)
    feasible = [cost for cost, size, _ in every_assignment(groups) if size <= capacity]
    dual = best_dual(groups, capacity)
    assert (dual is None) == (not feasible)
    assert dual is None or dual.bound <= min(feasible) * (1 + 1e-12)


def test_cheapest_with_a_limit_below_the_optimum_is_none() -> None:
    menu = Menu(np.array([1.0, 3.0]), np.array([5.0, 1.0]), np.arange(2))
    # 4 items in 12 bytes: two can take the large option (2 * 5 + 2 * 1 = 12), so 2 * 1 + 2 * 3 = 8
    assert cheapest([Group(4, menu)], 12.0, 7.9) is None
    found = cheapest([Group(4, menu)], 12.0, 8.0)
    assert found is not None
    assert found.counts.tolist() == [[2, 2]]

"""The search against trying everything: small random problems, each under several memory budgets."""

from __future__ import annotations

import pytest

from galvatron_jax.search._engine import Candidate, Engine
from galvatron_jax.search._plan_building import outcome_plan, peak_bytes
from tests.search.brute_force import Tried, every_plan
from tests.search.problems import Small, quantile, small_problem

SAME = 1e-11
"""Sums of some dozen float64 terms, added in another order."""
TIGHTNESS = (0.0, 0.05, 0.3, 1.0)
"""Shares of the distinct peaks of all plans that the budget admits; 0: only the smallest one."""


@pytest.mark.parametrize("seed", range(216))
def test_search_on_a_small_problem_equals_brute_force(seed: int) -> None:
    small = small_problem(seed)
    tried = list(every_plan(*small))
    peaks = [plan.peak_bytes for plan in tried]
    for share in TIGHTNESS:
        check_optimum(small, tried, quantile(peaks, share))
    assert Engine(small.problem(min(peaks) - 64), small.batches).run().candidate is None
    check_bounds(small, tried)


def check_optimum(small: Small, tried: list[Tried], budget: int) -> None:
    best = min(plan.seconds_per_sample for plan in tried if plan.peak_bytes <= budget)
    problem = small.problem(budget)
    outcome = Engine(problem, small.batches).run()
    plan = outcome_plan(problem, outcome)
    assert plan is not None
    assert plan.predicted is not None
    assert outcome.solution is not None
    assert plan.predicted.step_time_s / plan.global_batch == pytest.approx(best, rel=SAME)
    assert outcome.solution.step_time_s == pytest.approx(plan.predicted.step_time_s, rel=SAME)
    assert peak_bytes(plan) <= budget


def check_bounds(small: Small, tried: list[Tried]) -> None:
    engine = Engine(small.problem(1e18), small.batches)
    bounds = {c: max(engine.rough_bound_s(c), engine.whole_bound_s(c)) for c in engine.candidates()}
    for seconds_per_sample, _, plan in tried:
        candidate = Candidate(plan.slices, plan.global_batch, plan.microbatches, plan.schedule, plan.chunks)
        bound_s = bounds.get(candidate, 0.0)  # gpipe of one microbatch is not in the list: it is 1f1b
        assert bound_s <= seconds_per_sample * plan.global_batch * (1 + SAME)

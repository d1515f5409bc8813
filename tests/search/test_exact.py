"""The search against trying everything: small random problems, each under several memory budgets."""

from __future__ import annotations

import math

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
    check_bounds(small, tried, 1e18)
    check_bounds(small, tried, quantile(peaks, TIGHTNESS[2]))


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


def check_bounds(small: Small, tried: list[Tried], budget: float) -> None:
    """No bound of a candidate is above the best of its plans that fit."""
    engine = Engine(small.problem(budget), small.batches)
    best: dict[Candidate, float] = {}
    for seconds_per_sample, peak, plan in tried:
        candidate = Candidate(plan.slices, plan.global_batch, plan.microbatches, plan.schedule, plan.chunks)
        if peak <= budget:
            best[candidate] = min(best.get(candidate, math.inf), seconds_per_sample * plan.global_batch)
    for candidate in engine.candidates():  # gpipe of one microbatch is not among them: it is 1f1b
        most = best.get(candidate, math.inf) * (1 + SAME)
        assert engine.rough_bound_s(candidate) <= most
        assert engine.whole_bound_s(candidate) <= most
        pipeline = engine.refined(candidate)
        assert pipeline is None or pipeline.bound_s <= most
        assert pipeline is not None or candidate not in best

"""From what the search works with to the plan document, and back to its price."""

from __future__ import annotations

from math import inf

import msgspec

from ..cost import estimate_plan
from ..plan import Certificate, HardwareReference, Plan, PlanRun, Stage, Strategy, model_reference
from ._engine import Candidate, Outcome
from ._pricing import Prices, Problem
from ._stage import StageChoice


def priced_plan(
    problem: Problem, candidate: Candidate, stages: tuple[tuple[tuple[str, Strategy, int], ...], ...]
) -> Plan:
    """Return the plan with these stages, each runs of (kind, strategy, layers), and its prediction.

    The prediction is ``cost.estimate_plan``'s: the one objective.
    """
    devices = problem.cluster.devices // candidate.slices
    plan = Plan(
        model=model_reference(problem.model),
        cluster=problem.cluster,
        hardware=HardwareReference(
            name=problem.hardware.name, fingerprint=problem.hardware.fingerprint, measured=problem.hardware.measured
        ),
        training=problem.training,
        memory_budget_bytes=int(problem.budget_bytes),
        global_batch=candidate.global_batch,
        microbatches=candidate.microbatches,
        schedule=candidate.schedule,
        chunks=candidate.chunks,
        stages=tuple(Stage(devices=devices, runs=_merged(runs)) for runs in stages),
    )
    return msgspec.structs.replace(plan, predicted=estimate_plan(plan, problem.model, problem.hardware))


def peak_bytes(plan: Plan) -> int:
    """Return the predicted peak of the fullest stage."""
    assert plan.predicted is not None
    return max(stage.peak_bytes for stage in plan.predicted.stages)


def outcome_plan(problem: Problem, outcome: Outcome) -> Plan | None:
    """Return the plan that the engine found, with its prediction and certificate; None when it found none."""
    if outcome.candidate is None or outcome.solution is None or outcome.prices is None:
        return None
    stages = tuple(_runs(outcome.prices, choice) for choice in outcome.solution.choices)
    plan = priced_plan(problem, outcome.candidate, stages)
    return certified(plan, outcome.bound_s_per_sample if outcome.stopped else inf)


def certified(plan: Plan, bound_s_per_sample: float) -> Plan:
    """Return a priced plan with its certificate: no plan of the space takes less than the bound for one sample."""
    assert plan.predicted is not None
    step_time_s = plan.predicted.step_time_s
    bound_s = min(step_time_s, bound_s_per_sample * plan.global_batch)
    certificate = Certificate(
        optimal=bound_s == step_time_s, lower_bound_s=bound_s, gap=(step_time_s - bound_s) / step_time_s
    )
    return msgspec.structs.replace(plan, certificate=certificate)


def _runs(prices: Prices, choice: StageChoice) -> tuple[tuple[str, Strategy, int], ...]:
    return tuple((prices.kinds[k].name, prices.kinds[k].strategies[row], count) for k, row, count in choice.runs)


def _merged(runs: tuple[tuple[str, Strategy, int], ...]) -> tuple[PlanRun, ...]:
    """Neighbours of one kind and strategy as one run."""
    merged: list[PlanRun] = []
    for kind, strategy, count in runs:
        before = merged[-1] if merged else None
        if before is not None and before.kind == kind and before.strategy == strategy:
            merged[-1] = PlanRun(kind=kind, count=before.count + count, strategy=strategy)
        else:
            merged.append(PlanRun(kind=kind, count=count, strategy=strategy))
    return tuple(merged)

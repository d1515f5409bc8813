"""The best plans of a different kind: one for each family, so that the list is no list of near copies.

A *family* is a number of pipeline stages, a schedule, and the degree (tp or Ulysses) of the model's most frequent layer
kind. Plans of different families differ in how devices are used; within a family (microbatches, batch, ZeRO, remat,
boundaries, the other layers) only the best one counts. Families are searched exactly, one after the other, for plans
that beat the K-th best known, so the list is the K best families of the space. A best plan whose repeated layers mix
degrees is in no family; it is listed as what it is. Which schedules are looked at: ``_scope``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...plan import Plan
from .._find import best_plan
from .._rules import Rule, pin
from .._space import Limits, stage_counts
from .._split import Split
from ._scope import explored_schedules
from ._summary import main_strategies, seconds_per_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The best plan of a family."""

    name: str
    plan: Plan


def best_families(split: Split, batches: Sequence[int], plan: Plan, count: int) -> tuple[Family, ...]:
    """Return the ``count`` best families, ``plan``'s first.

    Args:
        split: The problem that ``plan`` solves.
        batches: Its global batches.
        plan: Its best plan.
        count: How many families.
    """
    found = [Family(name=family_name(plan), plan=plan)]
    for limits in _families(split, plan):
        below = seconds_per_sample(found[count - 1].plan) if len(found) >= count else float("inf")
        best = best_plan(replace(split, problem=replace(split.problem, limits=limits)), batches, below=below)
        if best is not None and all(family.name != family_name(best) for family in found):
            found = sorted(
                [*found, Family(name=family_name(best), plan=best)], key=lambda f: seconds_per_sample(f.plan)
            )
    return tuple(found[:count])


def family_name(plan: Plan) -> str:
    """Return the family of a plan, for example ``"2 stages 1f1b, tp 4"``."""
    degrees = dict.fromkeys((s.tp, s.ulysses) for s, _ in main_strategies(plan))
    words = [f"ulysses {ulysses}" if ulysses > 1 else f"tp {tp}" for tp, ulysses in degrees]
    stages = f"{plan.slices} stages {plan.schedule}" if len(plan.stages) > 1 else "1 stage"
    return f"{stages}, {' and '.join(sorted(words))}"


def _families(split: Split, plan: Plan) -> Iterator[Limits]:
    problem, limits = split.problem, split.problem.limits
    main = max(problem.model.layers, key=lambda run: run.count).kind
    for stages in stage_counts(problem.cluster, problem.model, limits):
        names = explored_schedules(split, plan)
        for schedule in names if stages > 1 else names[:1]:
            for rule in _degrees(split, main, problem.cluster.devices // stages):
                yield replace(limits, stages=(stages,), schedules=(schedule,), rules=(*limits.rules, rule))


def _degrees(split: Split, kind: str, devices: int) -> Iterator[Rule]:
    degrees = split.problem.cluster.tensor_degrees(devices)
    for degree in degrees:
        yield replace(pin(f"tp={degree}, ulysses=1"), kind=kind)
    if split.problem.model.kind(kind).ulysses is not None:
        for degree in degrees[1:]:
            yield replace(pin(f"ulysses={degree}"), kind=kind)

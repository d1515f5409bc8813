"""The part of the space in which questions beside the plan are answered.

A question takes many searches. Each is as exact as the first one, but looks only at the plan's own schedule (1f1b for a
plan without pipeline) unless the user named schedules: interleaved schedules make four fifths of the candidates of a
search, and whether memory or a link binds shows without them.
"""

from __future__ import annotations

from dataclasses import replace

from ...plan import Plan, ScheduleName
from .._split import Split


def explored_schedules(split: Split, plan: Plan) -> tuple[ScheduleName, ...]:
    """Return the schedules that questions about ``plan`` look at."""
    if split.problem.limits.schedules is not None:
        return split.problem.limits.schedules
    return ("1f1b",) if len(plan.stages) == 1 else (plan.schedule,)


def explored(split: Split, plan: Plan) -> Split:
    """Return the problem that questions about ``plan`` look at."""
    limits = replace(split.problem.limits, schedules=explored_schedules(split, plan))
    return replace(split, problem=replace(split.problem, limits=limits))

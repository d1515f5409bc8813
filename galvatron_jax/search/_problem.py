"""The problem that a plan answers, in the whole space."""

from __future__ import annotations

from ._pricing import Problem
from ._space import Limits
from ._split import Split, split_layers
from .explain import Subject


def problem_of(subject: Subject) -> Split:
    """Return the problem that the plan of ``subject`` answers; which part of the space was searched, no plan says."""
    problem = Problem(
        model=subject.model,
        cluster=subject.plan.cluster,
        hardware=subject.hardware,
        training=subject.plan.training,
        budget_bytes=subject.budget_bytes,
        limits=Limits(),
    )
    return split_layers(problem)

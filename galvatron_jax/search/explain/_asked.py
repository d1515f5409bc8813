"""What the user asked for beside the plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..._text import Line
from .._find import SearchResult
from .._inputs import Inputs
from .._options import Options
from ._alternatives import Reason, Subject, plan_reasons
from ._families import Family, best_families
from ._frontier import Point, memory_frontier
from ._lines import binding_lines, family_lines, frontier_lines, reason_lines, scaling_lines, what_if_lines
from ._scaling import Scale, compare_clusters
from ._what_if import WhatIf, what_ifs


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The answers; empty where nothing was asked."""

    reasons: tuple[Reason, ...] = ()
    what_ifs: tuple[WhatIf, ...] = ()
    top: tuple[Family, ...] = ()
    frontier: tuple[Point, ...] = ()
    scaling: tuple[Scale, ...] = ()
    """With a price: this cluster's tokens per unit of currency."""


def asked_values(options: Options, inputs: Inputs, result: SearchResult) -> Asked:
    """Answer what ``options`` ask beside the plan of ``result``."""
    subject = Subject(result.plan, inputs.model, inputs.hardware)
    split, batches, plan = result.split, result.global_batches, result.plan
    return Asked(
        reasons=plan_reasons(subject) if options.explain else (),
        what_ifs=what_ifs(split, batches, plan) if options.explain else (),
        top=best_families(split, batches, plan, options.top) if options.top else (),
        frontier=memory_frontier(split, batches, plan) if options.frontier else (),
        scaling=compare_clusters([inputs.cluster], lambda _: result, options.price_per_hour)
        if options.price_per_hour
        else (),
    )


def asked_lines(asked: Asked, subject: Subject) -> list[Line]:
    """Return the answers as text, an empty line before each."""
    blocks: list[list[Line]] = []
    if asked.reasons:
        blocks += [binding_lines(subject) + reason_lines(subject, asked.reasons)]
    if asked.what_ifs:
        blocks.append(what_if_lines(asked.what_ifs))
    if asked.top:
        blocks.append(family_lines(asked.top))
    if asked.frontier:
        blocks.append(frontier_lines(asked.frontier))
    if asked.scaling:
        blocks.append(scaling_lines(asked.scaling))
    return [line for block in blocks for line in ((), *block)]

"""What if: the best plan with more or less memory, with faster or slower links.

Every answer is a search of its own, in the part of the space that ``_scope`` names; none is needed where less memory is
still enough for the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from ...plan import Plan
from ...profile import Link
from .._find import best_plan
from .._split import Split
from ._scope import explored
from ._summary import peak_of, plan_summary, seconds_per_sample

MEMORY_SHARES = (1.1, 0.9)
LINK_FACTORS = (2.0, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The best plan after a change of what is given."""

    change: str
    gain: float | None
    """Samples per second more, as a share; None when nothing fits."""
    summary: str
    """The plan in a few words."""
    same_plan: bool
    """It is the plan that is best without the change too."""


def what_ifs(split: Split, batches: Sequence[int], plan: Plan) -> tuple[WhatIf, ...]:
    """Return how the best plan changes with the memory and the links.

    Args:
        split: The problem that ``plan`` solves.
        batches: Its global batches.
        plan: Its best plan.
    """
    return tuple(_answer(changed, change, batches, plan) for change, changed in _changes(explored(split, plan)))


def _changes(split: Split) -> Iterator[tuple[str, Split]]:
    problem, cluster = split.problem, split.problem.cluster
    for share in MEMORY_SHARES:
        text = f"{abs(share - 1):.0%} {'more' if share > 1 else 'less'} memory"
        yield text, replace(split, problem=replace(problem, budget_bytes=int(share * problem.budget_bytes)))
    for factor in LINK_FACTORS:
        word = f"{factor:g} x" if factor > 1 else "half the"
        if cluster.nodes > 1:
            yield f"{word} bandwidth between nodes", _faster(split, factor, inside=False)
        if cluster.gpus_per_node > 1:
            yield f"{word} bandwidth inside a node", _faster(split, factor, inside=True)


def _faster(split: Split, factor: float, *, inside: bool) -> Split:
    """Scale a link, and the measured tables of the groups that it bounds."""
    hardware = split.problem.hardware
    tables = tuple(
        msgspec.structs.replace(table, times_s=tuple(t / factor for t in table.times_s))
        if table.inside_node == inside
        else table
        for table in hardware.collectives
    )
    name = "intra_node" if inside else "inter_node"
    link: Link = getattr(hardware, name)
    scaled = msgspec.structs.replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor)
    faster = msgspec.structs.replace(hardware, collectives=tables, **{name: scaled})
    return replace(split, problem=replace(split.problem, hardware=faster))


def _answer(split: Split, change: str, batches: Sequence[int], plan: Plan) -> WhatIf:
    if split.problem.budget_bytes >= peak_of(plan) and split.problem.budget_bytes < (plan.memory_budget_bytes or 0):
        return WhatIf(change=change, gain=0.0, summary=plan_summary(plan), same_plan=True)
    found = best_plan(split, batches)
    if found is None:
        return WhatIf(change=change, gain=None, summary="nothing fits", same_plan=False)
    same = (found.stages, found.global_batch, found.microbatches) == (plan.stages, plan.global_batch, plan.microbatches)
    gain = seconds_per_sample(plan) / seconds_per_sample(found) - 1
    return WhatIf(change=change, gain=gain, summary=plan_summary(found), same_plan=same and found.chunks == plan.chunks)

"""Collectives of a whole train step: those of the gradient program as often as they run, and the optimizer's.

With m microbatches, from ``plan_collectives`` (one microbatch):

    tensor, data, weights, relayout     m times
    gradient, zero 2 and 3              m times: reduced into the sharded accumulator
    gradient, zero 0 and 1; replicas    once, after the last microbatch
    and under zero 1 and 2              one all-gather of the updated parameters that zero shards, in the storage dtype

Parameters that a layer before holds on the same stage (a tied table) are updated there, once.

Not listed: scalars (the global norm for clipping), messages between stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..plan import Plan
from ..profile import ModelProfile
from ._kind import weigh
from ._plan_collectives import PlannedCollective, plan_collectives


def step_collectives(
    plan: Plan, model: ModelProfile, *, sums_before_reducing: bool = False
) -> tuple[PlannedCollective, ...]:
    """Return the collectives of one train step, layer by layer; arguments and errors as ``plan_collectives``."""
    listed = plan_collectives(plan, model, sums_before_reducing=sums_before_reducing)
    repeated = [item if item.once else _times(item, plan.microbatches) for item in listed]
    return (*repeated, *_updated_parameters(plan, model))


def _times(item: PlannedCollective, microbatches: int) -> PlannedCollective:
    return dataclasses.replace(item, count=microbatches * item.count, bytes=microbatches * item.bytes)


def _updated_parameters(plan: Plan, model: ModelProfile) -> Iterator[PlannedCollective]:
    for position, (name, strategy) in enumerate(plan.layers()):
        weights = weigh(model.kind(name), strategy.tp, strategy.zero_ranks)
        divided = (weights.own_divided if len(plan.stages) == 1 else weights.divided).stored
        if strategy.zero in (1, 2) and divided:
            yield PlannedCollective(
                kind="all-gather",
                cause="weights",
                phase="forward",  # of the next step: nothing but the update comes between
                layer=position,
                layer_kind=name,
                group=strategy.zero_ranks,
                count=1,
                bytes=divided,
            )

"""The plan to take when one has failed: out of memory, or a program that XLA cannot compile or run.

It is searched as the failed one was, with more memory held back or within limits that exclude what failed, written to
the run's folder and named in the message. It is taken on request only: what failed once may have had another cause.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .._sharded_model import ShardedModel
from ..errors import GalvatronError
from ..plan import Plan, save_plan
from ..profile import HardwareProfile
from ..units import format_gib, format_seconds
from ._plans import plan_text

NEXT_PLAN_NAME = "next-plan.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Of the search; None: none."""

    max_stages: int | None = None
    max_tp: int | None = None


def simpler_than(plan: Plan) -> Limits | None:
    """Return limits within which ``plan`` is not found again: no pipeline, or less tensor parallelism.

    None where it has neither: then there is nothing simpler.
    """
    tp = max(run.strategy.tp for stage in plan.stages for run in stage.runs)
    if len(plan.stages) > 1:
        return Limits(max_stages=1)
    return Limits(max_stages=1, max_tp=tp // 2) if tp > 1 else None


def offer_plan(
    sharded: ShardedModel, hardware: HardwareProfile, limits: Limits | None, folder: Path
) -> tuple[Plan | None, str]:
    """Search the plan to take next and keep it in the run's folder; return it, and what to tell the user.

    Args:
        sharded: The model under the plan that failed.
        hardware: What to price with.
        limits: Of the search; None: there is nothing to search.
        folder: Of the run.
    """
    if limits is None:
        return None, "there is no simpler plan to offer"
    try:
        plan = sharded.next_plan(hardware, max_stages=limits.max_stages, max_tp=limits.max_tp)
    except GalvatronError as error:
        return None, f"no other plan can be offered: {error.problem}"
    path, predicted = save_plan(plan, folder / NEXT_PLAN_NAME), plan.predicted
    assert predicted is not None, "a search predicts"
    peak = format_gib(max(stage.peak_bytes for stage in predicted.stages))
    figures = f"predicted {peak} and {format_seconds(predicted.step_time_s)} per step"
    return plan, f"the next plan is in {path} ({figures}; {plan_text(plan)})"

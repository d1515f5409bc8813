"""Plans that differ from a given one in the strategy of some layers, priced like any plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from ...cost import estimate_plan
from ...plan import Plan, PlanRun, Stage, Strategy
from ...profile import HardwareProfile, ModelProfile


class Place(NamedTuple):
    """Where a layer stands in a plan."""

    stage: int
    run: PlanRun
    layers: range
    """All layers of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a plan costs: figures of ``cost.estimate_plan``."""

    step_time_s: float
    peak_bytes: int
    """Of the fullest stage."""
    fits: bool


def places(plan: Plan) -> Iterator[Place]:
    """Yield the runs of a plan in layer order."""
    first = 0
    for s, stage in enumerate(plan.stages):
        for run in stage.runs:
            yield Place(s, run, range(first, first + run.count))
            first += run.count


def place_of(plan: Plan, layer: int) -> Place:
    """Return where ``layer`` stands (IndexError when there is none)."""
    for place in places(plan):
        if layer in place.layers:
            return place
    raise IndexError(layer)


def with_strategy(plan: Plan, layers: Collection[int], strategy: Strategy) -> Plan:
    """Return ``plan`` with another strategy for ``layers``, without prediction and certificate."""
    stages, at = [], 0
    for stage in plan.stages:
        runs: list[PlanRun] = []
        for kind, present in stage.layers():
            chosen = strategy if at in layers else present
            if runs and (runs[-1].kind, runs[-1].strategy) == (kind, chosen):
                runs[-1] = msgspec.structs.replace(runs[-1], count=runs[-1].count + 1)
            else:
                runs.append(PlanRun(kind=kind, count=1, strategy=chosen))
            at += 1
        stages.append(Stage(devices=stage.devices, runs=tuple(runs)))
    return msgspec.structs.replace(plan, stages=tuple(stages), predicted=None, certificate=None)


def price(plan: Plan, model: ModelProfile, hardware: HardwareProfile, budget_bytes: int) -> Price:
    """Return what ``plan`` costs."""
    predicted = estimate_plan(plan, model, hardware)
    peak = max(stage.peak_bytes for stage in predicted.stages)
    return Price(step_time_s=predicted.step_time_s, peak_bytes=peak, fits=peak <= budget_bytes)

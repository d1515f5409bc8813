"""What a plan does when, and what it holds meanwhile: for pictures.

The times are those of ``simulate``; the last end is the step time. Residuals of a microbatch are held from the start of
its forward pass to the end of its backward pass, the live layer while a backward pass runs, so the highest sum with the
states is the predicted peak (``_memory``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..events import Compute
from ..plan import Plan
from ..profile import HardwareProfile, ModelProfile
from ..schedule import build_schedule
from ._layer import estimate_layer
from ._pipeline import StageTime, play
from ._plan_cost import stage_setting, stage_times


class Span(NamedTuple):
    """One thing that a slice of devices does."""

    what: Literal["forward", "backward", "step end"]
    start_s: float
    end_s: float
    microbatch: int | None = None
    chunk: int = 0


class MemoryLevel(NamedTuple):
    """What a slice holds beside its states during one of its spans."""

    start_s: float
    end_s: float
    residual_bytes: float
    live_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTimeline:
    """One step, by slice of devices."""

    step_time_s: float
    spans: tuple[tuple[Span, ...], ...]
    levels: tuple[tuple[MemoryLevel, ...], ...]


def plan_timeline(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> PlanTimeline:
    """Return what ``plan`` does when.

    Args:
        plan: A plan for ``model``.
        model: The model's profile at the plan's sequence length and dtype.
        hardware: The devices.

    Raises:
        PlanError: the plan contradicts itself or the model.
    """
    times, transfers = stage_times(plan, model, hardware)
    schedule = build_schedule(plan.schedule, plan.slices, plan.microbatches, plan.chunks)
    ends = play(schedule, times, transfers)
    spans = []
    for s, actions in enumerate(schedule):
        row = []
        for phase, microbatch, chunk in actions:
            stage = chunk * plan.slices + s
            end = ends[Compute(stage, phase, microbatch)]
            row.append(Span(phase, end - _duration(times[stage], phase), end, microbatch, chunk))
        last = row[-1].end_s
        row.append(Span("step end", last, last + sum(time.step_end_s for time in times[s :: plan.slices])))
        spans.append(tuple(row))
    sizes = [_stage_bytes(plan, k, model, hardware) for k in range(len(plan.stages))]
    return PlanTimeline(
        step_time_s=max(row[-1].end_s for row in spans),
        spans=tuple(spans),
        levels=tuple(_levels(row, sizes[s :: plan.slices]) for s, row in enumerate(spans)),
    )


def _duration(time: StageTime, phase: str) -> float:
    return time.forward_s if phase == "forward" else time.backward_s


def _stage_bytes(plan: Plan, k: int, model: ModelProfile, hardware: HardwareProfile) -> tuple[float, float]:
    """(residuals of one microbatch, largest live layer) of a stage."""
    stage = plan.stages[k]
    setting = stage_setting(plan, stage, model, hardware)
    costs = [(estimate_layer(model.kind(run.kind), run.strategy, setting), run.count) for run in stage.runs]
    return sum(count * cost.residual_bytes for cost, count in costs), max(cost.live_bytes for cost, _ in costs)


def _levels(spans: tuple[Span, ...], sizes: list[tuple[float, float]]) -> tuple[MemoryLevel, ...]:
    """Residuals and live bytes of a slice; the live part is that of its largest layer, as the peak counts it."""
    levels, held, before = [], 0.0, 0.0
    live = max(size for _, size in sizes)
    for span in spans:
        levels.append(MemoryLevel(before, span.start_s, held, 0.0))
        if span.what == "forward":
            held += sizes[span.chunk][0]
        backward = span.what == "backward"
        levels.append(MemoryLevel(span.start_s, span.end_s, held, live if backward else 0.0))
        if backward:
            held -= sizes[span.chunk][0]
        before = span.end_s
    return tuple(level for level in levels if level.end_s > level.start_s)

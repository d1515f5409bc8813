"""The predicted step as Trace Event JSON, which ui.perfetto.dev and chrome://tracing open.

Format: "Trace Event Format" (Google, 2016): complete events ``X`` with microseconds ``ts`` and ``dur``, one process for
each slice of devices, counters ``C`` for the bytes held beside the states, metadata ``M`` for names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..cost import PlanTimeline, Span, plan_timeline
from ..plan import Plan
from ..profile import HardwareProfile, ModelProfile

_US = 1e6


def trace_events(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> dict[str, Any]:
    """Return the document: one step of ``plan`` as the cost model plays it.

    Args:
        plan: A plan for ``model``.
        model: The model's profile at the plan's sequence length and dtype.
        hardware: The devices.
    """
    timeline = plan_timeline(plan, model, hardware)
    return {
        "traceEvents": [*_names(plan), *_spans(plan, timeline), *_memory(timeline)],
        "displayTimeUnit": "ms",
        "otherData": {"what": "predicted by galvatron_jax, no clock ran", "step_time_s": timeline.step_time_s},
    }


def _names(plan: Plan) -> Iterator[dict[str, Any]]:
    devices = plan.stages[0].devices
    for s in range(plan.slices):
        text = f"devices {s * devices}-{(s + 1) * devices - 1}" if devices > 1 else f"device {s}"
        yield {"name": "process_name", "ph": "M", "pid": s, "tid": 0, "args": {"name": text}}


def _spans(plan: Plan, timeline: PlanTimeline) -> Iterator[dict[str, Any]]:
    for s, spans in enumerate(timeline.spans):
        for span in spans:
            if span.end_s > span.start_s:
                yield {
                    "name": _name(span, plan),
                    "cat": span.what,
                    "ph": "X",
                    "pid": s,
                    "tid": 0,
                    "ts": span.start_s * _US,
                    "dur": (span.end_s - span.start_s) * _US,
                    "args": {"stage": span.chunk * plan.slices + s, "microbatch": span.microbatch},
                }


def _name(span: Span, plan: Plan) -> str:
    if span.microbatch is None:
        return "gradient sync and optimizer"
    chunk = f" chunk {span.chunk}" if plan.chunks > 1 else ""
    return f"{span.what} {span.microbatch}{chunk}"


def _memory(timeline: PlanTimeline) -> Iterator[dict[str, Any]]:
    for s, levels in enumerate(timeline.levels):
        for level in levels:
            held = {"residuals": level.residual_bytes, "live layer": level.live_bytes}
            yield {"name": "bytes beside states", "ph": "C", "pid": s, "ts": level.start_s * _US, "args": held}

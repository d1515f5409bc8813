"""Step time of a pipeline: its events, played through.

With S device slices, stage k lives on slice ``k % S`` (one stage each, or several chunks: ``schedule``). The events are
those that the runtime runs, in its order (``events.global_order``): computes, and messages between two slices. A slice
does one event after the other,

    start(compute) = max(end(event before it on its slice), arrival of its value)
    step time      = max over slices of end(last event) + step ends of its stages

and a message takes its seconds in one of two ways (docs/design/0083):

* between nodes it is one program of both sides, which neither stream passes: an event of both slices, that starts when
  both have come to it. It holds the receiver until it is there, and the sender as long, or less where buffers take some
  of it (``HardwareProfile.eager_bytes``, docs/design/0093);
* inside a node (one process) it is a copy beside compute: it starts when its value is made and delays the receiver.

The order does not depend on the times, so the step time is the longest path of a graph that all plans of a schedule
share; all weights enter with a plus sign, so it never falls while any of them rises. Every slice can be the bound.
For equal stages without transfers, 1F1B and GPipe both give (m + p - 1)(f + b) (Narayanan et al. 2021, section 2.2),
and v chunks of f / v and b / v each give (m + (p - 1) / v)(f + b) (the same, section 2.2.2).
Complexity: O(stages * microbatches) for a known order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..events import Compute, global_order
from ..schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Seconds of one stage."""

    forward_s: float
    """One microbatch."""
    backward_s: float
    """One microbatch."""
    step_end_s: float
    """Once per step, after the last action: exposed gradient synchronisation and the optimizer update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What happens in one step, by device slice (one stage each, unless the schedule is interleaved)."""

    step_time_s: float
    busy_s: tuple[float, ...]
    """Seconds that each slice computes or communicates inside its stages, its step end included; not its messages."""
    end_s: tuple[float, ...]
    """When each slice is done, its step end included."""

    @property
    def bubble_s(self) -> tuple[float, ...]:
        """Seconds that each slice waits for others or for messages within the step."""
        return tuple(self.step_time_s - busy for busy in self.busy_s)

    @property
    def slowest_slice(self) -> int:
        """The slice that is done last (the busiest of equals)."""
        return max(range(len(self.end_s)), key=lambda s: (self.end_s[s], self.busy_s[s]))


class Crossing(NamedTuple):
    """A message over one stage boundary, in either direction."""

    seconds: float
    meets: bool = True
    """It starts when both slices have come to it, and holds both; else it delays the receiver only."""
    sender_s: float = math.inf
    """Where it holds both, the seconds until the sender is free, if that is before the message is there."""

    @property
    def held_s(self) -> float:
        """Seconds that the sender of a message that holds both is held."""
        return min(self.seconds, self.sender_s)


def simulate(schedule: Schedule, stages: Sequence[StageTime], crossings: Sequence[Crossing]) -> Timeline:
    """Return when everything happens, and so how long a step takes.

    Args:
        schedule: Action lists, one per slice (``schedule.build_schedule``).
        stages: Seconds of each stage; a multiple of the slices.
        crossings: A message over each of the ``len(stages) - 1`` boundaries.

    Raises:
        PlanError: the schedule waits for itself.
    """
    if len(stages) == 1:
        return _one_stage(schedule, stages[0])
    _, clock = _play(schedule, stages, crossings)
    return _timeline(schedule, stages, clock)


def play(schedule: Schedule, stages: Sequence[StageTime], crossings: Sequence[Crossing]) -> dict[Compute, float]:
    """Return when every action ends; arguments and errors as ``simulate``."""
    return _play(schedule, stages, crossings)[0]


def _play(
    schedule: Schedule, stages: Sequence[StageTime], crossings: Sequence[Crossing]
) -> tuple[dict[Compute, float], list[float]]:
    """Return when every action ends, and when every slice is done with its last event."""
    slices = len(schedule)
    clock = [0.0] * slices
    ends: dict[Compute, float] = {}
    arrivals: dict[Compute, float] = {}
    for event in global_order(schedule, len(stages)):
        if isinstance(event, Compute):
            stage, s = stages[event.stage], event.stage % slices
            begin = max(clock[s], arrivals.get(event, 0.0))
            clock[s] = ends[event] = begin + (stage.forward_s if event.phase == "forward" else stage.backward_s)
        elif crossings[event.boundary].meets:
            source, target, crossing = event.source % slices, event.target % slices, crossings[event.boundary]
            begin = max(clock[source], clock[target])
            clock[source], clock[target] = begin + crossing.held_s, begin + crossing.seconds
        else:
            arrivals[event.taker] = ends[event.maker] + crossings[event.boundary].seconds
    return ends, clock


def _one_stage(schedule: Schedule, stage: StageTime) -> Timeline:
    """No stage to wait for: the sum, as microbatches * (forward + backward) + step end."""
    microbatches = len(schedule[0]) // 2
    end = microbatches * (stage.forward_s + stage.backward_s) + stage.step_end_s
    return Timeline(step_time_s=end, busy_s=(end,), end_s=(end,))


def _timeline(schedule: Schedule, stages: Sequence[StageTime], clock: Sequence[float]) -> Timeline:
    slices = len(schedule)
    step_ends = [sum(stage.step_end_s for stage in stages[s::slices]) for s in range(slices)]
    ends = tuple(end + step_end for end, step_end in zip(clock, step_ends, strict=True))
    microbatches = len(schedule[0]) * slices // len(stages) // 2
    busy = tuple(
        sum(microbatches * (stage.forward_s + stage.backward_s) for stage in stages[s::slices]) + step_ends[s]
        for s in range(slices)
    )
    return Timeline(step_time_s=max(ends), busy_s=busy, end_s=ends)

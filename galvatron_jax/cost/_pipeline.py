"""Step time of a pipeline: the schedule itself, played through.

With S device slices, stage k lives on slice ``k % S`` (one stage each, or several chunks: ``schedule``). An action of a
slice starts when the slice has finished its action before and the value that it consumes has arrived:

    start(forward i of stage k)  >= end(forward i of k - 1)  + transfer(k - 1)
    start(backward i of stage k) >= end(backward i of k + 1) + transfer(k)      last stage: end(its forward i)
    step time                    = max over slices of end(last action) + step ends of its stages

Messages travel beside compute, so a transfer delays the receiver and occupies nobody. The step time is the longest
path of this graph; all weights enter with a plus sign, so it never falls while any of them rises. Every slice can be
the bound.
For equal stages without transfers, 1F1B and GPipe both give (m + p - 1)(f + b) (Narayanan et al. 2021, section 2.2),
and v chunks of f / v and b / v each give (m + (p - 1) / v)(f + b) (the same, section 2.2.2).
Complexity: O(stages * microbatches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PlanError
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
    """Seconds that each slice computes or communicates, its step end included."""
    end_s: tuple[float, ...]
    """When each slice is done, its step end included."""

    @property
    def bubble_s(self) -> tuple[float, ...]:
        """Seconds that each slice is idle within the step."""
        return tuple(self.step_time_s - busy for busy in self.busy_s)

    @property
    def slowest_slice(self) -> int:
        """The slice that is done last (the busiest of equals)."""
        return max(range(len(self.end_s)), key=lambda s: (self.end_s[s], self.busy_s[s]))


def simulate(schedule: Schedule, stages: Sequence[StageTime], transfer_s: Sequence[float]) -> Timeline:
    """Return when everything happens, and so how long a step takes.

    Args:
        schedule: Action lists, one per slice (``schedule.build_schedule``).
        stages: Seconds of each stage; a multiple of the slices.
        transfer_s: Seconds of a message over each of the ``len(stages) - 1`` boundaries, in either direction.

    Raises:
        PlanError: the schedule waits for itself.
    """
    slices = len(schedule)
    if len(stages) == 1:
        return _one_stage(schedule, stages[0])
    ends = play(schedule, stages, transfer_s)
    last = [actions[-1] for actions in schedule]
    clock = [ends[chunk * slices + s, phase, microbatch] for s, (phase, microbatch, chunk) in enumerate(last)]
    return _timeline(schedule, stages, clock)


def play(
    schedule: Schedule, stages: Sequence[StageTime], transfer_s: Sequence[float]
) -> dict[tuple[int, str, int], float]:
    """Return when every action ends, by (stage, phase, microbatch); arguments and errors as ``simulate``."""
    slices = len(schedule)
    clock, position = [0.0] * slices, [0] * slices
    ends: dict[tuple[int, str, int], float] = {}
    left, moved = sum(len(actions) for actions in schedule), True
    while left and moved:
        moved = False
        for s, actions in enumerate(schedule):
            while position[s] < len(actions):
                phase, microbatch, chunk = actions[position[s]]
                k = chunk * slices + s
                ready = _arrival(ends, k, phase, microbatch, transfer_s)
                if ready is None:
                    break
                clock[s] = max(clock[s], ready) + (stages[k].forward_s if phase == "forward" else stages[k].backward_s)
                ends[k, phase, microbatch] = clock[s]
                position[s] += 1
                left, moved = left - 1, True
    if left:
        raise PlanError(
            f"the schedule waits for itself with {left} actions left", action="use a schedule of galvatron_jax.schedule"
        )
    return ends


def _arrival(
    ends: dict[tuple[int, str, int], float], stage: int, phase: str, microbatch: int, transfer_s: Sequence[float]
) -> float | None:
    """When the value that an action consumes is there; None when its producer has not run."""
    last = len(transfer_s)
    if phase == "forward":
        if stage == 0:
            return 0.0
        source, wire = (stage - 1, "forward", microbatch), transfer_s[stage - 1]
    elif stage == last:
        source, wire = (stage, "forward", microbatch), 0.0
    else:
        source, wire = (stage + 1, "backward", microbatch), transfer_s[stage]
    end = ends.get(source)
    return None if end is None else end + wire


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

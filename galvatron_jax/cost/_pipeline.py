"""Step time of a pipeline: the schedule itself, played through.

Action a of stage s starts when the stage has finished its action before and the value that a consumes has arrived:

    start(s, forward i)  >= end(s - 1, forward i)  + transfer(s - 1)
    start(s, backward i) >= end(s + 1, backward i) + transfer(s)          last stage: end(s, forward i)
    step time            = max over s of end(s, last action) + step_end(s)

Messages travel beside compute, so a transfer delays the receiver and occupies nobody. The step time is the longest
path of this graph; all weights enter with a plus sign, so it never falls while any of them rises. Every stage can be
the bound.
For equal stages without transfers, 1F1B and GPipe both give (m + p - 1)(f + b) (Narayanan et al. 2021, section 2.2).
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
    """What happens in one step."""

    step_time_s: float
    busy_s: tuple[float, ...]
    """Seconds that each stage computes or communicates, its step end included."""
    end_s: tuple[float, ...]
    """When each stage is done, its step end included."""

    @property
    def bubble_s(self) -> tuple[float, ...]:
        """Seconds that each stage is idle within the step."""
        return tuple(self.step_time_s - busy for busy in self.busy_s)

    @property
    def slowest_stage(self) -> int:
        """The stage that is done last (the busiest of equals)."""
        return max(range(len(self.end_s)), key=lambda s: (self.end_s[s], self.busy_s[s]))


def simulate(schedule: Schedule, stages: Sequence[StageTime], transfer_s: Sequence[float]) -> Timeline:
    """Return when everything happens, and so how long a step takes.

    Args:
        schedule: Action lists, one per stage (``schedule.build_schedule``).
        stages: Seconds of each stage.
        transfer_s: Seconds of a message over each of the ``len(stages) - 1`` boundaries, in either direction.

    Raises:
        PlanError: the schedule waits for itself.
    """
    if len(stages) == 1:
        return _one_stage(schedule, stages[0])
    ends = play(schedule, stages, transfer_s)
    return _timeline(
        schedule, stages, [max(end for key, end in ends.items() if key[0] == s) for s in range(len(stages))]
    )


def play(
    schedule: Schedule, stages: Sequence[StageTime], transfer_s: Sequence[float]
) -> dict[tuple[int, str, int], float]:
    """Return when every action ends, by (stage, phase, microbatch); arguments and errors as ``simulate``."""
    clock, position = [0.0] * len(stages), [0] * len(stages)
    ends: dict[tuple[int, str, int], float] = {}
    left, moved = sum(len(actions) for actions in schedule), True
    while left and moved:
        moved = False
        for s, actions in enumerate(schedule):
            while position[s] < len(actions):
                phase, microbatch, _ = actions[position[s]]
                ready = _arrival(ends, s, phase, microbatch, transfer_s)
                if ready is None:
                    break
                duration = stages[s].forward_s if phase == "forward" else stages[s].backward_s
                clock[s] = max(clock[s], ready) + duration
                ends[s, phase, microbatch] = clock[s]
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
    ends = tuple(end + stage.step_end_s for end, stage in zip(clock, stages, strict=True))
    busy = tuple(
        len(actions) // 2 * (stage.forward_s + stage.backward_s) + stage.step_end_s
        for actions, stage in zip(schedule, stages, strict=True)
    )
    return Timeline(step_time_s=max(ends), busy_s=busy, end_s=ends)

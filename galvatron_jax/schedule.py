"""Pipeline schedules as lists of actions: simulated by ``cost``, executed by ``runtime``, defined once here.

Each stage runs its list in order; an action waits for the value that it consumes: a forward action of stage ``s > 0``
for the forward of stage ``s - 1`` on the same microbatch, a backward action for the backward of stage ``s + 1`` (on the
last stage: for its own forward).

* ``gpipe``: all forwards, then all backwards; a stage holds the residuals of all microbatches.
* ``1f1b``: ``stages - 1 - s`` forwards to fill, then one forward and one backward in turn, then the remaining
  backwards (PipeDream-Flush, Narayanan et al. 2021, section 2.2.1); stage ``s`` holds at most ``stages - s``
  microbatches.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Schedule = tuple[tuple["Action", ...], ...]
"""One list of actions per stage."""


class Action(NamedTuple):
    """One program call of a stage."""

    phase: Literal["forward", "backward"]
    microbatch: int


def build_schedule(name: str, stages: int, microbatches: int) -> Schedule:
    """Return the action lists of the schedule ``name`` (``"gpipe"`` or ``"1f1b"``).

    Args:
        name: Schedule name.
        stages: Number of pipeline stages, at least 1.
        microbatches: Number of microbatches per step, at least 1.
    """
    return tuple(_stage_actions(name, stage, stages, microbatches) for stage in range(stages))


def in_flight_microbatches(name: str, stage: int, stages: int, microbatches: int) -> int:
    """Return the most microbatches whose residuals ``stage`` holds at once."""
    return microbatches if name == "gpipe" else min(stages - stage, microbatches)


def _stage_actions(name: str, stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    forwards = [Action("forward", m) for m in range(microbatches)]
    backwards = [Action("backward", m) for m in range(microbatches)]
    ahead = in_flight_microbatches(name, stage, stages, microbatches)
    actions = forwards[:ahead]
    for done, backward in enumerate(backwards):
        actions.append(backward)
        actions += forwards[ahead + done : ahead + done + 1]
    return tuple(actions)

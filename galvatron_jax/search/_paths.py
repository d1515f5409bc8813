"""The step time of a pipeline and the chain of actions that decides it.

The step time is the longest path through the schedule's graph (``cost.simulate``). A path passes ``a[s]`` forwards
and ``b[s]`` backwards of stage ``s``, crosses boundary ``s`` ``k[s]`` times and ends with the step end of one stage,
so

    step time = max over paths of
        sum_s (a[s] forward[s] + b[s] backward[s] + c[s] step_end[s]) + sum_s k[s] transfer[s]

Each path is a linear lower bound on the step time of *every* plan with the same schedule. Complexity: O(stages *
microbatches).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..schedule import Schedule
from ._stage import StageChoice, Weights


class Path(NamedTuple):
    """A chain of actions, by how often each quantity occurs in it."""

    weights: tuple[Weights, ...]
    crossings: tuple[int, ...]


def bottleneck_path(stages: int, microbatches: int, bottleneck: int) -> Path:
    """Return the path that waits for one stage all the time, and ends with the step end of the first stage.

    The first microbatch's forwards up to the stage, all its actions, the last microbatch's backwards back to the
    first stage.
    """
    weights = [Weights(1.0, 1.0, 0.0)] * bottleneck + [Weights(0.0, 0.0, 0.0)] * (stages - bottleneck)
    weights[bottleneck] = Weights(float(microbatches), float(microbatches), 0.0)
    weights[0] = weights[0]._replace(step_end=1.0)
    return Path(tuple(weights), tuple(2 if s < bottleneck else 0 for s in range(stages - 1)))


def longest_path(schedule: Schedule, stages: Sequence[StageChoice], transfer_s: Sequence[float]) -> tuple[float, Path]:
    """Return the step time in seconds and a path that takes as long.

    Args:
        schedule: Action lists, one per stage.
        stages: The stages' times.
        transfer_s: Seconds of a message over each boundary, in either direction.
    """
    if len(stages) == 1:
        path = bottleneck_path(1, len(schedule[0]) // 2, 0)
        return stages[0].cost(path.weights[0]), path
    ends, waits = _play(schedule, stages, transfer_s)
    finish = [ends[s][-1] + stage.step_end_s for s, stage in enumerate(stages)]
    last = max(range(len(stages)), key=lambda s: finish[s])
    return finish[last], _trace(schedule, waits, last)


def _play(
    schedule: Schedule, stages: Sequence[StageChoice], transfer_s: Sequence[float]
) -> tuple[list[list[float]], list[list[int]]]:
    """Return when each action ends, and which stage it waited for (its own when it waited for its stage only)."""
    count = len(schedule)
    done: tuple[list[dict[int, float]], list[dict[int, float]]] = (
        [{} for _ in range(count)],
        [{} for _ in range(count)],
    )
    ends: list[list[float]] = [[] for _ in range(count)]
    waits: list[list[int]] = [[] for _ in range(count)]
    moved = True
    while moved:
        moved = False
        for s, actions in enumerate(schedule):
            while len(ends[s]) < len(actions):
                phase, microbatch, _ = actions[len(ends[s])]
                backward = phase == "backward"
                source = min(s + 1, count - 1) if backward else max(s - 1, 0)
                ready = 0.0 if source == s else done[backward][source].get(microbatch)
                if ready is None:
                    break
                ready += transfer_s[min(s, source)] if source != s else 0.0
                free = ends[s][-1] if ends[s] else 0.0
                end = max(free, ready) + (stages[s].backward_s if backward else stages[s].forward_s)
                waits[s].append(source if ready > free else s)
                ends[s].append(end)
                done[backward][s][microbatch] = end
                moved = True
    return ends, waits


def _trace(schedule: Schedule, waits: Sequence[Sequence[int]], last: int) -> Path:
    """Walk back from the end of stage ``last`` to the start of the step."""
    position = [{action: i for i, action in enumerate(actions)} for actions in schedule]
    forward, backward = [0] * len(schedule), [0] * len(schedule)
    crossings = [0] * (len(schedule) - 1)
    stage, at = last, len(schedule[last]) - 1
    while at >= 0:
        action = schedule[stage][at]
        (forward if action.phase == "forward" else backward)[stage] += 1
        source = waits[stage][at]
        if source == stage:
            at -= 1
        else:
            crossings[min(stage, source)] += 1
            stage, at = source, position[source][action]
    weights = tuple(
        Weights(float(f), float(b), float(s == last)) for s, (f, b) in enumerate(zip(forward, backward, strict=True))
    )
    return Path(weights, tuple(crossings))

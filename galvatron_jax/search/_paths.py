"""The step time of a pipeline and the chain of actions that decides it.

The step time is the longest path through the schedule's graph (``cost.simulate``). A path passes ``a[k]`` forwards
and ``b[k]`` backwards of stage ``k``, crosses boundary ``k`` ``x[k]`` times and ends with the step ends of one slice,
so

    step time = max over paths of
        sum_k (a[k] forward[k] + b[k] backward[k] + c[k] step_end[k]) + sum_k x[k] transfer[k]

Each path is a linear lower bound on the step time of *every* plan with the same schedule. Complexity: O(stages *
microbatches).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..schedule import Action, Schedule
from ._stage import StageChoice, Weights


class Path(NamedTuple):
    """A chain of actions, by how often each quantity occurs in it."""

    weights: tuple[Weights, ...]
    """By stage."""
    crossings: tuple[int, ...]
    """By boundary."""

    def of_slice(self, s: int, slices: int) -> tuple[Weights, ...]:
        """Return the weights of the stages on slice ``s``."""
        return self.weights[s::slices]


def bottleneck_path(slices: int, microbatches: int, bottleneck: int, chunks: int = 1) -> Path:
    """Return the path that waits for one slice all the time, and ends with the step ends of the first slice.

    The first microbatch's forwards up to the slice, all its actions, the last microbatch's backwards back to the
    first slice. It is a path of every schedule.
    """
    m, stages = float(microbatches), slices * chunks
    counts = [m if k % slices == bottleneck else 1.0 if k < bottleneck else 0.0 for k in range(stages)]
    weights = tuple(Weights(n, n, float(k % slices == 0)) for k, n in enumerate(counts))
    return Path(weights, tuple(2 if k < bottleneck else 0 for k in range(stages - 1)))


def longest_path(schedule: Schedule, stages: Sequence[StageChoice], transfer_s: Sequence[float]) -> tuple[float, Path]:
    """Return the step time in seconds and a path that takes as long.

    Args:
        schedule: Action lists, one per slice.
        stages: The stages' times.
        transfer_s: Seconds of a message over each boundary, in either direction.
    """
    if len(stages) == 1:
        path = bottleneck_path(1, len(schedule[0]) // 2, 0)
        return stages[0].cost(path.weights[0]), path
    slices = len(schedule)
    ends, waits = _play(schedule, stages, transfer_s)
    finish = [ends[s][-1] + sum(stage.step_end_s for stage in stages[s::slices]) for s in range(slices)]
    last = max(range(slices), key=lambda s: finish[s])
    return finish[last], _trace(schedule, waits, last, len(stages))


def _play(
    schedule: Schedule, stages: Sequence[StageChoice], transfer_s: Sequence[float]
) -> tuple[list[list[float]], list[list[int]]]:
    """Return when each action of each slice ends, and which stage it waited for (-1 when for its slice only)."""
    slices, count = len(schedule), len(stages)
    done: tuple[list[dict[int, float]], list[dict[int, float]]] = (
        [{} for _ in range(count)],
        [{} for _ in range(count)],
    )
    ends: list[list[float]] = [[] for _ in range(slices)]
    waits: list[list[int]] = [[] for _ in range(slices)]
    moved = True
    while moved:
        moved = False
        for s, actions in enumerate(schedule):
            while len(ends[s]) < len(actions):
                phase, microbatch, chunk = actions[len(ends[s])]
                k, backward = chunk * slices + s, phase == "backward"
                source = min(k + 1, count - 1) if backward else max(k - 1, 0)
                ready = 0.0 if source == k else done[backward][source].get(microbatch)
                if ready is None:
                    break
                ready += transfer_s[min(k, source)] if source != k else 0.0
                free = ends[s][-1] if ends[s] else 0.0
                end = max(free, ready) + (stages[k].backward_s if backward else stages[k].forward_s)
                waits[s].append(source if ready > free else -1)
                ends[s].append(end)
                done[backward][k][microbatch] = end
                moved = True
    return ends, waits


def _trace(schedule: Schedule, waits: Sequence[Sequence[int]], last: int, stages: int) -> Path:
    """Walk back from the end of slice ``last`` to the start of the step."""
    slices = len(schedule)
    position = [{action: i for i, action in enumerate(actions)} for actions in schedule]
    forward, backward, crossings = [0] * stages, [0] * stages, [0] * (stages - 1)
    s, at = last, len(schedule[last]) - 1
    while at >= 0:
        action = schedule[s][at]
        k, source = action.chunk * slices + s, waits[s][at]
        (forward if action.phase == "forward" else backward)[k] += 1
        if source < 0:
            at -= 1
        else:
            crossings[min(k, source)] += 1
            s = source % slices
            at = position[s][Action(action.phase, action.microbatch, source // slices)]
    weights = tuple(
        Weights(float(f), float(b), float(k % slices == last))
        for k, (f, b) in enumerate(zip(forward, backward, strict=True))
    )
    return Path(weights, tuple(crossings))

"""The step time of a pipeline and the chain of events that decides it.

The step time is the longest path through the graph of the schedule's events (``events.global_order``): each waits for
the one before it on each of its slices, and for its value (``cost.simulate``). A path passes ``a[k]`` forwards and
``b[k]`` backwards of stage ``k``, ``x[k]`` messages over boundary ``k`` to go on with their receiver and ``y[k]`` to go
on with their sender, and ends with the step ends of one slice, so

    step time = max over paths of
        sum_k (a[k] forward[k] + b[k] backward[k] + c[k] step_end[k]) + sum_k (x[k] transfer[k] + y[k] held[k])

with the seconds of a message and those for which it holds its sender (``cost.Crossing``).

The graph depends on the schedule and the cluster alone, so each path is a linear lower bound on the step time of
*every* plan with the same schedule and slices. Complexity: O(stages * microbatches).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..cost import Crossing
from ..events import Compute, Event
from ._stage import StageChoice, Weights


class Messages(NamedTuple):
    """Messages over one boundary on a path, in either direction."""

    received: int
    """After these it goes on with the receiver."""
    sent: int
    """And after these with the sender."""

    def seconds(self, crossing: Crossing) -> float:
        """Return what they take."""
        return self.received * crossing.seconds + self.sent * crossing.held_s


class Path(NamedTuple):
    """A chain of actions, by how often each quantity occurs in it."""

    weights: tuple[Weights, ...]
    """By stage."""
    crossings: tuple[Messages, ...]
    """By boundary."""

    def of_slice(self, s: int, slices: int) -> tuple[Weights, ...]:
        """Return the weights of the stages on slice ``s``."""
        return self.weights[s::slices]


def bottleneck_path(microbatches: int, bottleneck: int, meets: Sequence[bool], chunks: int = 1) -> Path:
    """Return the path that waits for one slice all the time, and ends with the step ends of the first slice.

    The first microbatch's forwards up to the slice, all the slice's events, the last microbatch's backwards back to the
    first slice. It is a path of every schedule.

    Args:
        microbatches: How many.
        bottleneck: The slice.
        meets: By slice, whether messages to the next one hold both (``cost.Crossing``).
        chunks: Stages on each slice.
    """
    m, slices = float(microbatches), len(meets)
    stages = slices * chunks
    counts = [m if k % slices == bottleneck else 1.0 if k < bottleneck else 0.0 for k in range(stages)]
    weights = tuple(Weights(n, n, float(k % slices == 0)) for k, n in enumerate(counts))
    return Path(weights, tuple(path_messages(microbatches, bottleneck, meets, k) for k in range(stages - 1)))


def path_messages(microbatches: int, bottleneck: int, meets: Sequence[bool], boundary: int) -> Messages:
    """Return the messages over a boundary that are on the bottleneck path; arguments as there.

    On the way to the slice and back there are two, each with its receiver. Messages that hold the slice are its events:
    of each microbatch one that it receives and one that it sends over each of its boundaries.
    """
    slices, on_the_way = len(meets), boundary < bottleneck
    if meets[boundary % slices] and bottleneck in (boundary % slices, (boundary + 1) % slices):
        return Messages(microbatches + on_the_way, microbatches - on_the_way)
    return Messages(2 * on_the_way, 0)


def longest_path(
    order: Sequence[Event], slices: int, stages: Sequence[StageChoice], crossings: Sequence[Crossing]
) -> tuple[float, Path]:
    """Return the step time in seconds and a path that takes as long.

    Args:
        order: All events of a step (``events.global_order``).
        slices: Device slices.
        stages: The stages' times.
        crossings: A message over each boundary.
    """
    if len(stages) == 1:
        path = bottleneck_path(len(order) // 2, 0, (False,))
        return stages[0].cost(path.weights[0]), path
    clock, last = [0.0] * slices, [_NOTHING] * slices
    before: list[_Way] = []  # what each event waited for
    ends: dict[Compute, tuple[float, _Way]] = {}
    arrivals: dict[Compute, tuple[float, _Way]] = {}
    for n, event in enumerate(order):
        if isinstance(event, Compute):
            stage, s = stages[event.stage], event.stage % slices
            begin, waited = max((clock[s], last[s]), arrivals.get(event, _AT_ONCE))
            clock[s] = begin + (stage.forward_s if event.phase == "forward" else stage.backward_s)
            ends[event], last[s] = (clock[s], _Way(n)), _Way(n)
        elif crossings[event.boundary].meets:
            source, target, crossing = event.source % slices, event.target % slices, crossings[event.boundary]
            begin, waited = max((clock[source], last[source]), (clock[target], last[target]))
            clock[source], clock[target] = begin + crossing.held_s, begin + crossing.seconds
            last[source], last[target] = _Way(n, with_sender=True), _Way(n)
        else:
            made, waited = ends[event.maker]
            arrivals[event.taker] = made + crossings[event.boundary].seconds, _Way(n)
        before.append(waited)
    finish = [clock[s] + sum(stage.step_end_s for stage in stages[s::slices]) for s in range(slices)]
    end = max(range(slices), key=finish.__getitem__)
    return finish[end], _trace(order, before, last[end], [k % slices == end for k in range(len(stages))])


class _Way(NamedTuple):
    """How a path comes from one event to the next on a slice."""

    event: int
    """Its place in the order; below 0: from none."""
    with_sender: bool = False
    """From a message, on the slice that sent it."""


_NOTHING = _Way(-1)

_AT_ONCE = 0.0, _NOTHING
"""When a value arrives that no message brings, and the message."""


def _trace(order: Sequence[Event], before: Sequence[_Way], at: _Way, ends: Sequence[bool]) -> Path:
    """Walk back from an event to the start of the step; ``ends`` tells the stages whose step ends follow."""
    forward, backward = [0] * len(ends), [0] * len(ends)
    crossings = [Messages(0, 0)] * (len(ends) - 1)
    while at.event >= 0:
        event = order[at.event]
        if not isinstance(event, Compute):
            received, sent = crossings[event.boundary]
            crossings[event.boundary] = Messages(received + (not at.with_sender), sent + at.with_sender)
        elif event.phase == "forward":
            forward[event.stage] += 1
        else:
            backward[event.stage] += 1
        at = before[at.event]
    weights = tuple(Weights(float(f), float(b), float(e)) for f, b, e in zip(forward, backward, ends, strict=True))
    return Path(weights, tuple(crossings))

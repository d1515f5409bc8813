"""One global order of a pipelined step, which every process and every estimate derives alike.

A schedule is one list of actions per device slice. Here the lists become a single list of events: a *compute* runs one
program of one stage, a *transfer* hands the values between two neighbouring stages over. Each process runs the events
that concern its devices, in this order; ``cost`` and ``search`` play the same list.

A transfer is a rendezvous: both slices enter one program, wait for each other, and neither goes on before the message
is there. Two slices that met in different orders would wait for ever. A projection of one total order cannot do that:
the first event that is not done has all it needs.

**The order** follows from the schedule alone, never from a plan's times: so the step times of all plans of a schedule
are longest paths of one graph (each event after the one before it on each of its slices), and a bound on one path is a
bound on all of them. It is the order of a clock on equal stages, forward 1, backward 2, messages 0 (on this clock 1F1B
fills its slices without a gap):

* a compute stands where it starts;
* a transfer stands at the first moment between the making of its value and its use at which neither side is in the
  middle of an action, or else where it is made: for a sender stands still while the receiver computes, and a receiver
  while the value is not made;
* of transfers at one moment on a chain of stages, the value that has the shortest way left goes first: a slice hands on
  what it holds before it takes the next, or all of them would wait for the last one in turn. Stages of an interleaved
  schedule are a ring, which has no end to begin at: every second boundary goes first, then the others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from .errors import PlanError
from .schedule import Schedule

Phase = Literal["forward", "backward"]


class Compute(NamedTuple):
    """One call of a program of ``stage``."""

    stage: int
    phase: Phase
    microbatch: int

    def __str__(self) -> str:
        """Say it as one does."""
        return f"{self.phase} of microbatch {self.microbatch} on stage {self.stage}"


class Transfer(NamedTuple):
    """Boundary values (forward) or their cotangents (backward) of a microbatch move from a stage to its neighbour."""

    source: int
    target: int
    phase: Phase
    microbatch: int

    @property
    def boundary(self) -> int:
        """``k`` of the boundary between the stages ``k`` and ``k + 1``."""
        return min(self.source, self.target)

    @property
    def maker(self) -> Compute:
        """The compute whose result it is."""
        return Compute(self.source, self.phase, self.microbatch)

    @property
    def taker(self) -> Compute:
        """The compute that waits for it."""
        return Compute(self.target, self.phase, self.microbatch)

    def __str__(self) -> str:
        """Say it as one does."""
        what = "values" if self.phase == "forward" else "cotangents"
        return f"{what} of microbatch {self.microbatch} from stage {self.source} to stage {self.target}"


Event = Compute | Transfer


@functools.lru_cache(maxsize=32)
def global_order(schedule: Schedule, stages: int) -> tuple[Event, ...]:
    """Return all events of a step in the order that every process follows.

    Args:
        schedule: One list of actions per device slice; stage ``k`` lives on slice ``k % slices``.
        stages: Number of stages.

    Raises:
        PlanError: an action waits for a value that its own slice or another one makes later.
    """
    slices = len(schedule)
    start = dict(_clock(schedule, stages))
    inside = [set[int]() for _ in range(slices)]  # a backward pass has one moment in its middle, a forward pass none
    for compute, begin in start.items():
        if compute.phase == "backward":
            inside[compute.stage % slices].add(begin + 1)
    timed: list[tuple[int, int, tuple[int, int], Event]] = [(begin, 1, (0, 0), c) for c, begin in start.items()]
    for transfer in _transfers(start, stages):
        made = start[transfer.maker] + _DURATION[transfer.phase]
        used = start[transfer.taker]
        ours, theirs = (inside[s] for s in slices_of(transfer, slices))
        moment = next((t for t in range(made, used + 1) if t not in ours and t not in theirs), made)
        timed.append((moment, 0, _rank(transfer, is_chain=stages == slices), transfer))
    timed.sort(key=lambda entry: entry[:3])  # stable: what is left keeps the order of the clock
    return tuple(event for *_, event in timed)


def slices_of(event: Event, slices: int) -> tuple[int, ...]:
    """Return the device slices that take part in an event, the sender of a transfer first."""
    if isinstance(event, Compute):
        return (event.stage % slices,)
    return event.source % slices, event.target % slices


_DURATION: dict[Phase, int] = {"forward": 1, "backward": 2}


def _clock(schedule: Schedule, stages: int) -> Iterator[tuple[Compute, int]]:
    """Yield every action with its start, on equal stages and with messages that take no time."""
    slices = len(schedule)
    free, at = [0] * slices, [0] * slices
    ends: dict[Compute, int] = {}
    moved = True
    while moved:
        moved = False
        for s, actions in enumerate(schedule):
            while at[s] < len(actions):
                phase, microbatch, chunk = actions[at[s]]
                compute = Compute(chunk * slices + s, phase, microbatch)
                needed = _taken(compute, stages)
                if any(value not in ends for value in needed):
                    break
                begin = max([free[s], *(ends[value] for value in needed)])
                free[s] = ends[compute] = begin + _DURATION[phase]
                at[s], moved = at[s] + 1, True
                yield compute, begin
    if waiting := [s for s in range(slices) if at[s] < len(schedule[s])]:
        raise deadlock([(s, _compute(schedule, s, at[s])) for s in waiting])


def _compute(schedule: Schedule, s: int, position: int) -> Compute:
    phase, microbatch, chunk = schedule[s][position]
    return Compute(chunk * len(schedule) + s, phase, microbatch)


def _taken(compute: Compute, stages: int) -> list[Compute]:
    """Computes whose results ``compute`` takes, on its own stage and on its neighbour."""
    stage, phase, m = compute
    if phase == "forward":
        return [Compute(stage - 1, phase, m)] if stage else []
    own = [Compute(stage, "forward", m)]
    return own + [Compute(stage + 1, phase, m)] if stage + 1 < stages else own


def _transfers(computes: Iterable[Compute], stages: int) -> Iterator[Transfer]:
    for stage, phase, microbatch in computes:
        target = stage + (1 if phase == "forward" else -1)
        if 0 <= target < stages:
            yield Transfer(stage, target, phase, microbatch)


def _rank(transfer: Transfer, *, is_chain: bool) -> tuple[int, int]:
    """Order of transfers that could happen at one moment; on a chain cotangents come first, they end the step."""
    boundary = transfer.boundary
    if not is_chain:
        return boundary % 2, 0
    return (0, boundary) if transfer.phase == "backward" else (1, -boundary)


def deadlock(waiting: Sequence[tuple[int, Event]]) -> PlanError:
    """Return the error for slices that wait at these events for ever."""
    lines = "".join(f"\n  - slice {s} waits at the {event}" for s, event in waiting)
    return PlanError(
        f"the order of the pipeline can never finish:{lines}",
        expected="every action after those whose results it takes",
        where="schedule",
        action="use a schedule of galvatron_jax.schedule (gpipe, 1f1b, interleaved-1f1b)",
    )

"""One global order of a pipelined step, which every process and every estimate derives alike.

A schedule is one list of actions per device slice. Here the lists become a single list of events: a *compute* runs one
program of one stage, a *transfer* hands the values between two neighbouring stages over. Each process runs the events
that concern its devices, in this order; ``cost`` and ``search`` play the same list.

A transfer is a rendezvous: both slices enter one program, wait for each other, and neither goes on before the message
is there. Two slices that met in different orders would wait for ever. A projection of one total order cannot do that:
the first event that is not done has all it needs.

**The order** follows from the schedule alone, never from a plan's times: so the step times of all plans of a schedule
are longest paths of one graph (each event after the one before it on each of its slices), and a bound on one path is a
bound on all of them. It is the order of a clock on equal stages, forward 1, backward 2, messages 0, on which messages
meet too:

* a compute starts when its slice is free and its values are there;
* a transfer happens when its value is made and both its slices are free, before either of them begins to compute again;
* of transfers at one moment on a chain of stages, the value that has the shortest way left goes first: a slice hands on
  what it holds before it takes the next, or all of them would wait for the last one in turn. Stages of an interleaved
  schedule are a ring of slices, which has no end to begin at: every second boundary goes first, then the others (and
  then the one that an odd ring has left over), so that no slice waits for more than one other exchange.

On this clock every schedule of ``schedule`` fills its slices as if messages met nobody: equal stages take the closed
form (a test compares, and no order can be shorter). Complexity: O(events log(stages)).
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
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
    clock = _Clock(schedule, stages)
    order = []
    while event := clock.next_event():
        order.append(event)
    clock.check_done()
    return tuple(order)


def slices_of(event: Event, slices: int) -> tuple[int, ...]:
    """Return the device slices that take part in an event, the sender of a transfer first."""
    if isinstance(event, Compute):
        return (event.stage % slices,)
    return event.source % slices, event.target % slices


_DURATION: dict[Phase, int] = {"forward": 1, "backward": 2}


class _Ready(NamedTuple):
    """An event that has what it needs; of several, the least happens next."""

    moment: int
    """When its slices were free; they may have gone on since."""
    is_compute: bool
    rank: tuple[int, int]
    turn: int
    """How many became ready before."""
    event: Event
    slices: tuple[int, ...]


class _Clock:
    """Equal stages at work; messages take no time, but wait for both their slices."""

    def __init__(self, schedule: Schedule, stages: int) -> None:
        self._schedule, self._stages, self._slices = schedule, stages, len(schedule)
        self._free, self._at = [0] * self._slices, [0] * self._slices
        """By slice: the time up to which it is busy, and its next action."""
        self._there: set[tuple[Compute, int]] = set()
        """Values by their maker and the stage where they are."""
        self._ready: list[_Ready] = []
        """A heap."""
        self._offers = 0
        for s in range(self._slices):
            self._offer_action(s)

    def next_event(self) -> Event | None:
        """Let the next event happen, and return it; None when nothing can."""
        while self._ready:
            first = heapq.heappop(self._ready)
            if (moment := self._moment(first.slices)) == first.moment:
                self._happen(first)
                return first.event
            heapq.heappush(self._ready, first._replace(moment=moment))
        return None

    def check_done(self) -> None:
        """Refuse a schedule with actions that never become ready."""
        if waiting := [s for s, actions in enumerate(self._schedule) if self._at[s] < len(actions)]:
            raise deadlock([(s, self._action(s)) for s in waiting])

    def _happen(self, ready: _Ready) -> None:
        event = ready.event
        if isinstance(event, Compute):
            (s,) = ready.slices
            self._free[s] += _DURATION[event.phase]
            self._at[s] += 1
            self._there.add((event, event.stage))
            target = event.stage + (1 if event.phase == "forward" else -1)
            if 0 <= target < self._stages:
                transfer = Transfer(event.stage, target, event.phase, event.microbatch)
                self._offer(transfer, _rank(transfer, self._slices, self._stages))
            self._offer_action(s)
        else:
            source, target = ready.slices
            self._free[source] = self._free[target] = ready.moment
            self._there.add((event.maker, event.target))
            if self._at[target] < len(self._schedule[target]) and self._action(target) == event.taker:
                self._offer_action(target)

    def _moment(self, slices: tuple[int, ...]) -> int:
        return max([self._free[s] for s in slices])

    def _action(self, s: int) -> Compute:
        phase, microbatch, chunk = self._schedule[s][self._at[s]]
        return Compute(chunk * self._slices + s, phase, microbatch)

    def _offer_action(self, s: int) -> None:
        """Offer the next action of a slice, if its values are there."""
        if self._at[s] < len(self._schedule[s]):
            action = self._action(s)
            if all([(value, action.stage) in self._there for value in _taken(action, self._stages)]):
                self._offer(action, (0, 0))

    def _offer(self, event: Event, rank: tuple[int, int]) -> None:
        self._offers += 1
        slices = slices_of(event, self._slices)
        is_compute = isinstance(event, Compute)
        heapq.heappush(self._ready, _Ready(self._moment(slices), is_compute, rank, self._offers, event, slices))


def _taken(compute: Compute, stages: int) -> list[Compute]:
    """Computes whose results ``compute`` takes, on its own stage and on its neighbour."""
    stage, phase, m = compute
    if phase == "forward":
        return [Compute(stage - 1, phase, m)] if stage else []
    own = [Compute(stage, "forward", m)]
    return own + [Compute(stage + 1, phase, m)] if stage + 1 < stages else own


def _rank(transfer: Transfer, slices: int, stages: int) -> tuple[int, int]:
    """Order of transfers that could happen at one moment; on a chain cotangents come first, they end the step."""
    boundary = transfer.boundary
    if stages == slices:
        return (0, boundary) if transfer.phase == "backward" else (1, -boundary)
    place = boundary % slices
    return (2 if slices % 2 and place == slices - 1 else place % 2), 0


def deadlock(waiting: Sequence[tuple[int, Event]]) -> PlanError:
    """Return the error for slices that wait at these events for ever."""
    lines = "".join(f"\n  - slice {s} waits at the {event}" for s, event in waiting)
    return PlanError(
        f"the order of the pipeline can never finish:{lines}",
        expected="every action after those whose results it takes",
        where="schedule",
        action="use a schedule of galvatron_jax.schedule (gpipe, 1f1b, interleaved-1f1b)",
    )

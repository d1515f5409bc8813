"""One global order of a pipelined step, which every process derives by itself.

A schedule is one list of actions per device slice. Here the lists become a single list of events: a *compute* runs one
program of one stage, a *transfer* hands the values between two neighbouring stages over. Each process runs the events
that concern its devices, in this order.

A transfer is a rendezvous (both slices enter one program and wait for each other), so two slices that met in different
orders would wait for ever. A projection of one total order cannot do that: the first event that is not done has all it
needs. The order is that of simulated time, so that no slice waits where it need not: a compute stands where it starts,
a transfer where its value is made. So a value is *sent early*, before the sender's next compute, and *received late*,
after the compute that the receiver is in at that time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from ..errors import PlanError
from ..schedule import Action, Schedule

Phase = Literal["forward", "backward"]

Durations = Callable[[int, Phase], float]
"""Seconds of one microbatch: (stage, phase)."""


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

    def __str__(self) -> str:
        """Say it as one does."""
        what = "values" if self.phase == "forward" else "cotangents"
        return f"{what} of microbatch {self.microbatch} from stage {self.source} to stage {self.target}"


Event = Compute | Transfer


def global_order(schedule: Schedule, stages: int, durations: Durations | None = None) -> tuple[Event, ...]:
    """Return all events of a step in the order that every process follows.

    Args:
        schedule: One list of actions per device slice; stage ``k`` lives on slice ``k % slices``.
        stages: Number of stages.
        durations: Times that decide between legal orders; a forward pass counts 1, a backward pass 2 by default.

    Raises:
        PlanError: an action waits for a value that its own slice or another one makes later.
    """
    times = durations or _usual
    timed: list[tuple[float, int, Event]] = []
    for start, end, compute in _simulate(schedule, stages, times):
        timed.append((start, 1, compute))
        target = compute.stage + (1 if compute.phase == "forward" else -1)
        if 0 <= target < stages:
            timed.append((end, 0, Transfer(compute.stage, target, compute.phase, compute.microbatch)))
    timed.sort(key=lambda entry: entry[:2])  # stable: ties keep the order of the simulation
    return tuple(event for *_, event in timed)


def forwards_only(schedule: Schedule) -> Schedule:
    """Return the schedule of an evaluation: the same lists without backward passes."""
    return tuple(tuple(a for a in actions if a.phase == "forward") for actions in schedule)


def slices_of(event: Event, slices: int) -> tuple[int, ...]:
    """Return the device slices that take part in an event, the sender of a transfer first."""
    if isinstance(event, Compute):
        return (event.stage % slices,)
    return event.source % slices, event.target % slices


def check_order(sequences: Sequence[Sequence[Event]], stages: int) -> None:
    """Check that device slices that run these sequences, each in its own order, all come to their end.

    Transfers are rendezvous: neither side goes on before the other one is there.

    Args:
        sequences: What each slice runs.
        stages: Number of stages; stage ``k`` lives on slice ``k % len(sequences)``.

    Raises:
        PlanError: slices wait for each other, or for a value that never comes.
    """
    slices = len(sequences)
    at = [0] * slices
    there: set[tuple[int, Phase, int]] = set()

    def head(s: int) -> Event | None:
        return sequences[s][at[s]] if at[s] < len(sequences[s]) else None

    def can_run(event: Event) -> bool:
        if isinstance(event, Compute):
            return _needed(event, stages) <= there
        made = (event.source, event.phase, event.microbatch) in there
        return made and all(head(s) == event for s in slices_of(event, slices))

    while any(head(s) is not None for s in range(slices)):
        ready = [(s, e) for s in range(slices) if (e := head(s)) is not None and can_run(e)]
        if not ready:
            raise _deadlock([(s, e) for s in range(slices) if (e := head(s)) is not None])
        for event in {e for _, e in ready}:
            there.add((event.stage, event.phase, event.microbatch) if isinstance(event, Compute) else _arrived(event))
            for s in set(slices_of(event, slices)):
                at[s] += 1


def project(events: Iterable[Event], slices: int) -> list[list[Event]]:
    """Return what each slice runs of a global order."""
    sequences: list[list[Event]] = [[] for _ in range(slices)]
    for event in events:
        for s in set(slices_of(event, slices)):
            sequences[s].append(event)
    return sequences


# -------------------------------------------------------------------------------------------------------- simulation
def _simulate(schedule: Schedule, stages: int, times: Durations) -> Iterator[tuple[float, float, Compute]]:
    """Yield (start, end, compute) of every action, as if transfers took no time; earliest start first."""
    slices = len(schedule)
    clock, at = [0.0] * slices, [0] * slices
    done: dict[tuple[int, Phase, int], float] = {}
    shortest = 1e-6 * max((times(k, p) for k in range(stages) for p in _PHASES), default=1.0) or 1.0

    def head(s: int) -> Compute:
        action: Action = schedule[s][at[s]]
        return Compute(action.chunk * slices + s, action.phase, action.microbatch)

    def start(s: int) -> float | None:
        ends = [done.get(value) for value in _made_before(head(s), stages)]
        known = [end for end in ends if end is not None]
        return max([clock[s], *known]) if len(known) == len(ends) else None

    while busy := [s for s in range(slices) if at[s] < len(schedule[s])]:
        starts = [(begin, s) for s in busy if (begin := start(s)) is not None]
        if not starts:
            raise _deadlock([(s, head(s)) for s in busy])
        begin, s = min(starts)
        compute = head(s)
        clock[s] = begin + max(times(compute.stage, compute.phase), shortest)
        done[compute] = clock[s]
        at[s] += 1
        yield begin, clock[s], compute


_PHASES: tuple[Phase, Phase] = ("forward", "backward")


def _usual(stage: int, phase: Phase) -> float:
    return 1.0 if phase == "forward" else 2.0


def _made_before(compute: Compute, stages: int) -> set[tuple[int, Phase, int]]:
    """Computes whose results ``compute`` takes, on its own stage and on its neighbour."""
    stage, phase, m = compute
    if phase == "forward":
        return {(stage - 1, phase, m)} if stage else set()
    own: set[tuple[int, Phase, int]] = {(stage, "forward", m)}
    return own | ({(stage + 1, phase, m)} if stage + 1 < stages else set())


def _needed(compute: Compute, stages: int) -> set[tuple[int, Phase, int]]:
    """What must be on the slice before ``compute`` runs: its own forward's results, and what a transfer brought."""
    stage, phase, m = compute
    others = {value for value in _made_before(compute, stages) if value[0] != stage}
    arrived = {_arrived(Transfer(other, stage, phase, m)) for other, _, _ in others}
    return arrived | {(stage, "forward", m)} if phase == "backward" else arrived


def _arrived(transfer: Transfer) -> tuple[int, Phase, int]:
    """Key of a value on the stage that received it (negative, so that it is no stage's own)."""
    return -1 - transfer.target, transfer.phase, transfer.microbatch


def _deadlock(waiting: Sequence[tuple[int, Event]]) -> PlanError:
    lines = "".join(f"\n  - slice {s} waits at the {event}" for s, event in waiting)
    return PlanError(
        f"the order of the pipeline can never finish:{lines}",
        expected="every action after those whose results it takes",
        where="schedule",
        action="use a schedule of galvatron_jax.schedule (gpipe, 1f1b, interleaved-1f1b)",
    )

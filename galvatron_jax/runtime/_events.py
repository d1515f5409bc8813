"""The events of a pipelined step as device slices run them: each its own, in the one order of all (``..events``).

A value is *received late*, after the compute that the receiver is in when it is made. That a slice comes to its end is
checked before anything runs, with transfers as the rendezvous that they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..events import Compute as Compute
from ..events import Event as Event
from ..events import Phase as Phase
from ..events import Transfer as Transfer
from ..events import deadlock, slices_of
from ..events import global_order as global_order
from ..schedule import Schedule


def forwards_only(schedule: Schedule) -> Schedule:
    """Return the schedule of an evaluation: the same lists without backward passes."""
    return tuple(tuple(a for a in actions if a.phase == "forward") for actions in schedule)


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
            raise deadlock([(s, e) for s in range(slices) if (e := head(s)) is not None])
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


def _needed(compute: Compute, stages: int) -> set[tuple[int, Phase, int]]:
    """What must be on the slice before ``compute`` runs: its own forward's results, and what a transfer brought."""
    stage, phase, m = compute
    if phase == "forward":
        return {_arrived(Transfer(stage - 1, stage, phase, m))} if stage else set()
    own: set[tuple[int, Phase, int]] = {(stage, "forward", m)}
    return own | ({_arrived(Transfer(stage + 1, stage, phase, m))} if stage + 1 < stages else set())


def _arrived(transfer: Transfer) -> tuple[int, Phase, int]:
    """Key of a value on the stage that received it (negative, so that it is no stage's own)."""
    return -1 - transfer.target, transfer.phase, transfer.microbatch

"""Pipeline schedules as lists of actions: simulated by ``cost``, executed by ``runtime``, defined once here.

Devices are cut into S slices. With one chunk, slice s runs stage s; with v chunks it runs the stages s, s + S, ...
(chunk c is stage ``c * S + s``). Each slice runs its list in order; an action waits for the value that it consumes: a
forward of stage ``k > 0`` for the forward of stage ``k - 1`` on the same microbatch, a backward for the backward of
stage ``k + 1`` (of the last stage: for its own forward).

* ``gpipe``: all forwards, then all backwards; a slice holds the residuals of all microbatches.
* ``1f1b``: ``S - 1 - s`` forwards to fill, then one forward and one backward in turn, then the remaining backwards
  (PipeDream-Flush, Narayanan et al. 2021, section 2.2.1); slice ``s`` holds at most ``S - s`` microbatches.
* ``interleaved-1f1b``: the same over units of (microbatch, chunk), in groups of S microbatches that pass through chunk
  after chunk (Narayanan et al. 2021, section 2.2.2): a bubble v times smaller for v times the messages; the
  microbatches must be a multiple of S, and ``2 (S - 1 - s) + (v - 1) S`` units fill slice ``s``.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

ScheduleName = Literal["1f1b", "gpipe", "interleaved-1f1b"]

Schedule = tuple[tuple["Action", ...], ...]
"""One list of actions per device slice."""


class Action(NamedTuple):
    """One program call of a slice."""

    phase: Literal["forward", "backward"]
    microbatch: int
    chunk: int = 0


def build_schedule(name: str, slices: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Return the action lists of the schedule ``name``.

    Args:
        name: A ``ScheduleName``.
        slices: Number of device slices, at least 1.
        microbatches: Number of microbatches per step, at least 1; a multiple of ``slices`` when interleaved.
        chunks: Stages on each slice; more than 1 only when interleaved.
    """
    return tuple(_slice_actions(name, s, slices, microbatches, chunks) for s in range(slices))


def in_flight_microbatches(name: str, stage: int, stages: int, microbatches: int) -> int:
    """Return the most microbatches whose residuals ``stage`` holds at once, with one chunk."""
    return microbatches if name == "gpipe" else min(stages - stage, microbatches)


def in_flight_units(name: str, slice_: int, slices: int, microbatches: int, chunks: int = 1) -> set[tuple[int, ...]]:
    """Return the fullest moments of a slice: microbatches held by chunk, those below another moment left out."""
    held = [0] * chunks
    moments = set()
    actions = _slice_actions(name, slice_, slices, microbatches, chunks)
    for action, following in itertools.pairwise(actions):
        held[action.chunk] += 1 if action.phase == "forward" else -1
        if action.phase == "forward" and following.phase == "backward":  # every other moment is below its neighbour
            moments.add(tuple(held))
    most = max(map(sum, moments))
    lesser = {m for m in moments if sum(m) < most}  # of equal sums none is below another
    return moments - {m for m in lesser if any(o != m and _below(m, o) for o in moments)}


def _below(moment: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a <= b for a, b in zip(moment, other, strict=True))


def _slice_actions(name: str, s: int, slices: int, microbatches: int, chunks: int) -> tuple[Action, ...]:
    units = _units(slices, microbatches, chunks)
    forwards = [Action("forward", m, chunk) for m, chunk in units]
    backwards = [Action("backward", m, chunks - 1 - chunk) for m, chunk in units]
    ahead = _units_ahead(name, s, slices, microbatches, chunks)
    actions = forwards[:ahead]
    for done, backward in enumerate(backwards):
        actions.append(backward)
        actions += forwards[ahead + done : ahead + done + 1]
    return tuple(actions)


def _units(slices: int, microbatches: int, chunks: int) -> list[tuple[int, int]]:
    """All (microbatch, chunk) in the order of forwards: groups of ``slices`` microbatches, chunk after chunk."""
    group = slices if chunks > 1 else microbatches
    return [
        (first + m, chunk) for first in range(0, microbatches, group) for chunk in range(chunks) for m in range(group)
    ]


def _units_ahead(name: str, s: int, slices: int, microbatches: int, chunks: int) -> int:
    """Forwards of a slice before its first backward."""
    if name == "gpipe":
        return microbatches * chunks
    fill = slices - 1 - s if chunks == 1 else 2 * (slices - 1 - s) + (chunks - 1) * slices
    return min(fill + 1, microbatches * chunks)

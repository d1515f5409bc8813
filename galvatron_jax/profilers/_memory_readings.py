"""Work through the probes within a time budget; what is known is not compiled again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ._memory_probe import MemoryProbe, MemoryReading
from ._timing import Clock


class Compiler(Protocol):
    """What answers a probe (``ProbeProcess``)."""

    def ask(self, probe: MemoryProbe, /) -> MemoryReading:
        """Return what the compiler says."""


class ProbeProgress(NamedTuple):
    """How far the profiler is."""

    probe: MemoryProbe
    done: int
    total: int
    left_s: float
    """At the pace so far, never more than the budget leaves."""


class Probed(NamedTuple):
    """What came of an agenda."""

    readings: tuple[MemoryReading, ...]
    left_out: tuple[MemoryProbe, ...]
    """The budget was too short."""


def _ignore(_: object) -> None:
    pass


def read_probes(
    probes: Sequence[MemoryProbe],
    compiler: Compiler,
    clock: Clock,
    budget_s: float,
    *,
    known: Sequence[MemoryReading] = (),
    record: Callable[[Sequence[MemoryReading]], None] = _ignore,
    show: Callable[[ProbeProgress], None] = _ignore,
) -> Probed:
    """Return readings of ``probes``, most needed first, as far as the budget goes.

    Args:
        probes: In the order in which they are needed.
        compiler: Answers them.
        clock: Of this process.
        budget_s: No probe is begun when the last one took more than what is left.
        known: Readings of an earlier run.
        record: Called with all readings after each new one.
        show: Called before each probe.
    """
    readings = {reading.probe: reading for reading in known}
    todo = [probe for probe in probes if probe not in readings]
    start_s, last_s = clock.now_s(), 0.0
    for done, probe in enumerate(todo):
        spent_s = clock.now_s() - start_s
        if spent_s + last_s > budget_s:
            return Probed(tuple(readings.values()), tuple(todo[done:]))
        pace_s = spent_s / done if done else 0.0
        show(ProbeProgress(probe, done, len(todo), min(budget_s - spent_s, pace_s * (len(todo) - done))))
        readings[probe] = compiler.ask(probe)
        last_s = clock.now_s() - start_s - spent_s
        record(tuple(readings.values()))
    return Probed(tuple(readings.values()), ())

"""Runs: consecutive layers that are one loop over stacked weights in the compiled program.

Layers of one kind under one strategy follow the same equations, so a run of three or more becomes one ``lax.scan``:
tracing, compile time and HLO stay flat in depth, and the loop bounds what is alive at once. Every input of the layer is

    stacked   a parameter of its own in every layer: one stored array with a leading layer dimension
    carried   made by the layer before (the stream; a counter)
    shared    the same value in all layers (a mask, a rotary table, a tied weight)
    each      any other value that exists before the run, one for each layer (counters, statistics, skip connections):
              stacked in the step, so these should be small

and a layer for which none of these holds begins a run of its own.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from ..analysis import Segment, Variable
from ._layout import LayerLayout

SHORTEST_SCAN = 3
"""Two layers compile as fast unrolled, and XLA may then overlap one with the other."""

Source = Literal["stacked", "carried", "shared", "each"]


@dataclasses.dataclass(frozen=True, slots=True)
class Feed:
    """Where one input of the layers of a run comes from."""

    source: Source
    output: int = -1
    """Which output of the layer before (carried)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Consecutive segments that run as one loop, or a single segment."""

    first: int
    """Position of its first segment in the whole program."""
    segments: tuple[Segment, ...]
    layout: LayerLayout
    feeds: tuple[Feed, ...] = ()
    """One per input of a segment; none when the run is a single segment."""

    @property
    def is_scanned(self) -> bool:
        """Tell whether it is a loop."""
        return len(self.segments) > 1

    def inputs_of(self, source: Source) -> list[int]:
        """Return the positions of the inputs that come from ``source``."""
        return [i for i, feed in enumerate(self.feeds) if feed.source == source]

    @property
    def rows(self) -> frozenset[int]:
        """Parameters (by position) that the layers of a loop take from stacks."""
        stacked = self.inputs_of("stacked") if self.is_scanned else []
        return frozenset(p for p, index in enumerate(self.layout.kind.layer.parameters) if index in stacked)

    def escaping(self, read_outside: set[Variable]) -> list[int]:
        """Return the outputs that must be collected from every layer: somebody but the next layer reads them.

        Args:
            read_outside: Variables read by segments outside the run, by later stages, or by the program's results.
        """
        carried = {feed.output for feed in self.feeds if feed.source == "carried"}
        last = len(self.segments) - 1
        return [
            o
            for o in range(len(self.segments[0].outputs))
            if any(
                s.outputs[o] in read_outside and not (j == last and o in carried) for j, s in enumerate(self.segments)
            )
        ]


def find_runs(
    first: int,
    segments: Sequence[Segment],
    layouts: Sequence[LayerLayout],
    parameters: dict[Variable, bool],
) -> tuple[Run, ...]:
    """Cut ``segments`` into maximal runs; those shorter than ``SHORTEST_SCAN`` are left as single segments.

    Args:
        first: Position of the first segment in the whole program.
        segments: Segments of one stage, in order.
        layouts: Of each of them; equal (kind, strategy) share one object.
        parameters: All parameters of the program, and whether one layer alone reads each (``private_parameters``).
    """
    runs: list[Run] = []
    start = 0
    while start < len(segments):
        feeds, stop = _longest(segments, layouts, start, parameters)
        if stop - start >= SHORTEST_SCAN:
            runs.append(Run(first + start, tuple(segments[start:stop]), layouts[start], feeds))
        else:
            runs += [Run(first + k, (segments[k],), layouts[k]) for k in range(start, stop)]
        start = stop
    return tuple(runs)


def private_parameters(parameters: Iterable[Variable], segments: Sequence[Segment]) -> dict[Variable, bool]:
    """Return for each parameter whether a single one of ``segments`` reads it: others are never stacked."""
    readers = Counter(v for segment in segments for v in segment.inputs)
    return {v: readers[v] == 1 for v in parameters}


def _longest(
    segments: Sequence[Segment], layouts: Sequence[LayerLayout], start: int, parameters: dict[Variable, bool]
) -> tuple[tuple[Feed, ...], int]:
    """Return the feeds of the longest run from ``start``, and the position after its last segment."""
    stop, feeds = start + 1, None
    made: set[Variable] = set(segments[start].outputs)
    while stop < len(segments) and layouts[stop] is layouts[start]:
        found = [
            feed_of(segments[stop - 1].outputs, before, after, parameters, made)
            for before, after in zip(segments[stop - 1].inputs, segments[stop].inputs, strict=True)
        ]
        if None in found or (feeds is not None and found != feeds):
            break
        feeds = found
        made.update(segments[stop].outputs)
        stop += 1
    return tuple(feed for feed in feeds or () if feed is not None), stop


def feed_of(
    earlier: Sequence[Variable],
    before: Variable,
    after: Variable,
    parameters: dict[Variable, bool],
    made: set[Variable],
) -> Feed | None:
    """Return how one input changes from a layer (or turn) to the next, None when no loop can follow it.

    Args:
        earlier: Results of the one before.
        before: The input there.
        after: The input here.
        parameters: All parameters of the program, and whether one layer alone reads each.
        made: Results of all before, from the first of the loop.
    """
    if after is before:
        return Feed("shared")
    if after in earlier:
        return Feed("carried", earlier.index(after))
    if before in parameters and after in parameters:
        alike = before.aval.shape == after.aval.shape and before.aval.dtype == after.aval.dtype
        return Feed("stacked") if alike and parameters[before] and parameters[after] else None
    return None if after in made or before in parameters or after in parameters else Feed("each")

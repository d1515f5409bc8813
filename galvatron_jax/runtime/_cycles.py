"""Cycles: runs of layers that come again in the same order are one loop, whose body holds one of each.

A plan may give strategies in turn, A A A A B B B B A A A A B B B B. Each run is a loop of its own (``_runs``), and XLA
compiles every loop for itself, at the same price whether it is like another one or not. So runs that repeat,

    turn 0: A B        turn 1: A B        turn 2: A B

become one loop over turns: its body runs the layers of the first turn on every turn's values. What a turn takes from
outside is fed as to the layers of a run (``_runs.Feed``), with the turn in place of the layer.

How runs are folded is the shortest of all ways to write the sequence as runs and cycles, counted in runs to compile:

    length[s] = min(1 + length[s + 1],   min over p, n of   p + length[s + p n])     p >= 2 runs that come n >= 3 times

which is O(k^2 log k) steps for k runs. No communication is added: the loop carries the stream in the layout of the
first run, so where the last run has another one, the cycle must be followed by a layer that takes the first's. (Else
the last turn stays outside.) Values that somebody but the next turn reads would have to be kept of every turn: runs
with such results are not folded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ..analysis import Segment, Variable
from ._layout import LayerLayout
from ._runs import Feed, Run, Source, feed_of

FEWEST_TURNS = 3
"""As of layers (``_runs.SHORTEST_SCAN``): XLA:GPU makes one straight piece of a loop of two turns."""

Wiring = tuple[tuple[str, int], ...]
"""Of each input of each layer of a turn: which of the turn's inputs it is, or which result of the turn."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cycle:
    """Runs that come several times in the same order."""

    turns: tuple[tuple[Run, ...], ...]
    inputs: tuple[tuple[Variable, ...], ...]
    """Of each turn, what it reads from outside; alike in all."""
    outputs: tuple[tuple[Variable, ...], ...]
    """Of each turn, all results of its layers."""
    feeds: tuple[Feed, ...]
    """Where each of the inputs comes from; ``carried`` from a result of the turn before."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of the first turn: those that the body is made of."""
        return self.turns[0]

    def inputs_of(self, source: Source) -> list[int]:
        """Return the positions of the inputs that come from ``source``."""
        return [i for i, feed in enumerate(self.feeds) if feed.source == source]

    @property
    def stacks(self) -> list[Stack]:
        """Its parameters that are stored as stacks."""
        return [stack for stack in stacks_of(self) if stack.is_stacked]

    def reader_of(self, position: int) -> tuple[LayerLayout, int]:
        """Return the layout of the first layer that reads an input of the turn, and which of its inputs it is."""
        variable = self.inputs[0][position]
        return next(
            (run.layout, segment.inputs.index(variable))
            for run in self.runs
            for segment in run.segments
            if variable in segment.inputs
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """One parameter of the layers of a run or cycle: what is stored as one array, in the order of its rows."""

    run: Run
    position: int
    """Which parameter of the run's layer."""
    variables: tuple[Variable, ...]
    is_stacked: bool
    turns: int
    """Of a run inside a cycle: how often it comes; 1 where each turn has a single row."""


def stacks_of(piece: Run | Cycle) -> Iterator[Stack]:
    """Yield the parameters of a run or cycle as they are stored; rows of a cycle's arrays turn by turn."""
    turns = piece.turns if isinstance(piece, Cycle) else ((piece,),)
    fed = dict(zip(piece.inputs[0], piece.feeds, strict=True)) if isinstance(piece, Cycle) else {}
    for r, run in enumerate(turns[0]):
        for position, index in enumerate(run.layout.kind.layer.parameters):
            first = run.segments[0].inputs[index]
            by_layer = run.is_scanned and run.feeds[index].source == "stacked"
            by_turn = first in fed and fed[first].source == "stacked"
            layers = [
                turn[r].segments if by_layer else turn[r].segments[:1] for turn in (turns if by_turn else turns[:1])
            ]
            variables = tuple(segment.inputs[index] for segments in layers for segment in segments)
            yield Stack(run, position, variables, by_layer or by_turn, len(turns) if by_layer and by_turn else 1)


def fold_runs(
    runs: Sequence[Run], parameters: dict[Variable, bool], readers: Sequence[Segment], results: set[Variable]
) -> tuple[Run | Cycle, ...]:
    """Fold runs that repeat into cycles.

    Args:
        runs: Of one stage, in order.
        parameters: All parameters of the program, and whether one layer alone reads each.
        readers: All segments of the program.
        results: Variables that are results of the program.
    """
    count = len(runs)
    keys = [(id(run.layout), len(run.segments), run.feeds) for run in runs]
    best: list[tuple[int, int, Cycle | None]] = [(0, count, None)] * (count + 1)
    for s in range(count - 1, -1, -1):
        best[s] = (1 + best[s + 1][0], s + 1, None)
        for period in range(2, (count - s) // FEWEST_TURNS + 1):
            stop = s + period
            while keys[stop : stop + period] == keys[s : s + period] and stop + period <= count:
                stop += period
                length = period + best[stop][0]
                is_long = stop - s >= FEWEST_TURNS * period
                if is_long and length < best[s][0] and _keeps_layout(runs, s, period, stop):
                    turns = [tuple(runs[t : t + period]) for t in range(s, stop, period)]
                    if (cycle := _cycle(turns, parameters, readers, results)) is not None:
                        best[s] = (length, stop, cycle)
    found: list[Run | Cycle] = []
    s = 0
    while s < count:
        _, stop, cycle = best[s]
        found.append(cycle or runs[s])
        s = stop
    return tuple(found)


def _keeps_layout(runs: Sequence[Run], start: int, period: int, stop: int) -> bool:
    """Tell whether the stream leaves the last run of a cycle as the loop carries it, or is wanted so after the loop."""
    first, last = _stream_layout(runs[start]), _stream_layout(runs[start + period - 1])
    return last == first or (stop < len(runs) and _stream_layout(runs[stop]) == first)


def _stream_layout(run: Run) -> tuple[int, bool, int]:
    """What decides how the stream is laid out between layers."""
    strategy = run.layout.strategy
    return strategy.dp, strategy.sp, strategy.ulysses


def _cycle(
    turns: Sequence[tuple[Run, ...]],
    parameters: dict[Variable, bool],
    readers: Sequence[Segment],
    results: set[Variable],
) -> Cycle | None:
    """Return the cycle of ``turns``, None when no loop can follow it."""
    segments = [[segment for run in turn for segment in run.segments] for turn in turns]
    wired = [_wire(turn) for turn in segments]
    outputs = [tuple(v for segment in turn for v in segment.outputs) for turn in segments]
    if any(wiring != wired[0][1] for _, wiring in wired[1:]):
        return None
    inputs = [found for found, _ in wired]
    feeds: list[Feed] | None = None
    made: set[Variable] = set(outputs[0])
    for earlier, made_there, later, made_here in zip(inputs, outputs, inputs[1:], outputs[1:], strict=False):
        found = [
            feed_of(made_there, before, after, parameters, made) for before, after in zip(earlier, later, strict=True)
        ]
        if None in found or (feeds is not None and found != feeds):
            return None
        feeds = [feed for feed in found if feed is not None]
        made.update(made_here)
    cycle = Cycle(tuple(turns), tuple(inputs), tuple(outputs), tuple(feeds or ()))
    return None if _is_read_outside(cycle, segments, readers, results) else cycle


def _wire(segments: Sequence[Segment]) -> tuple[tuple[Variable, ...], Wiring]:
    """Return what ``segments`` read from outside, and how they are wired."""
    outside: dict[Variable, int] = {}
    inside: dict[Variable, int] = {}
    wiring: list[tuple[str, int]] = []
    for segment in segments:
        for variable in segment.inputs:
            if variable in inside:
                wiring.append(("result", inside[variable]))
            else:
                wiring.append(("input", outside.setdefault(variable, len(outside))))
        inside.update((v, len(inside) + i) for i, v in enumerate(segment.outputs))
    return tuple(outside), tuple(wiring)


def _is_read_outside(
    cycle: Cycle, segments: Sequence[Sequence[Segment]], readers: Sequence[Segment], results: set[Variable]
) -> bool:
    """Tell whether somebody outside the cycle reads anything but what its last turn hands on."""
    own = {id(segment) for turn in segments for segment in turn}
    read = results.union(*(segment.inputs for segment in readers if id(segment) not in own))
    handed_on = {cycle.outputs[-1][cycle.feeds[i].output] for i in cycle.inputs_of("carried")}
    return any(v in read and v not in handed_on for outputs in cycle.outputs for v in outputs)

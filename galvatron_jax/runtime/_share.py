"""How the cut program is shared out over pipeline stages: what each one holds, makes, takes and hands on.

A stage runs a contiguous range of segments. What its segments read is one of

    parameter, model state, batch   leaves of the user's trees: the stage holds (or is fed) them itself
    remade     depends on the batch and on counters alone, not on parameters (masks, positions, rotary tables, random
               keys): every stage that reads it runs the few equations that make it, in place of receiving it
    arriving   made by a stage before; it is handed from stage to stage until nobody after reads it, with a cotangent
               on the way back where it depends on parameters (the stream, an encoder's output, a relative bias)

so the values that arrive at stage k + 1 are exactly those that leave stage k. A one-stage plan is the range of all
segments: nothing arrives, nothing is remade, nothing leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ..analysis import Analysis, Equation, Program, Segment, Variable, trained_variables
from ..errors import UnsupportedError


@dataclasses.dataclass(frozen=True, slots=True)
class Crossing:
    """A value on its way from one stage to the next."""

    variable: Variable
    maker: int
    """Position of the segment that makes it, in the whole program."""
    output: int
    """Which of that segment's outputs it is."""
    gradient: bool
    """Its cotangent flows back."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageShare:
    """One stage's share of the cut program; leaves are named by their position in the user's flattened tree."""

    analysis: Analysis
    first: int
    """Position of its first segment in the program."""
    stop: int
    """Position after its last segment."""
    parameters: tuple[int, ...]
    """Parameter leaves it holds; a tied leaf is held by every stage that reads it."""
    state: tuple[int, ...]
    """Model-state leaves it holds. Where several stages hold one (a shared counter), all compute the same new value."""
    batch: tuple[int, ...]
    """Batch leaves that it is fed."""
    arriving: tuple[Crossing, ...]
    """Taken from the stage before, in this order."""
    leaving: tuple[Crossing, ...]
    """Handed to the stage after: its ``arriving``."""
    remade: tuple[Equation, ...]
    """What it runs before its segments."""

    @property
    def segments(self) -> list[Segment]:
        """The segments it runs."""
        return self.analysis.cut.segments[self.first : self.stop]

    @property
    def makes_loss(self) -> bool:
        """Tell whether it is the last stage."""
        return self.stop == len(self.analysis.cut.segments)


def share_out(analysis: Analysis, layer_counts: Sequence[int]) -> tuple[StageShare, ...]:
    """Share the program of ``analysis`` out over stages of ``layer_counts`` segments each, in order.

    Raises:
        UnsupportedError: a stage would need model state that another one computes from activations.
    """
    assert sum(layer_counts) == len(analysis.cut.segments), "check_plan compares the plan's layers with the model's"
    stops = [sum(layer_counts[: k + 1]) for k in range(len(layer_counts))]
    program = _Program(analysis)
    return tuple(program.share(first, stop) for first, stop in zip([0, *stops], stops, strict=False))


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The inputs of a program by role."""

    parameters: list[Variable]
    state: list[Variable]
    batch: list[Variable]


def program_leaves(analysis: Analysis) -> Leaves:
    """Return the input variables of the cut program by role."""
    inputs, trace = analysis.cut.source.inputs, analysis.trace
    parameters, batch = len(trace.paths), len(jax.tree.leaves(trace.batch))
    stop = len(inputs) - batch
    return Leaves(inputs[:parameters], inputs[parameters:stop], inputs[stop:])


class _Program:
    """The whole program, as the shares need to see it."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.source: Program = analysis.cut.source
        self.leaves = program_leaves(analysis)
        self.trained = trained_variables(analysis.cut, set(self.leaves.parameters))
        self.remakable = _remakable(self.source, self.leaves)
        self.makers = {
            variable: (position, output)
            for position, segment in enumerate(analysis.cut.segments)
            for output, variable in enumerate(segment.outputs)
        }
        self.new_state = self.source.outputs[1:]

    def share(self, first: int, stop: int) -> StageShare:
        """Return the share of the segments from ``first`` to before ``stop``."""
        reads, state = self._reads(first, stop), self._state(first, stop)
        remade = self._remade(first, stop, reads, state)
        read = reads | {v for equation in remade for v in equation.inputs if isinstance(v, Variable)}
        while more := _indices(self.leaves.state, read) - state:  # what remaking reads, the stage must hold and renew
            state |= more
            remade = self._remade(first, stop, reads, state)
            read |= {v for equation in remade for v in equation.inputs if isinstance(v, Variable)}
        return StageShare(
            analysis=self.analysis,
            first=first,
            stop=stop,
            parameters=tuple(self._parameters(first, stop)),
            state=tuple(sorted(state)),
            batch=tuple(sorted(_indices(self.leaves.batch, read))),
            arriving=self._crossings(first),
            leaving=self._crossings(stop) if stop < len(self.analysis.cut.segments) else (),
            remade=remade,
        )

    def _reads(self, first: int, stop: int) -> set[Variable]:
        return {v for segment in self.analysis.cut.segments[first:stop] for v in segment.inputs}

    def _parameters(self, first: int, stop: int) -> list[int]:
        """Parameter leaves read here; the first stage also holds those that nobody reads."""
        read = self._reads(first, stop)
        if first == 0:
            read |= set(self.leaves.parameters) - self._reads(0, len(self.analysis.cut.segments))
        return sorted(_indices(self.leaves.parameters, read))

    def _state(self, first: int, stop: int) -> set[int]:
        """State leaves that the segments read or make; the first stage also holds those that no segment touches."""
        held = _indices(self.leaves.state, self._reads(first, stop))
        touched = _indices(self.leaves.state, self._reads(0, len(self.analysis.cut.segments)))
        for index, new in enumerate(self.new_state):
            maker = self.makers.get(new) if isinstance(new, Variable) else None
            if maker is not None and new not in self.remakable:
                touched.add(index)
                if first <= maker[0] < stop:
                    held.add(index)
                elif index in held:
                    raise UnsupportedError(
                        f"model state leaf {index} is read by layer {first} to {stop - 1} and made by layer {maker[0]}",
                        expected="state that one stage reads and makes",
                        where="plan",
                        action="put those layers into one stage",
                    )
        if first == 0:
            held |= set(range(len(self.leaves.state))) - touched
        return held

    def _remade(self, first: int, stop: int, reads: set[Variable], state: set[int]) -> tuple[Equation, ...]:
        """Return what makes the remakable values that a stage reads, or keeps as state, but does not make itself."""
        wanted = reads | {v for i in state if isinstance(v := self.new_state[i], Variable)}
        elsewhere = {v for v, (maker, _) in self.makers.items() if not first <= maker < stop}
        return _closure(self.source.equations, wanted & self.remakable & elsewhere)

    def _crossings(self, edge: int) -> tuple[Crossing, ...]:
        """Values that cross the edge before segment ``edge``, in the order in which they are made."""
        if edge == 0:
            return ()
        needed = self._reads(edge, len(self.analysis.cut.segments))
        loss = self.source.outputs[0]
        needed |= {loss} if isinstance(loss, Variable) else set()
        return tuple(
            Crossing(variable, maker, output, variable in self.trained)
            for variable, (maker, output) in self.makers.items()
            if maker < edge and variable in needed and variable not in self.remakable
        )


def _remakable(source: Program, leaves: Leaves) -> set[Variable]:
    """Values that depend on the batch, constants and integer or key state alone: cheap to make again."""
    found = {*leaves.batch, *source.constants, *(v for v in leaves.state if not _is_float(v))}
    for equation in source.equations:
        if all(v in found for v in equation.inputs if isinstance(v, Variable)):
            found.update(equation.outputs)
    return found


def _closure(equations: Sequence[Equation], wanted: set[Variable]) -> tuple[Equation, ...]:
    """Return the equations that ``wanted`` depend on, in order."""
    needed, chosen = set(wanted), []
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.outputs):
            needed.update(v for v in equation.inputs if not isinstance(v, Literal))
            chosen.append(equation)
    return tuple(chosen[::-1])


def _indices(leaves: Sequence[Variable], chosen: set[Variable]) -> set[int]:
    return {index for index, variable in enumerate(leaves) if variable in chosen}


def _is_float(variable: Variable) -> bool:
    dtype: Any = variable.aval.dtype
    return bool(jnp.issubdtype(dtype, jnp.inexact))

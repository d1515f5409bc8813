"""Cut a flat program into layers.

Equations are in trace order, so the equations of a module call are contiguous, and a cut by position is a valid cut:
free variables of a segment are its inputs, variables used later its outputs. Masks, rotary tables, encoder outputs, RNG
counters and statistics thereby become ordinary boundary values. Which ranges are layers is found

    by name      the repeated calls of marked modules (``_groups``)
    by pattern   repeated equations, where a model has no modules, or hides its layers inside one (``_repeats``)

whichever covers more of the matmul work, the first one where both are close. Segments that follow the same equations
are one *kind* and share one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from ._fingerprint import Skeleton, skeleton
from ._flatten import Equation, Program, Variable
from ._flow import Flow
from ._groups import called_modules, find_layer_calls, find_named_calls, pattern_of
from ._jaxpr import abstract, run_equation, scope_name
from ._pieces import Piece, cover
from ._repeats import find_repeats

REPEATED = "layer"
"""Kind of layers that have no module to be named after."""

_ENOUGH = 0.5
"""Share of the matmul FLOPs in named layers above which nobody looks for patterns."""


@dataclasses.dataclass(eq=False, slots=True)
class Segment:
    """One layer of the cut program."""

    kind: str
    name: str
    inputs: list[Variable]
    outputs: list[Variable]
    program: ClosedJaxpr
    """Segments of one kind share one program; ``inputs`` and ``outputs`` say what it is called with."""
    tied: frozenset[int] = frozenset()
    """Inputs that are parameters which a segment before holds already."""


@dataclasses.dataclass(slots=True)
class Cut:
    """A program as a list of segments in order."""

    segments: list[Segment]
    source: Program
    by_name: bool = True
    """Layers were found as module calls, not as repeated equations."""
    reason: str = ""
    """Why no layers were found; empty when there are some."""

    @property
    def is_whole(self) -> bool:
        """Tell whether no layers were found."""
        return len(self.segments) <= 1


def cut_layers(by_name: Program, flatten_all: Callable[[], Program], *, layers: str | None = None) -> Cut:
    """Cut a program into embed, layers and head (one ``model`` segment when nothing repeats).

    Args:
        by_name: The program, calls of marked modules opened.
        flatten_all: Returns the program with every call opened, for the search by pattern.
        layers: The user's own answer: a path glob such as ``"model.layers.*"``.

    Raises:
        AnalysisError: ``layers`` names no module.
    """
    flow = Flow(by_name)
    calls = find_named_calls(flow, layers) if layers else find_layer_calls(flow)
    named = [Piece(pattern_of(call.module), call.module, call.first, call.stop) for call in calls]
    if not layers and _share(flow, named) < _ENOUGH:
        program = flatten_all()
        other = Flow(program)
        repeated = [
            Piece(REPEATED if group == 0 else f"{REPEATED}{group + 1}", f"layer.{n}", first, first + repeat.period)
            for group, repeat in enumerate(find_repeats(other))
            for n, first in enumerate(range(repeat.first, repeat.stop, repeat.period))
        ]
        if _share(other, repeated) > _share(flow, named):
            return Cut(_segments(other, program, repeated), program, by_name=False)
    return Cut(_segments(flow, by_name, named), by_name, reason="" if named else _reason(flow))


def _reason(flow: Flow) -> str:
    called = called_modules(flow)
    some = f"{', '.join(called[:6])}{', ...' if len(called) > 6 else ''}"
    modules = f"no two calls of alike modules follow each other (called: {some})" if called else "it calls no modules"
    return f"{modules}, and no run of equations repeats"


def _share(flow: Flow, pieces: Sequence[Piece]) -> float:
    return sum(flow.flops(piece.first, piece.stop) for piece in pieces) / max(flow.total_flops, 1)


# ------------------------------------------------------------------------------------------------- pieces to segments
@dataclasses.dataclass(slots=True)
class _Part:
    """A piece with what it reads and makes."""

    piece: Piece
    equations: list[Equation]
    inputs: list[Variable]
    outputs: list[Variable]
    tied: frozenset[int]
    shape: tuple[Any, ...]
    """Equal for segments of one kind."""


def _segments(flow: Flow, program: Program, layers: Sequence[Piece]) -> list[Segment]:
    pieces = cover(flow, layers)
    last_use = _last_uses(program, pieces)
    held: set[Variable] = set()
    parameters = set(program.inputs[: program.weights])
    parts = []
    for index, piece in enumerate(pieces):
        equations = list(program.equations[piece.first : piece.stop])
        outputs = [v for e in equations for v in e.outputs if last_use.get(v, -1) > index]
        inputs = _free_variables(equations)
        tied = frozenset(i for i, v in enumerate(inputs) if v in held)
        held.update(parameters.intersection(inputs))
        roles = tuple(v in parameters for v in inputs)
        form: Skeleton = skeleton(flow.keys[piece.first : piece.stop], equations)
        shape = (form, tuple(_slots(equations, outputs)), roles, tied)
        parts.append(_Part(piece, equations, inputs, outputs, tied, shape))
    kinds: dict[tuple[Any, ...], list[_Part]] = {}
    for part in parts:
        kinds.setdefault(part.shape, []).append(part)
    for alike in kinds.values():
        _lift_literals(program, alike)
    return _name_kinds(parts, kinds)


def _name_kinds(parts: Sequence[_Part], kinds: dict[tuple[Any, ...], list[_Part]]) -> list[Segment]:
    per_pattern: dict[str, int] = {}
    known: dict[tuple[Any, ...], tuple[str, ClosedJaxpr]] = {}
    for shape, (first, *_) in kinds.items():
        pattern = first.piece.pattern
        number = per_pattern[pattern] = per_pattern.get(pattern, 0) + 1
        name = pattern if number == 1 else f"{pattern}#{number}"
        known[shape] = name, _rebuild(first.equations, first.inputs, first.outputs)
    return [
        Segment(known[part.shape][0], part.piece.name, part.inputs, part.outputs, known[part.shape][1], part.tied)
        for part in parts
    ]


def _lift_literals(program: Program, alike: Sequence[_Part]) -> None:
    """Make the scalar literals in which alike segments differ into inputs of theirs."""
    if len(alike) == 1:
        return
    columns = zip(*(part.equations for part in alike), strict=True)
    lifted = False
    for equations in columns:
        for slot, atoms in enumerate(zip(*(e.inputs for e in equations), strict=True)):
            if isinstance(atoms[0], Literal) and len({str(atom.val) for atom in atoms}) > 1:
                lifted = True
                for equation, atom in zip(equations, atoms, strict=True):
                    equation.inputs[slot] = variable = Variable(atom.aval)
                    program.constants[variable] = np.asarray(atom.val, atom.aval.dtype)
    if lifted:
        for part in alike:
            free = _free_variables(part.equations)
            tied = {part.inputs[i] for i in part.tied}
            part.inputs, part.tied = free, frozenset(i for i, v in enumerate(free) if v in tied)


def _last_uses(program: Program, pieces: Sequence[Piece]) -> dict[Variable, int]:
    """Index of the last segment that reads each variable (``len(pieces)`` for results of the program)."""
    last: dict[Variable, int] = {}
    for index, piece in enumerate(pieces):
        for equation in program.equations[piece.first : piece.stop]:
            last.update((v, index) for v in equation.inputs if isinstance(v, Variable))
    last.update((v, len(pieces)) for v in program.outputs if isinstance(v, Variable))
    return last


def _free_variables(equations: Sequence[Equation]) -> list[Variable]:
    defined: set[Variable] = set()
    free: dict[Variable, None] = {}
    for equation in equations:
        free.update((v, None) for v in equation.inputs if isinstance(v, Variable) and v not in defined)
        defined.update(equation.outputs)
    return list(free)


def _slots(equations: Sequence[Equation], wanted: Sequence[Variable]) -> list[tuple[int, int]]:
    """Where a segment defines each of ``wanted``: (equation, output)."""
    made = {v: (position, slot) for position, e in enumerate(equations) for slot, v in enumerate(e.outputs)}
    return [made[v] for v in wanted]


def _rebuild(equations: Sequence[Equation], inputs: list[Variable], outputs: list[Variable]) -> ClosedJaxpr:
    """Return the equations as a program of their own, by tracing an interpreter of them (public API only)."""

    def run(*values: object) -> list[object]:
        environment = dict(zip(inputs, values, strict=True))
        for e in equations:
            arguments = [v.val if isinstance(v, Literal) else environment[v] for v in e.inputs]
            with jax.named_scope(scope_name(e.scope)):
                environment.update(zip(e.outputs, run_equation(e.eqn, arguments), strict=True))
        return [environment[v] for v in outputs]

    return jax.make_jaxpr(run)(*[abstract(v.aval) for v in inputs])

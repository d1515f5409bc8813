"""Cut a flat program into layers.

The repeated layers are the outermost group of sibling module calls (the same path but for numbers) that covers most of
the matmul work, one level deeper when all its members differ (stages of different width). Equations are in trace order,
so the equations of a call are contiguous, and a cut by position is a valid cut: free variables of a segment are its
inputs, variables used later its outputs. Masks, rotary tables, RNG counters and statistics thereby become ordinary
boundary values. What stands before the first layer is the ``embed`` segment, what follows the last one ``head``;
equations between two layers belong to the later one.

Limits: layers run by one ``nnx.scan`` are unrolled and cut, but each slices the stacked weights at an index of its own,
so that each becomes a kind of its own, without tensor-parallel candidates worth having; one module called several times
(shared weights) is no group.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence

import jax
from jax.extend.core import ClosedJaxpr, Literal

from ._flatten import MARK, Equation, Program, Variable
from ._jaxpr import abstract, run_equation, scope_name

EMBED, HEAD, WHOLE = "embed", "head", "model"
"""Kinds of the segments before, after and instead of the repeated layers."""

_MIN_SHARE = 0.02
"""A group with less than this share of the matmul FLOPs is not a layer group (a pair of norms, say)."""

_INNER_SHARE = 0.8
"""Descend into a group whose members all differ when an inner group keeps this share of its work."""


@dataclasses.dataclass(eq=False, slots=True)
class Segment:
    """One layer of the cut program."""

    kind: str
    name: str
    inputs: list[Variable]
    outputs: list[Variable]
    program: ClosedJaxpr
    """Segments of one kind share one program; ``inputs`` and ``outputs`` say what it is called with."""


@dataclasses.dataclass(slots=True)
class Cut:
    """A program as a list of segments in order."""

    segments: list[Segment]
    source: Program


@dataclasses.dataclass(slots=True)
class _Call:
    """One module call: its position in the equation list and its work."""

    path: str
    first: int
    last: int
    flops: int
    outer: tuple[str, ...]


def cut_layers(program: Program) -> Cut:
    """Cut ``program`` into embed, layers and head (one ``model`` segment when nothing repeats)."""
    spans = sorted((call.first, call.last, call.path) for call in _layer_calls(program.equations))
    pieces: list[tuple[str, str, int, int]] = []
    position = 0
    for first, last, path in spans:
        start = position if pieces else first
        if not pieces and first > 0:
            pieces.append((EMBED, EMBED, 0, first))
        pieces.append((_pattern(path), path, start, last + 1))
        position = last + 1
    if position < len(program.equations):
        name = HEAD if pieces else WHOLE
        pieces.append((name, name, position, len(program.equations)))
    return Cut(_segments(program, pieces), program)


def _layer_calls(equations: Sequence[Equation]) -> list[_Call]:
    """Return the calls of the chosen layer groups."""
    groups = _sibling_groups(equations)
    chosen: list[str] = []
    for pattern in sorted(groups, key=lambda p: len(_enclosing(groups[p]))):
        if _enclosing(groups[pattern]) & set(chosen):
            continue
        if not _should_descend(pattern, groups, equations):
            chosen.append(pattern)
    return [call for pattern in chosen for call in groups[pattern]]


def _sibling_groups(equations: Sequence[Equation]) -> dict[str, list[_Call]]:
    """Group module calls by path pattern; keep groups of two or more numbered calls that do real work."""
    calls: dict[tuple[str, str], _Call] = {}
    for position, equation in enumerate(equations):
        flops = matmul_flops(equation)
        outer: tuple[str, ...] = ()
        path = ""
        for mark in MARK.finditer(equation.scope):
            if mark[1] == path:
                continue  # the same module again: super().__call__
            path = mark[1]
            call = calls.setdefault((mark[1], mark[2]), _Call(mark[1], position, position, 0, outer))
            call.last, call.flops = position, call.flops + flops
            outer = (*outer, _pattern(mark[1]))
    total = sum(map(matmul_flops, equations)) or 1
    groups: dict[str, list[_Call]] = {}
    for call in calls.values():
        groups.setdefault(_pattern(call.path), []).append(call)
    return {
        pattern: group
        for pattern, group in groups.items()
        if "*" in pattern and len(group) > 1 and sum(c.flops for c in group) > _MIN_SHARE * total
    }


def _should_descend(pattern: str, groups: dict[str, list[_Call]], equations: Sequence[Equation]) -> bool:
    group = groups[pattern]
    signatures = {_signature(equations[c.first : c.last + 1]) for c in group}
    if len(signatures) < len(group):
        return False
    work = sum(c.flops for c in group)
    return any(
        pattern in _enclosing(inner) and len(inner) > len(group) and sum(c.flops for c in inner) > _INNER_SHARE * work
        for inner in groups.values()
    )


def _enclosing(group: Sequence[_Call]) -> set[str]:
    return {pattern for call in group for pattern in call.outer}


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def matmul_flops(equation: Equation) -> int:
    """Return the FLOP of a matrix product or convolution (2 per multiply-add), 0 for any other equation."""
    if equation.name not in ("dot_general", "conv_general_dilated"):
        return 0
    numbers = equation.eqn.params["dimension_numbers"]
    left, right, made = (abstract(v.aval).shape for v in [*equation.inputs, *equation.outputs])
    if equation.name == "dot_general":
        summed = [left[dim] for dim in numbers[0][0]]
    else:
        summed = [size for dim, size in enumerate(right) if dim != numbers.rhs_spec[0]]
    flops: int = 2 * math.prod(made) * math.prod(summed)
    return flops


# ------------------------------------------------------------------------------------------------- pieces to segments
def _segments(program: Program, pieces: Sequence[tuple[str, str, int, int]]) -> list[Segment]:
    last_use = _last_uses(program, [piece[2:] for piece in pieces])
    known: dict[str, tuple[str, ClosedJaxpr]] = {}
    per_pattern: dict[str, int] = {}
    segments = []
    for index, (pattern, name, first, stop) in enumerate(pieces):
        equations = program.equations[first:stop]
        inputs = _free_variables(equations)
        outputs = [v for e in equations for v in e.outputs if last_use.get(v, -1) > index]
        key = _signature(equations) + str([_slot(equations, v) for v in outputs])
        if key not in known:
            number = per_pattern.setdefault(pattern, 0)
            per_pattern[pattern] += 1
            kind = pattern if number == 0 else f"{pattern}#{number + 1}"
            known[key] = (kind, _rebuild(equations, inputs, outputs))
        kind, closed = known[key]
        segments.append(Segment(kind, name, inputs, outputs, closed))
    return segments


def _last_uses(program: Program, spans: Sequence[tuple[int, int]]) -> dict[Variable, int]:
    """Index of the last segment that reads each variable (``len(spans)`` for results of the program)."""
    last: dict[Variable, int] = {}
    for index, (first, stop) in enumerate(spans):
        for equation in program.equations[first:stop]:
            last.update((v, index) for v in equation.inputs if isinstance(v, Variable))
    last.update((v, len(spans)) for v in program.outputs if isinstance(v, Variable))
    return last


def _free_variables(equations: Sequence[Equation]) -> list[Variable]:
    defined: set[Variable] = set()
    free: dict[Variable, None] = {}
    for equation in equations:
        free.update((v, None) for v in equation.inputs if isinstance(v, Variable) and v not in defined)
        defined.update(equation.outputs)
    return list(free)


def _slot(equations: Sequence[Equation], variable: Variable) -> tuple[int, int]:
    """Where a segment defines ``variable``: (equation, output)."""
    for position, equation in enumerate(equations):
        if variable in equation.outputs:
            return position, equation.outputs.index(variable)
    raise AssertionError("an output is defined in its segment")


def _signature(equations: Sequence[Equation]) -> str:
    """Hash of primitives, parameters, shapes and wiring: equal for equal layers."""
    numbers: dict[Variable, int] = {}
    digest = hashlib.sha256()

    def label(atom: Variable | Literal) -> str:
        if isinstance(atom, Literal):
            return f"{atom.val}:{atom.aval.str_short()}"
        return f"{numbers.setdefault(atom, len(numbers))}:{atom.aval.str_short()}"

    for equation in equations:
        params = re.sub(r" at 0x[0-9a-f]+", "", str(equation.eqn.params))
        atoms = [label(v) for v in equation.inputs] + ["->"] + [label(v) for v in equation.outputs]
        digest.update(f"{equation.name}{params}{atoms}\n".encode())
    return digest.hexdigest()[:16]


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

"""Flatten a program: one list of equations in trace order, each with variables of its own and its full scope text.

Calls are inlined and scans over layers unrolled where a ``descend`` predicate asks for it; constants captured by inner
programs become variables with a value. Nothing is reordered, so the equations of one module call stay contiguous.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from ._jaxpr import CALLS, abstract, called_program, inner_programs, open_program, scan_operands, scope_of

MARK = re.compile(r"mark@([^@]*)@(\d+)@")
"""Scope text of one module call: path and call number (see ``_marks``)."""


class Variable:
    """A value of a flat program; compared by identity."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any) -> None:
        """Hold the abstract value (shape and dtype)."""
        self.aval = aval


Atom = Variable | Literal


@dataclasses.dataclass(eq=False, slots=True)
class Equation:
    """One equation of a flat program."""

    eqn: JaxprEqn
    inputs: list[Atom]
    outputs: list[Variable]
    scope: str

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return str(self.eqn.primitive.name)


@dataclasses.dataclass(slots=True)
class Program:
    """A flat program."""

    equations: list[Equation]
    inputs: list[Variable]
    outputs: list[Atom]
    constants: dict[Variable, Any]


Descend = Callable[[JaxprEqn], bool]


def has_marks(program: ClosedJaxpr | Jaxpr) -> bool:
    """Tell whether any equation in ``program``, at any depth, lies inside a marked module call."""
    return any(
        MARK.search(scope_of(eqn)) or any(has_marks(inner) for inner in inner_programs(eqn))
        for eqn in open_program(program)[0].eqns
    )


def holds_marks(eqn: JaxprEqn) -> bool:
    """Descend into calls and scans that contain whole module calls, and into nothing else."""
    if eqn.primitive.name in CALLS or eqn.primitive.name == "scan":
        return any(has_marks(inner) for inner in inner_programs(eqn))
    return False


def is_plain_call(eqn: JaxprEqn) -> bool:
    """Descend into calls without derivative rules of their own: what is left can still be differentiated."""
    return eqn.primitive.name in CALLS


def is_call(eqn: JaxprEqn) -> bool:
    """Descend into every kind of call (custom derivatives too), not into loops."""
    return eqn.primitive.name != "scan" and called_program(eqn) is not None


def flatten(closed: ClosedJaxpr, descend: Descend, *, weights: int = 0) -> Program:
    """Return ``closed`` as a flat program.

    Args:
        closed: The traced program.
        descend: Which calls and scans to open (``holds_marks`` or ``is_call``); all others stay one equation.
        weights: How many of the first inputs are trained weights. A scan is opened only when it runs over stacked
            weights: over layers, not over time.
    """
    inputs = [Variable(v.aval) for v in closed.jaxpr.invars]
    builder = _Builder(descend, inputs[:weights])
    outputs = builder.run(closed, inputs, "", lambda scope: scope)
    return Program(builder.equations, inputs, outputs, builder.constants)


class _Builder:
    """Appends equations while it walks nested programs."""

    def __init__(self, descend: Descend, weights: Sequence[Variable]) -> None:
        self.descend = descend
        self.weights = set(weights)
        """Values made from weights alone."""
        self.equations: list[Equation] = []
        self.constants: dict[Variable, Any] = {}

    def run(
        self, program: ClosedJaxpr | Jaxpr, inputs: Sequence[Atom], scope: str, rename: Callable[[str], str]
    ) -> list[Atom]:
        jaxpr, constants = open_program(program)
        environment: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, constants, strict=True):
            environment[var] = variable = Variable(var.aval)
            self.constants[variable] = value

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, Literal) else environment[atom]

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(v) for v in eqn.invars], f"{scope}/{rename(scope_of(eqn))}", rename)
            environment.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, inputs: list[Atom], scope: str, rename: Callable[[str], str]) -> Sequence[Atom]:
        if eqn.primitive.name == "scan":
            if self._is_over_layers(eqn, inputs) and self.descend(eqn):
                return self._unroll(eqn, inputs, scope, rename)
        elif self.descend(eqn):
            program = called_program(eqn) or next(inner_programs(eqn))  # jit keeps its program in one parameter
            return self.run(program, inputs, scope, rename)
        outputs = [Variable(v.aval) for v in eqn.outvars]
        self.equations.append(Equation(eqn, inputs, outputs, scope))
        read = [v for v in inputs if isinstance(v, Variable)]
        if read and self.weights.issuperset(read):
            self.weights.update(outputs)
        return outputs

    def _is_over_layers(self, eqn: JaxprEqn, inputs: Sequence[Atom]) -> bool:
        stacked = inputs[sum(scan_operands(eqn.params)) :]
        return any(v in self.weights for v in stacked)

    def _unroll(self, eqn: JaxprEqn, inputs: list[Atom], scope: str, rename: Callable[[str], str]) -> list[Atom]:
        """Write a scan over layers as its iterations; slices and stacks are ordinary equations."""
        params = eqn.params
        (fixed, carried), length = scan_operands(params), params["length"]
        constants, carry, stacked = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
        rows: list[list[Atom]] = [[] for _ in range(length)]
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        for i in order:
            slices = [self._trace(lambda x, i=i: x[i], [array], scope) for array in stacked]
            outputs = self.run(params["jaxpr"], constants + carry + slices, scope, _iteration(rename, i))
            carry, rows[i] = outputs[:carried], outputs[carried:]
        columns = zip(*rows, strict=True)
        return carry + [self._trace(lambda *xs: jnp.stack(xs), list(column), scope) for column in columns]

    def _trace(self, function: Callable[..., Any], inputs: list[Atom], scope: str) -> Atom:
        closed = jax.make_jaxpr(function)(*[abstract(v.aval) for v in inputs])
        return self.run(closed, inputs, scope, lambda text: text)[0]


def _iteration(rename: Callable[[str], str], i: int) -> Callable[[str], str]:
    """Give the calls of iteration ``i`` paths and numbers of their own."""

    def renamed(scope: str) -> str:
        return MARK.sub(lambda m: f"mark@{m[1]}[{i}]@{int(m[2]) + 1_000_000 * (i + 1)}@", rename(scope))

    return renamed

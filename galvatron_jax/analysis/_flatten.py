"""Flatten a program: one list of equations in trace order, each with variables of its own and its full scope text.

Calls are inlined and scans over layers unrolled where a ``descend`` predicate asks for it; constants
captured by inner programs become variables with a value. Nothing is reordered, so the equations of one module call stay
contiguous.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from ._attention import attention_name
from ._flops import program_flops
from ._jaxpr import CALLS, abstract, called_program, inner_programs, open_program, scan_operands, scope_of
from ._marks import MARK
from ._rows import Stack, row_of


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


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """A call of attention that was opened, and may be run by a kernel instead."""

    name: str
    """See ``attention_call``."""
    inputs: list[Atom]
    outputs: Sequence[Atom]
    equations: Sequence[Equation]
    """What it consists of, one after the other."""


@dataclasses.dataclass(slots=True)
class Program:
    """A flat program."""

    equations: list[Equation]
    inputs: list[Variable]
    outputs: list[Atom]
    constants: dict[Variable, Any]
    stacks: Mapping[int, Stack] = dataclasses.field(default_factory=dict)
    """Inputs that were taken apart, by their position in the program as it was traced."""
    weights: int = 0
    """How many of the first inputs are trained."""
    calls: Sequence[Call] = ()
    """Calls of attention that ask for a kernel."""


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


def is_plain_call_or_layers(eqn: JaxprEqn) -> bool:
    """The same, and scans whose body does matrix products: where no module says what a layer is."""
    if attention_name(eqn.params):
        return False  # it stays whole until its layer is analysed
    return is_plain_call(eqn) or (eqn.primitive.name == "scan" and program_flops(eqn.params["jaxpr"]) > 0)


def is_call(eqn: JaxprEqn) -> bool:
    """Descend into every kind of call (custom derivatives too), not into loops."""
    return eqn.primitive.name != "scan" and called_program(eqn) is not None


def flatten(closed: ClosedJaxpr, descend: Descend, *, weights: int = 0, states: int = 0) -> Program:
    """Return ``closed`` as a flat program.

    Args:
        closed: The traced program.
        descend: Which calls and scans to open (``holds_marks`` or ``is_call``); all others stay one equation.
        weights: How many of the first inputs are trained weights. A scan is opened only when it runs over stacked
            weights: over layers, not over time.
        states: How many of the inputs after them are other state of the model; stacks of these are taken apart too.
    """
    inputs = [Variable(v.aval) for v in closed.jaxpr.invars]
    builder = _Builder(descend, inputs[:weights], inputs[: weights + states])
    outputs = builder.run(closed, inputs, "", lambda scope: scope)
    return builder.finish(inputs, outputs, weights, weights + states)


Rename = Callable[[str], str]


@dataclasses.dataclass(frozen=True, slots=True)
class _RowSource:
    """A value whose rows (dimension 0) can be made from the rows of one leaf: a cast or transposed stack."""

    leaf: Variable
    axis: int
    make: Callable[[Any], Any]
    """From a row of the leaf to a row of the value."""


class _Builder:
    """Appends equations while it walks nested programs."""

    def __init__(self, descend: Descend, weights: Sequence[Variable], leaves: Sequence[Variable]) -> None:
        self.descend = descend
        self.weights = set(weights)
        """Values made from weights alone."""
        self.sources = {leaf: _RowSource(leaf, 0, lambda row: row) for leaf in leaves}
        self.rows: dict[Variable, tuple[Stack, list[Variable]]] = {}
        """Leaves that were taken apart."""
        self.stacked: dict[Atom, list[Atom]] = {}
        """Rows of the results of unrolled scans."""
        self.equations: list[Equation] = []
        self.optional: set[Equation] = set()
        """Equations that nobody may need: stacks of rows, casts of whole stacks."""
        self.constants: dict[Variable, Any] = {}
        self.calls: list[Call] = []

    def run(self, program: ClosedJaxpr | Jaxpr, inputs: Sequence[Atom], scope: str, rename: Rename) -> list[Atom]:
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

    def finish(self, inputs: Sequence[Variable], outputs: Sequence[Atom], weights: int, leaves: int) -> Program:
        """Return the program whose inputs, and whose new state among the ``outputs``, are rows.

        Args:
            inputs: Inputs of the traced program: weights, other leaves of the model, and the rest.
            outputs: Its results; where there are leaves, the loss and the new values of those that are no weights.
            weights: How many inputs are weights.
            leaves: How many inputs are leaves of the model.
        """
        state = leaves - weights
        results: list[Atom] = [*outputs[:1]]
        for variable, output in zip(inputs[weights:leaves], outputs[1 : 1 + state], strict=True):
            results += self._rows_of_output(output, variable) if variable in self.rows else [output]
        results += outputs[1 + state :]
        self._stack_leaves()
        taken = [self.rows[v][1] if v in self.rows else [v] for v in inputs]
        stacks = {i: self.rows[v][0] for i, v in enumerate(inputs) if v in self.rows}
        return Program(
            equations=self._needed(results),
            inputs=[row for rows in taken for row in rows],
            outputs=results,
            constants=self.constants,
            stacks=stacks,
            weights=sum(map(len, taken[:weights])),
            calls=self.calls,
        )

    def _equation(self, eqn: JaxprEqn, inputs: list[Atom], scope: str, rename: Rename) -> Sequence[Atom]:
        if eqn.primitive.name == "scan":
            if self._is_over_layers(eqn, inputs) and self.descend(eqn):
                return self._unroll(eqn, inputs, scope, rename)
        elif self.descend(eqn):
            program = called_program(eqn) or next(inner_programs(eqn))  # jit keeps its program in one parameter
            first, outputs = len(self.equations), self.run(program, inputs, scope, rename)
            if name := attention_name(eqn.params):
                self.calls.append(Call(name, inputs, outputs, self.equations[first:]))
            return outputs
        equation = Equation(eqn, inputs, [Variable(v.aval) for v in eqn.outvars], scope)
        self.equations.append(equation)
        read = [v for v in inputs if isinstance(v, Variable)]
        if read and self.weights.issuperset(read):
            self.weights.update(equation.outputs)
        self._follow_rows(equation)
        return equation.outputs

    # ------------------------------------------------------------------------------------------------ scans over layers
    def _is_over_layers(self, eqn: JaxprEqn, inputs: Sequence[Atom]) -> bool:
        stacked = inputs[sum(scan_operands(eqn.params)) :]
        return any(v in self.weights for v in stacked)

    def _unroll(self, eqn: JaxprEqn, inputs: list[Atom], scope: str, rename: Rename) -> list[Atom]:
        """Write a scan over layers as its iterations; what they take from stacks is taken before the first one."""
        params = eqn.params
        (fixed, carried), length = scan_operands(params), params["length"]
        constants, carry, stacked = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
        slices = [self._rows_of(array, length, scope) for array in stacked]
        rows: list[list[Atom]] = [[] for _ in range(length)]
        for i in range(length - 1, -1, -1) if params["reverse"] else range(length):
            renamed = _iteration(rename, i)
            taken = [row(i, f"{scope}/{renamed('')}") for row in slices]
            outputs = self.run(params["jaxpr"], [*constants, *carry, *taken], scope, renamed)
            carry, rows[i] = outputs[:carried], outputs[carried:]
        return [*carry, *(self._stack(list(column), scope) for column in zip(*rows, strict=True))]

    def _rows_of(self, array: Atom, length: int, scope: str) -> Callable[[int, str], Atom]:
        """Return what gives row i of ``array``: a leaf of its own, or a slice taken here and now."""
        source = self.sources.get(array) if isinstance(array, Variable) else None
        if source is None:
            slices = [self._trace(lambda x, i=i: x[i], [array], scope) for i in range(length)]
            return lambda i, _: slices[i]
        leaf, made = source.leaf, source.make
        if leaf not in self.rows:
            row = jax.eval_shape(lambda x: row_of(x, source.axis, 0), abstract(leaf.aval))
            aval = jax.make_jaxpr(lambda x: x)(row).jaxpr.invars[0].aval
            self.rows[leaf] = Stack(source.axis, length), [Variable(aval) for _ in range(length)]
            if leaf in self.weights:
                self.weights.update(self.rows[leaf][1])
        if self.rows[leaf][0].axis != source.axis:
            slices = [self._trace(lambda x, i=i: x[i], [array], scope) for i in range(length)]
            return lambda i, _: slices[i]
        leaf_rows = self.rows[leaf][1]
        return lambda i, inner: leaf_rows[i] if array is leaf else self._trace(made, [leaf_rows[i]], inner)

    def _follow_rows(self, equation: Equation) -> None:
        """Remember casts and transpositions of leaves, so that a scan over the result still takes the leaf apart."""
        read = equation.inputs[0] if equation.inputs else None
        source = self.sources.get(read) if isinstance(read, Variable) else None
        if source is None or source.leaf is not read:
            return
        params = equation.eqn.params
        if equation.name == "convert_element_type":
            dtype = params["new_dtype"]
            self.sources[equation.outputs[0]] = _RowSource(source.leaf, 0, lambda row: row.astype(dtype))
        elif equation.name == "transpose":
            axis, *rest = params["permutation"]
            order = [d - (d > axis) for d in rest]
            self.sources[equation.outputs[0]] = _RowSource(source.leaf, axis, lambda row: row.transpose(order))
        else:
            return
        self.optional.add(equation)

    def _stack(self, rows: list[Atom], scope: str) -> Atom:
        """Stack rows for whoever reads the whole; dropped in the end when nobody does."""
        first = len(self.equations)
        whole = self._trace(lambda *xs: jnp.stack(xs), rows, scope)
        self.optional.update(self.equations[first:])
        self.stacked[whole] = rows
        return whole

    def _stack_leaves(self) -> None:
        """Put the stack of a leaf that is also read whole before all other equations."""
        equations, self.equations = self.equations, []
        for leaf, (stack, rows) in self.rows.items():
            whole = self._trace(lambda *xs, axis=stack.axis: jnp.stack(xs, axis), list(rows), "")
            self.optional.update(self.equations)
            for equation in equations:
                equation.inputs = [whole if v is leaf else v for v in equation.inputs]
        self.equations += equations

    def _rows_of_output(self, output: Atom, leaf: Variable) -> list[Atom]:
        """Return the rows of a new state whose old state was taken apart."""
        stack, rows = self.rows[leaf]
        if output is leaf:
            return list(rows)
        if stack.axis == 0 and isinstance(output, Variable) and output in self.stacked:
            return self.stacked[output]
        return [self._trace(lambda x, i=i: row_of(x, stack.axis, i), [output], "") for i in range(stack.count)]

    def _needed(self, results: Sequence[Atom]) -> list[Equation]:
        """Drop optional equations whose results nobody reads."""
        needed = {v for v in results if isinstance(v, Variable)}
        kept = []
        for equation in reversed(self.equations):
            if equation not in self.optional or not needed.isdisjoint(equation.outputs):
                needed.update(v for v in equation.inputs if isinstance(v, Variable))
                kept.append(equation)
        return kept[::-1]

    def _trace(self, function: Callable[..., Any], inputs: list[Atom], scope: str) -> Atom:
        closed = jax.make_jaxpr(function)(*[abstract(v.aval) for v in inputs])
        return self.run(closed, inputs, scope, lambda text: text)[0]


def _iteration(rename: Rename, i: int) -> Rename:
    """Give the calls of iteration ``i`` paths and numbers of their own."""

    def number(mark: re.Match[str]) -> str:
        module, colon, method = mark[1].partition(":")
        return f"mark@{module}[{i}]{colon}{method}@{int(mark[2]) + 1_000_000 * (i + 1)}@"

    def renamed(scope: str) -> str:
        return MARK.sub(number, rename(scope))

    return renamed

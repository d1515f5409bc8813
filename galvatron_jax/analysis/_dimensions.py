"""Named-dimension analysis: walk a program and give every dimension of every value its factors.

``analyse_dimensions`` returns the operations in order, each with its operands and results as ``Value``s (dimensions as
factors), the factors it sums over (``contracted``: a sharded one leaves partial results), and the factors that it needs
whole (``gathered``: a sharded one must be collected first). One small rule per primitive does the work (``_rules``); a
primitive without a rule blocks its results and needs its operands whole: never guessed, always sound.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from ..units import ITEM_BYTES
from ._factors import Dim, Factors
from ._flatten import Program, Variable, flatten, is_call
from ._jaxpr import called_program
from ._primitives import is_batched


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """A value with its dimensions as factors; compared by identity."""

    shape: tuple[int, ...]
    dtype: str
    dims: list[Dim]

    @property
    def bytes(self) -> int:
        """Bytes of the whole value."""
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 8)


@dataclasses.dataclass(eq=False, slots=True)
class Op:
    """One operation of the analysed program."""

    name: str
    inputs: list[Value]
    scope: str
    times: int = 1
    """How often it runs (trip counts of the loops around it)."""
    inner: bool = False
    """It stands in the body of a loop or branch."""
    outputs: list[Value] = dataclasses.field(default_factory=list)
    contracted: Dim = dataclasses.field(default_factory=list)
    gathered: list[tuple[Value, Dim]] = dataclasses.field(default_factory=list)
    flops: int = 0
    """FLOP of one run."""
    batched: bool = False
    """A product of two activations (``_primitives.is_batched``)."""

    def needs_whole(self, value: Value, dim: Sequence[int]) -> None:
        """Record that the operation cannot work on shards of ``dim`` of ``value``."""
        self.gathered.append((value, list(dim)))


class Rule:
    """What a rule sees: the operation, the factors, the primitive's parameters and the abstract results."""

    __slots__ = ("factors", "op", "params", "results", "walk")

    def __init__(self, factors: Factors, op: Op, params: Mapping[str, Any], results: Sequence[Any], walk: Walk) -> None:
        """Hold the pieces; rules are functions from this to one list of dims per result."""
        self.factors, self.op, self.params, self.results, self.walk = factors, op, params, results, walk

    @property
    def inputs(self) -> list[Value]:
        """Operands of the operation."""
        return self.op.inputs


RuleFunction = Callable[[Rule], list[list[Dim]]]
"""Return the dims of each result."""

RULES: dict[str, RuleFunction] = {}
"""Rules by primitive name; filled by ``_rules`` and by ``register_rule``."""


def register_rule(*names: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated function as the dimension rule of the primitives called ``names``.

    The function gets a ``Rule`` and returns, for each result, one list of factors per dimension. For kernels that one
    line of text describes see ``register_rule_text``.
    """

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclasses.dataclass(slots=True)
class Dimensions:
    """The analysed program."""

    factors: Factors
    ops: list[Op]
    inputs: list[Value]
    outputs: list[Value]
    unknown: Counter[str]
    """Primitives without a rule, and how often they occurred."""

    def needed_whole(self) -> Iterator[tuple[Op, list[int]]]:
        """Yield the operations that need classes whole, with those classes: what they cost a sharding.

        An unknown primitive needs everything whole. Blocked factors are left out: nobody could shard them.
        """
        for op in self.ops:
            lost = {f for _, dim in op.gathered for f in self.factors.resolve(dim) if not self.factors.is_blocked(f)}
            if lost:
                yield op, sorted(lost)

    def classes(self, value: Value) -> list[Dim]:
        """Finest factors of each dimension of ``value``."""
        return [self.factors.resolve(dim) for dim in value.dims]

    def flat_classes(self, value: Value) -> list[int]:
        """Finest factors of all dimensions of ``value`` in one list."""
        return [f for dim in value.dims for f in self.factors.resolve(dim)]


def analyse_dimensions(closed: ClosedJaxpr) -> Dimensions:
    """Analyse ``closed`` (calls of every kind are inlined first)."""
    walk = Walk(Factors())
    program = flatten(closed, is_opened)
    inputs = [walk.fresh(v.aval) for v in program.inputs]
    outputs, _ = walk.run(program, inputs)
    return Dimensions(walk.factors, walk.ops, inputs, outputs, walk.unknown)


def is_opened(eqn: JaxprEqn) -> bool:
    """Descend into every kind of call that has no rule of its own."""
    return eqn.primitive.name not in RULES and is_call(eqn)


def copy_dims(value: Value) -> list[Dim]:
    """Return the dims of ``value`` for a result with the same layout."""
    return [list(dim) for dim in value.dims]


class Walk:
    """Runs the rules over a program and, through control-flow rules, over its inner programs."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.ops: list[Op] = []
        self.unknown: Counter[str] = Counter()
        self.depth = 0
        self.scope = ""

    def fresh(self, aval: Any, *, blocked: bool = False) -> Value:
        """Return a value whose dimensions nothing is known about."""
        shape = tuple(aval.shape)
        return Value(shape, str(aval.dtype), [self.factors.new(n, blocked=blocked) for n in shape])

    def run(
        self, program: Program, inputs: Sequence[Value], times: int = 1
    ) -> tuple[list[Value], dict[Variable, Value]]:
        """Analyse ``program``, which runs ``times`` times, on ``inputs``; return its results and all its values."""
        values: dict[Variable, Value] = dict(zip(program.inputs, inputs, strict=True))
        values.update((v, self.fresh(v.aval)) for v in program.constants)

        def read(atom: Variable | Literal) -> Value:
            return self.fresh(atom.aval) if isinstance(atom, Literal) else values[atom]

        for equation in program.equations:
            scope = self.scope + equation.scope
            op = Op(equation.name, [read(v) for v in equation.inputs], scope, times, self.depth > 0)
            op.batched = is_batched(equation.name, equation.eqn.params)
            avals = [v.aval for v in equation.outputs]
            dims = self._apply(Rule(self.factors, op, equation.eqn.params, avals, self), called_program(equation.eqn))
            op.outputs = [Value(tuple(a.shape), str(a.dtype), d) for a, d in zip(avals, dims, strict=True)]
            self.ops.append(op)
            values.update(zip(equation.outputs, op.outputs, strict=True))
        return [read(v) for v in program.outputs], values

    def run_inner(self, program: ClosedJaxpr | Jaxpr, inputs: Sequence[Value], times: int) -> list[Value]:
        """Analyse the body of a loop, branch or call."""
        closed = program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())
        self.depth += 1
        results, _ = self.run(flatten(closed, is_opened), inputs, times)
        self.depth -= 1
        return results

    def _apply(self, rule: Rule, called: ClosedJaxpr | Jaxpr | None) -> list[list[Dim]]:
        function = RULES.get(rule.op.name)
        if function is not None:
            outer, self.scope = self.scope, rule.op.scope
            dims = function(rule)
            self.scope = outer
            return dims
        if called is not None:
            return [value.dims for value in self.run_inner(called, rule.inputs, rule.op.times)]
        self.unknown[rule.op.name] += 1
        for value in rule.inputs:
            rule.op.needs_whole(value, [f for dim in value.dims for f in dim])
        return [self.fresh(aval, blocked=True).dims for aval in rule.results]

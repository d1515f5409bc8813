"""The factored form: a class that is a minor part of a parameter's dimension becomes a dimension of its own.

A fused projection of queries, keys and values has a kernel ``[embed, 3 * heads * head_dim]``: the heads can be sharded
only behind the 3, which no ``NamedSharding`` can name (ignoring it costs 2.3 times the bytes: notes/analysis.md,
section 4). So the program of such a layer kind is written again with the arrays concerned split where a class begins:
the kernel is stored as ``[embed, 3, heads * head_dim]``, products make ``[batch, seq, 3, heads * head_dim]``, and the
split into three takes indices of the 3. Row-major order does not change, so the user's array is a reshape away.

Only where the flat form loses a class, only with the operations below, and only where neither inputs (parameters
apart) nor outputs of the layer are split. Otherwise the class stays lost, and nothing is rewritten.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from ._candidates import stream_classes
from ._cut import Segment
from ._dimensions import Value
from ._factors import Dim
from ._flatten import Equation, Variable
from ._jaxpr import run_equation, scope_name
from ._layer import Layer, phase_of
from ._primitives import ELEMENTWISE

Shape = tuple[int, ...]


class _NotFactorableError(Exception):
    """An operation on a split array has no factored form."""


def factor(layer: Layer, classes: frozenset[int]) -> Segment | None:
    """Return the segment of ``layer`` with every class of ``classes`` first in its dimension, None when it can't be.

    The program of the result takes parameters in their stored shapes.

    Args:
        layer: The analysed layer.
        classes: Classes to be sharded, some of them behind factors that must not be.
    """
    split = _Split(layer, classes)
    edges = [v for i, v in enumerate(layer.inputs) if i not in layer.parameters] + layer.outputs
    if any(split.is_split(v) for v in edges):
        return None
    arguments = [
        jax.ShapeDtypeStruct(split.shape(v), aval.dtype)
        for v, aval in zip(layer.inputs, layer.segment.program.in_avals, strict=True)
    ]
    try:
        program = jax.make_jaxpr(lambda *values: _run(layer, split, values))(*arguments)
    except _NotFactorableError:
        return None
    return dataclasses.replace(layer.segment, program=program)


def undivided_fusions(layer: Layer) -> list[int]:
    """Return the parameters (by position) that hold several projections in a form that cannot be sharded by class.

    Their parts differ in width (queries, keys and values of grouped attention in one product), or an operation between
    the product and the cut has no factored form. Tensor parallelism leaves them whole.
    """
    factors = layer.dimensions.factors
    stream = stream_classes(layer)
    cut = {
        f
        for op in layer.ops
        if op.name in ("slice", "split") and phase_of(op) == "forward" and all(v.shape[-1] > 1 for v in op.outputs)
        for _, dim in op.gathered
        for f in factors.resolve(dim)
        if f not in stream and not factors.is_blocked(f)
    }
    return [
        position
        for position, index in enumerate(layer.parameters)
        for dims in [layer.dimensions.classes(layer.inputs[index])]
        if any(_is_behind_parts(layer, dim) or not cut.isdisjoint(dim) for dim in dims)
    ]


def _is_behind_parts(layer: Layer, dim: Dim) -> bool:
    is_blocked = layer.dimensions.factors.is_blocked
    return len(dim) > 1 and is_blocked(dim[0]) and not all(map(is_blocked, dim))


class _Split:
    """Which dimensions are split, and where."""

    def __init__(self, layer: Layer, classes: frozenset[int]) -> None:
        self._dimensions = layer.dimensions
        self._classes = classes

    def parts(self, value: Value) -> list[list[Shape]]:
        """Return the sizes of the factors in each part of each dimension; a class of ``classes`` begins a part."""
        return [self._parts(dim) for dim in self._dimensions.classes(value)]

    def _parts(self, dim: Dim) -> list[Shape]:
        parts: list[list[int]] = [[]]
        for position, factor in enumerate(dim):
            if position and factor in self._classes:
                parts.append([])
            parts[-1].append(self._dimensions.factors.size(factor))
        return [tuple(part) for part in parts]

    def sizes(self, value: Value) -> list[Shape]:
        """Return the stored sizes of each dimension: one for each part."""
        return [
            tuple(math.prod(part) for part in parts) if len(parts) > 1 else (size,)
            for parts, size in zip(self.parts(value), value.shape, strict=True)
        ]

    def shape(self, value: Value) -> Shape:
        """Return the stored shape."""
        return tuple(size for dim in self.sizes(value) for size in dim)

    def axes(self, value: Value, dims: Sequence[int]) -> tuple[int, ...]:
        """Return the stored axes of ``dims``, in their order."""
        counts = [len(dim) for dim in self.sizes(value)]
        return tuple(sum(counts[:i]) + k for i in dims for k in range(counts[i]))

    def is_split(self, value: Value) -> bool:
        """Tell whether ``value`` is stored in another shape than its own."""
        return any(len(dim) > 1 for dim in self.sizes(value))


def _run(layer: Layer, split: _Split, arrays: Sequence[Any]) -> list[Any]:
    program, values = layer.forward, layer.forward_values
    environment: dict[Any, Any] = {**program.constants, **dict(zip(program.inputs, arrays, strict=True))}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else environment[atom]

    for equation in program.equations:
        known = [values[v] if isinstance(v, Variable) else None for v in equation.inputs]
        made = [values[v] for v in equation.outputs]
        arguments = [read(v) for v in equation.inputs]
        with jax.named_scope(scope_name(equation.scope)):
            if any(v is not None and split.is_split(v) for v in [*known, *made]):
                results = _run_split(_SplitEquation(split, equation, arguments, known, made))
            else:
                results = run_equation(equation.eqn, arguments)
        environment.update(zip(equation.outputs, results, strict=True))
    return [read(v) for v in program.outputs]


# ---------------------------------------------------------------------------------------------------------- operations
@dataclasses.dataclass(frozen=True, slots=True)
class _SplitEquation:
    split: _Split
    equation: Equation
    arguments: list[Any]
    inputs: list[Value | None]
    """None for literals."""
    outputs: list[Value]

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.equation.eqn.params)

    def operand(self, index: int = 0) -> Value:
        value = self.inputs[index]
        if value is None:
            raise _NotFactorableError(self.equation.name)
        return value

    def bind(self, arguments: Sequence[Any], **changes: Any) -> list[Any]:
        return run_equation(self.equation.eqn, arguments, **changes)


def _run_split(e: _SplitEquation) -> list[Any]:
    name = e.equation.name
    operation = _elementwise if name in ELEMENTWISE else _OPERATIONS.get(name)
    if operation is None:
        raise _NotFactorableError(name)
    results = operation(e)
    if any(r.shape != e.split.shape(v) for r, v in zip(results, e.outputs, strict=True)):
        raise _NotFactorableError(name)
    return results


def _elementwise(e: _SplitEquation) -> list[Any]:
    out, sizes = e.outputs[0], e.split.sizes(e.outputs[0])
    aligned = []
    for argument, value in zip(e.arguments, e.inputs, strict=True):
        if not jnp.ndim(argument):
            aligned.append(argument)
            continue
        shape = jnp.shape(argument) if value is None else value.shape
        parts = [part if n == m else (1,) * len(part) for part, n, m in zip(sizes, shape, out.shape, strict=True)]
        aligned.append(jnp.reshape(argument, [n for part in parts for n in part]))
    return e.bind(aligned)


def _reshape(e: _SplitEquation) -> list[Any]:
    """The parts in another grouping: legal where both have the same factors in the same order."""
    known, made = ([n for dim in e.split.parts(v) for part in dim for n in part] for v in (e.operand(), e.outputs[0]))
    if known != made:
        raise _NotFactorableError(e.equation.name)
    return [jnp.reshape(e.arguments[0], e.split.shape(e.outputs[0]))]


def _transpose(e: _SplitEquation) -> list[Any]:
    return [lax.transpose(e.arguments[0], e.split.axes(e.operand(), e.params["permutation"]))]


def _broadcast(e: _SplitEquation) -> list[Any]:
    value, out = e.operand(), e.outputs[0]
    targets = e.params["broadcast_dimensions"]
    axes: list[int] = []
    for source, target in enumerate(targets):
        here = e.split.axes(out, [target])
        axes += here if value.shape[source] == out.shape[target] else here[:1]
    return [lax.broadcast_in_dim(e.arguments[0], e.split.shape(out), axes)]


def _reduce(e: _SplitEquation) -> list[Any]:
    return e.bind(e.arguments, axes=e.split.axes(e.operand(), e.params["axes"]))


def _dot_general(e: _SplitEquation) -> list[Any]:
    left, right = e.operand(0), e.operand(1)
    (left_sum, right_sum), (left_batch, right_batch) = e.params["dimension_numbers"]
    numbers = (
        (e.split.axes(left, left_sum), e.split.axes(right, right_sum)),
        (e.split.axes(left, left_batch), e.split.axes(right, right_batch)),
    )
    return e.bind(e.arguments, dimension_numbers=numbers)


def _slice(e: _SplitEquation) -> list[Any]:
    params = e.params
    return [_take(e, e.outputs[0], params["start_indices"], params["strides"])]


def _split(e: _SplitEquation) -> list[Any]:
    axis, start, results = e.params["axis"], 0, []
    for out in e.outputs:
        starts = [0] * len(out.shape)
        starts[axis] = start
        start += out.shape[axis]
        results.append(_take(e, out, starts, None))
    return results


def _take(e: _SplitEquation, out: Value, starts: Sequence[int], strides: Sequence[int] | None) -> Any:
    """Take ``out`` from the operand: where a dimension is split, at one index of its first parts."""
    if strides is not None and any(stride != 1 for stride in strides):
        raise _NotFactorableError(e.equation.name)
    low: list[int] = []
    high: list[int] = []
    for parts, start, size in zip(e.split.sizes(e.operand()), starts, out.shape, strict=True):
        for first, last in [(start, start + size)] if len(parts) == 1 else _indices(parts, start, size):
            low.append(first)
            high.append(last)
    return jnp.reshape(lax.slice(e.arguments[0], low, high), e.split.shape(out))


def _indices(parts: Shape, start: int, size: int) -> list[tuple[int, int]]:
    """Return the range in each of ``parts`` that holds the elements ``start`` to ``start + size`` of their product."""
    first = next((k for k in range(len(parts) + 1) if math.prod(parts[k:]) <= size), len(parts))
    if math.prod(parts[first:]) != size or start % size:
        raise _NotFactorableError("slice")
    index, ranges = start // size, [(0, part) for part in parts[first:]]
    for part in reversed(parts[:first]):
        index, here = divmod(index, part)
        ranges.insert(0, (here, here + 1))
    return ranges


_OPERATIONS: dict[str, Callable[[_SplitEquation], list[Any]]] = {
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "dot_general": _dot_general,
    "slice": _slice,
    "split": _split,
}

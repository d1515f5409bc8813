"""Ulysses (Jacobs et al. 2023, arXiv:2309.14509): the sequence is sharded everywhere but inside attention.

Attention is where positions meet positions: every operation that holds ``seq`` twice (scores, probabilities, masks),
and what lies between two of those (the sums of a softmax). Inside, ``heads`` is sharded in place of ``seq``; a value
that crosses the border changes from one to the other, which is an all-to-all. Cotangents cross the other way.

Legal when

* no operation needs ``seq`` whole, and no parameter has it;
* gradients that are sums over samples are sums over positions too;
* whatever flows in or out with a gradient has ``seq`` exactly once, as a dimension of its own (no second sequence);
* all products of attention batch over one class, which stands first in its dimension, is summed over by nothing inside,
  and which every differentiable value that crosses has: those are the heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import get_args

from ..profile import CollectiveKind
from ..strategy import Remat
from ._collectives import Predicted, narrow_source, narrow_use, reduction, root_of
from ._dimensions import Op, Value
from ._flatten import Equation, Variable
from ._layer import Layer, phase_of
from ._primitives import is_kernel_name

_SUMS = frozenset(["add_any"])
"""Sums of cotangents: inside when all they add is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """An operation, of the analysed or of the forward program: its name, what it reads and what it makes."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """Attention in the forward program of a layer, as Ulysses runs it."""

    heads: frozenset[int]
    """Classes sharded inside in place of ``seq``."""
    inside: frozenset[int]
    """Positions of the equations of ``Layer.forward`` that run inside."""
    entering: frozenset[int]
    """Ids of the values that change layout where an inside operation reads them."""
    leaving: frozenset[int]
    """Ids of the values that change layout where an outside operation reads them."""


def find_attention(layer: Layer, batch: int, seq: int) -> Attention | None:
    """Return where attention is in ``layer``; None when Ulysses is not legal.

    Args:
        layer: The analysed layer.
        batch: The batch class.
        seq: The sequence class.
    """
    border = _border(layer, _steps(layer), seq)
    if not (_sequence_is_free(layer, seq) and _gradients_sum_both(layer, batch, seq)):
        return None
    heads = _heads(layer, [layer.ops[i] for i in sorted(border.inside)], frozenset([batch, seq]))
    if heads is None or not _all_cross(layer, border, heads):
        return None
    forward = _border(layer, [_step(layer, e) for e in layer.forward.equations], seq)
    return Attention(heads, forward.inside, frozenset(forward.entering), frozenset(forward.leaving))


def ulysses_collectives(layer: Layer, attention: Attention, batch: int, seq: int) -> list[Predicted]:
    """Return the exchanges around attention, and the sums over ``seq`` that are not over ``batch`` too."""
    border = _border(layer, _steps(layer), seq)
    crossing: dict[int, _Crossing] = {}
    for key, place in [*border.entering.items(), *border.leaving.items()]:
        moved = (narrow_source if key in border.entering else narrow_use)(layer, place.value)
        crossing.setdefault(id(moved), _Crossing(moved)).readers.extend(place.readers)
    found = [_exchange(layer, place, attention.heads) for place in crossing.values()]
    sums = [
        reduction(layer, op, frozenset([seq]))
        for i, op in enumerate(layer.ops)
        if i not in border.inside and seq in layer.contracted(op) and batch not in layer.contracted(op)
    ]
    return found + sums


def exchanged_values(layer: Layer, seq: int) -> frozenset[int]:
    """Return the ids of the values that cross: remat ``none`` keeps them, so that none crosses twice."""
    border = _border(layer, _steps(layer), seq)
    return frozenset(border.entering) | frozenset(border.leaving)


# ---------------------------------------------------------------------------------------------------------- the border
@dataclasses.dataclass(slots=True)
class _Crossing:
    """A value that crosses, and the positions of the operations that read it on the other side."""

    value: Value
    readers: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class _Border:
    inside: frozenset[int]
    entering: dict[int, _Crossing]
    """Values made outside that are read inside, by id."""
    leaving: dict[int, _Crossing]


def _border(layer: Layer, steps: Sequence[Step], seq: int) -> _Border:
    inside = _inside(layer, steps, seq)
    given = _depending_on(layer.dimensions.inputs, steps)
    made = {id(v) for i in inside for v in steps[i].outputs}
    border = _Border(inside, {}, {})
    for i, step in enumerate(steps):
        ways = border.entering if i in inside else border.leaving
        for value in step.inputs:
            if _count(layer, value, seq) == 1 and id(value) in given and (id(value) in made) != (i in inside):
                ways.setdefault(id(value), _Crossing(value)).readers.append(i)
    for value in [*layer.outputs, *layer.gradients.values()]:
        if id(value) in made and _count(layer, value, seq) == 1:
            border.leaving.setdefault(id(value), _Crossing(value))
    return border


def _steps(layer: Layer) -> list[Step]:
    return [Step(op.name, tuple(op.inputs), tuple(op.outputs)) for op in layer.ops]


def _inside(layer: Layer, steps: Sequence[Step], seq: int) -> frozenset[int]:
    """Positions of the operations inside attention."""
    inside = {i for i, s in enumerate(steps) if any(_count(layer, v, seq) > 1 for v in (*s.inputs, *s.outputs))}
    made = {id(v) for i in inside for v in steps[i].outputs}
    between = []
    for i, step in enumerate(steps):
        carriers = [v for v in step.inputs if _count(layer, v, seq)]
        if i not in inside and carriers and not is_kernel_name(step.name) and all(id(v) in made for v in carriers):
            made.update(id(v) for v in step.outputs)
            between.append(i)
    needed = {id(v) for i in inside for v in steps[i].inputs}
    for i in reversed(between):
        if steps[i].name in _SUMS or any(id(v) in needed for v in steps[i].outputs):
            needed.update(id(v) for v in steps[i].inputs)
            inside.add(i)
    return frozenset(inside)


def _count(layer: Layer, value: Value, factor: int) -> int:
    return layer.dimensions.flat_classes(value).count(factor)


def _depending_on(values: Iterable[Value], steps: Sequence[Step]) -> set[int]:
    found = {id(v) for v in values}
    for step in steps:
        if any(id(v) in found for v in step.inputs):
            found.update(id(v) for v in step.outputs)
    return found


def _step(layer: Layer, equation: Equation) -> Step:
    values = layer.forward_values
    read = tuple(values[v] for v in equation.inputs if isinstance(v, Variable))
    return Step(equation.name, read, tuple(values[v] for v in equation.outputs))


# ------------------------------------------------------------------------------------------------------------ legality
def _sequence_is_free(layer: Layer, seq: int) -> bool:
    """Tell whether ``seq`` may be sharded outside attention."""
    factors, dimensions = layer.dimensions.factors, layer.dimensions
    if factors.is_blocked(seq) or any(seq in factors.resolve(dim) for op in layer.ops for _, dim in op.gathered):
        return False
    if any(seq in layer.classes(layer.inputs[i]) for i in layer.parameters):
        return False
    streams = [layer.inputs[i] for i in layer.differentiated if i not in layer.parameters and layer.inputs[i].shape]
    streams += [v for v in layer.outputs if len(v.shape) > 1 and "float" in v.dtype]
    return all([dim for dim in dimensions.classes(v) if seq in dim] == [[seq]] for v in streams)


def _gradients_sum_both(layer: Layer, batch: int, seq: int) -> bool:
    """Tell whether every gradient that is a sum over samples is one over positions too.

    Behind a mean over positions all ranks would compute the same, and a reduction over them would be too many.
    """
    gradients = {id(layer.gradients[i]) for i in layer.parameters if i in layer.gradients}
    return all(
        seq in layer.contracted(op) or root_of(layer, op.outputs[0]) not in gradients
        for op in layer.ops
        if batch in layer.contracted(op)
    )


def _heads(layer: Layer, inside: Sequence[Op], others: frozenset[int]) -> frozenset[int] | None:
    """Return the class that all products inside batch over (none without products), None when there is no such."""
    products = [op for op in inside if op.flops]
    if not products:
        return frozenset()
    shared = frozenset.intersection(*[layer.classes(v) for op in products for v in [*op.inputs[:2], *op.outputs]])
    legal = [f for f in sorted(shared - others) if _is_free_inside(layer, inside, f)]
    return frozenset([max(legal, key=layer.dimensions.factors.size)]) if legal else None


def _is_free_inside(layer: Layer, inside: Sequence[Op], factor: int) -> bool:
    factors = layer.dimensions.factors
    if factors.is_blocked(factor) or any(factor in layer.contracted(op) for op in inside):
        return False
    if any(factor in factors.resolve(dim) for op in inside for _, dim in op.gathered):
        return False
    dims = [dim for op in inside for v in [*op.inputs, *op.outputs] for dim in layer.dimensions.classes(v)]
    return all(dim[0] == factor for dim in dims if factor in dim)


def _all_cross(layer: Layer, border: _Border, heads: frozenset[int]) -> bool:
    """Tell whether every value that crosses with a gradient has the heads, and every value inside with heads crosses.

    The second keeps parameters with heads (relative biases) out: their gradients would be shards, not partial sums.
    """
    differentiable = {id(v) for i in layer.differentiated for v in [layer.inputs[i]]}
    for op in layer.ops:
        if any(id(v) in differentiable for v in op.inputs):
            differentiable.update(id(v) for v in op.outputs if "float" in v.dtype)
    for key, place in [*border.entering.items(), *border.leaving.items()]:
        if key in differentiable and not heads <= layer.classes(place.value):
            return False
    made = {id(v) for i in border.inside for v in layer.ops[i].outputs}
    return not any(
        heads & layer.classes(v) and id(v) not in made and id(v) not in border.entering
        for i in border.inside
        for v in layer.ops[i].inputs
    )


def _exchange(layer: Layer, place: _Crossing, heads: frozenset[int]) -> Predicted:
    """Return the exchange of a value; it runs again where it is read again and ``none`` alone keeps its result."""
    kind: CollectiveKind = "all-to-all" if heads & layer.classes(place.value) else "all-gather"
    maker = layer.makers.get(id(place.value))
    readers = [layer.ops[i] for i in place.readers]
    phase = phase_of(readers[0]) if readers else "backward" if maker and phase_of(maker) == "backward" else "forward"
    again: set[Remat] = set()
    if phase == "forward":
        again = {
            remat
            for op in readers
            for remat in (get_args(Remat) if phase_of(op) == "backward" else layer.recomputed_by(op))
        }
    return Predicted(
        phase=phase,
        kind=kind,
        value=place.value,
        over=frozenset(),
        root=id(place.value),
        recomputed=frozenset(again - {"none"}),
    )

"""Tensor-parallel candidates: class sets which, sharded together, divide the layer's work with the fewest bytes moved.

A set is legal when no operation holds two of its classes or one of them twice (a mesh axis can shard one dimension of
an array only), no operation needs one of them whole, none of them is a class of the stream, and each stands first in
its dimension of every parameter (a ``NamedSharding`` cannot name a minor part of a dimension). Sets are ranked by the
share of matmul FLOPs they divide, then by the bytes of their collectives. Megatron's choice for a Llama block, {kv
heads, mlp}, is the best set: it is derived here, not written down.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from ._collectives import Predicted, sequence_collectives, tensor_collectives
from ._dimensions import Op
from ._layer import Layer

_MAX_CLASSES = 4
"""Layers with more than four independent blocks of sharded work are unknown; larger sets are not tried."""

_SHARE_DIGITS = 3
"""Shares that agree to a thousandth are equal; bytes decide."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClassSet:
    """A legal set with its figures."""

    classes: frozenset[int]
    flops_share: float
    max_degree: int
    tensor: tuple[Predicted, ...]
    sequence: tuple[Predicted, ...] | None


def stream_classes(layer: Layer) -> frozenset[int]:
    """Return the classes of the stream: of the differentiable values that enter and leave the layer."""
    inputs = [layer.inputs[i] for i in layer.differentiated if i not in layer.parameters]
    outputs = [v for v in layer.outputs if len(v.shape) > 1]
    return frozenset(f for v in inputs + outputs for f in layer.dimensions.flat_classes(v))


def class_sets(layer: Layer, *, seq: int | None) -> list[ClassSet]:
    """Return the legal class sets of ``layer``, best first.

    Args:
        layer: The analysed layer.
        seq: The sequence class, for sequence parallelism; None when there is none.
    """
    stream = stream_classes(layer)
    single = sorted(
        f for f in _parameter_classes(layer) - stream - _hindered(layer) if not _conflicts(layer, frozenset([f]))
    )
    legal = [
        frozenset(chosen)
        for count in range(1, min(len(single), _MAX_CLASSES) + 1)
        for chosen in itertools.combinations(single, count)
        if not _conflicts(layer, frozenset(chosen))
    ]
    sets = [_measure(layer, chosen, stream, seq) for chosen in legal]
    useful = [s for s in sets if s.flops_share > 0 and s.max_degree > 1]
    return sorted(useful, key=lambda s: (-round(s.flops_share, _SHARE_DIGITS), _bytes(s), sorted(s.classes)))


def spill_class(layer: Layer, found: ClassSet) -> tuple[int, int] | None:
    """Return (class, class that takes the rest of a greater degree), or None.

    Grouped queries: kv heads ``h`` spill into the query heads of a group ``g``, which follow them in every dimension
    that has both. Keys and values have no ``g``: the ranks that share a kv head compute them alike.
    """
    stream = stream_classes(layer)
    others = sorted(_parameter_classes(layer) - stream - found.classes - _needed_whole(layer))
    for h in sorted(found.classes):
        for g in others:
            apart = found.classes - {h}
            clash = _conflicts(layer, frozenset([g])) or any(
                g in held and held & apart for op in layer.ops for held in [_held(layer, op)]
            )
            if not clash and _follows(layer, h, g):
                return h, g
    return None


def _follows(layer: Layer, h: int, g: int) -> bool:
    """Tell whether ``g`` stands first or right after ``h`` in every dimension, and divides all batched products of it.

    Those of attention: scores and mixture. The head dim, which only the mixture has, would leave the scores whole.
    """
    dims = [dim for op in layer.ops for v in [*op.inputs, *op.outputs] for dim in layer.dimensions.classes(v)]
    placed = all(dim[:1] == [g] or dim[:2] == [h, g] for dim in dims if g in dim)
    batched = [held for op in layer.ops if op.batched for held in [_held(layer, op)] if h in held]
    return placed and bool(batched) and all(g in held for held in batched)


def _parameter_classes(layer: Layer) -> set[int]:
    """Shardable classes of the parameters."""
    found = {f for i in layer.parameters for f in layer.classes(layer.inputs[i])}
    return {f for f in found if not layer.dimensions.factors.is_blocked(f)}


def _hindered(layer: Layer) -> set[int]:
    """Classes that some operation needs whole, or that are a minor part of a parameter's dimension."""
    found = _needed_whole(layer)
    for index in layer.parameters:
        for dim in layer.dimensions.classes(layer.inputs[index]):
            found.update(dim[1:])
    return found


def _needed_whole(layer: Layer) -> set[int]:
    return {f for op in layer.ops for _, dim in op.gathered for f in layer.dimensions.factors.resolve(dim)}


def _conflicts(layer: Layer, chosen: frozenset[int]) -> bool:
    """Tell whether an operation would have to hold two shards over the same axis.

    That is: it holds two classes of ``chosen``; or, for one class alone, it holds it twice in one array, or sums over
    it while its result has it again (the recurrence of an RNN).
    """
    if len(chosen) > 1:
        return any(len(_held(layer, op) & chosen) > 1 for op in layer.ops)
    return any(
        any(_twice(layer.dimensions.flat_classes(v), chosen) for v in [*op.inputs, *op.outputs])
        or any(layer.contracted(op) & layer.classes(v) & chosen for v in op.outputs)
        for op in layer.ops
    )


def _held(layer: Layer, op: Op) -> set[int]:
    return {f for v in [*op.inputs, *op.outputs] for f in layer.dimensions.flat_classes(v)}


def _twice(classes: list[int], chosen: frozenset[int]) -> bool:
    return any(classes.count(f) > 1 for f in chosen)


def _measure(layer: Layer, chosen: frozenset[int], stream: frozenset[int], seq: int | None) -> ClassSet:
    usable = seq is not None and seq in stream and not layer.dimensions.factors.is_blocked(seq)
    return ClassSet(
        classes=chosen,
        flops_share=_share(layer, chosen),
        max_degree=math.gcd(*[layer.dimensions.factors.size(f) for f in chosen]),
        tensor=tuple(tensor_collectives(layer, chosen)),
        sequence=tuple(sequence_collectives(layer, chosen, stream, seq)) if usable and seq is not None else None,
    )


def _share(layer: Layer, chosen: frozenset[int]) -> float:
    """Share of the matmul FLOPs (of the parameter bytes, in a layer without products) that ``chosen`` divides."""
    dots = [op for op in layer.ops if op.flops]
    total = sum(op.flops * op.times for op in dots)
    if total:
        return sum(op.flops * op.times for op in dots if any(layer.classes(v) & chosen for v in op.inputs)) / total
    values = [layer.inputs[i] for i in layer.parameters]
    return sum(v.bytes for v in values if layer.classes(v) & chosen) / (sum(v.bytes for v in values) or 1)


def _bytes(found: ClassSet) -> int:
    return sum(collective.value.bytes for collective in found.tensor)

"""Tensor-parallel candidates: class sets which, sharded together, divide the layer's work with the fewest bytes moved.

A set is legal when no operation holds two of its classes or one of them twice (a mesh axis can shard one dimension of
an array only), no operation needs one of them whole, none of them is a class of the stream, and each stands first in
its dimension of every parameter (a ``NamedSharding`` cannot name a minor part of a dimension; ``_factored`` rewrites
programs where that alone is in the way). Sets are ranked by the share of matmul FLOPs they divide (of parameter bytes
they save, in a layer without products), then by the bytes of their collectives; those that reduce arrays larger than
the stream (logits, scores) come last, since no share of the FLOPs is worth that. Megatron's choice for a Llama block,
{kv heads, mlp}, is the best set: it is derived here, not written down.

No operation holds two classes of a set, so each operation is divided, and each collective caused, by one class alone:
the figures of a set are sums of its classes' figures, and the legal sets are the cliques of a graph over at most a
dozen classes. Complexity: one pass over the operations for each class and each pair of classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable

from ._collectives import Predicted, sequence_collectives, sequence_is_free, tensor_collectives
from ._dimensions import Op
from ._layer import Layer, phase_of

_MAX_CLASSES = 4
"""Layers with more than four independent blocks of sharded work are unknown; larger sets are not tried."""

_SHARE_DIGITS = 3
"""Shares that agree to a thousandth are equal; bytes decide."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClassSet:
    """A legal set with its figures."""

    classes: frozenset[int]
    flops_share: float
    collective_bytes: int
    max_degree: int
    reduces_more_than_stream: bool
    """Some array that it reduces has more elements than the stream."""


def stream_classes(layer: Layer) -> frozenset[int]:
    """Return the classes of the stream: of the differentiable values that enter and leave the layer."""
    return frozenset(f for v in layer.stream for f in layer.dimensions.flat_classes(v))


def class_sets(layer: Layer, *, factored: bool = False) -> list[ClassSet]:
    """Return the legal class sets of ``layer``, best first.

    Args:
        layer: The analysed layer.
        factored: Allow classes that stand behind a factor which must not be sharded (the 3 of a fused qkv).
    """
    single = {f: _measure(layer, frozenset([f])) for f in _legal_classes(layer, factored)}
    held = {f: {id(op) for op in layer.ops if f in _held(layer, op)} for f in single}
    apart = {pair for pair in itertools.combinations(single, 2) if not held[pair[0]] & held[pair[1]]}
    sets = [
        _joined([single[f] for f in chosen])
        for count in range(1, min(len(single), _MAX_CLASSES) + 1)
        for chosen in itertools.combinations(single, count)
        if all(pair in apart for pair in itertools.combinations(chosen, 2))
    ]
    useful = [s for s in sets if s.flops_share > 0 and s.max_degree > 1]
    only_stores = not any(op.flops for op in layer.ops)
    return sorted(useful, key=lambda found: _rank(found, only_stores))


def _rank(found: ClassSet, only_stores: bool) -> tuple[bool, float, int, list[int]]:
    """Order by what is divided; of tables that are only stored, by what is saved at the set's largest degree.

    Else the two token types of a BERT would hold its vocabulary to two ranks.
    """
    share = found.flops_share * (1 - 1 / found.max_degree if only_stores else 1)
    return found.reduces_more_than_stream, -round(share, _SHARE_DIGITS), found.collective_bytes, sorted(found.classes)


def tensor_parallel(layer: Layer, found: ClassSet) -> tuple[Predicted, ...]:
    """Return the collectives of sharding ``found`` with the stream replicated."""
    return tuple(tensor_collectives(layer, found.classes))


def sequence_parallel(layer: Layer, found: ClassSet, seq: int | None) -> tuple[Predicted, ...] | None:
    """Return the collectives with the stream sharded along ``seq`` between the products, None when not legal.

    It is not where another value flows beside the stream (an encoder's output, a relative bias): only one is sharded.
    """
    stream = stream_classes(layer)
    if any(layer.classes(v) != stream for v in layer.stream):
        return None
    if seq is None or seq not in stream or not sequence_is_free(layer, found.classes, stream, seq):
        return None
    return tuple(sequence_collectives(layer, found.classes, stream, seq))


def spill_class(layer: Layer, found: ClassSet) -> tuple[int, int] | None:
    """Return (class, class that takes the rest of a greater degree), or None.

    Grouped queries: kv heads ``h`` spill into the query heads of a group ``g``, which follow them in every dimension
    that has both. Keys and values have no ``g``: the ranks that share a kv head compute them alike.
    """
    others = sorted(_parameter_classes(layer) - stream_classes(layer) - found.classes - _needed_whole(layer))
    for h in sorted(found.classes):
        for g in others:
            apart = found.classes - {h}
            clash = _occurs_twice(layer, g) or any(
                g in held and held & apart for op in layer.ops for held in [_held(layer, op)]
            )
            if not clash and _follows(layer, h, g):
                return h, g
    return None


def _follows(layer: Layer, h: int, g: int) -> bool:
    """Tell whether ``g`` stands first or right after ``h`` in every dimension, and divides all batched products of it.

    Those of attention: scores and mixture. The head dim, which only the mixture has, would leave the scores whole; one
    that the forward pass sums over would reduce them.
    """
    dims = [dim for op in layer.ops for v in [*op.inputs, *op.outputs] for dim in layer.dimensions.classes(v)]
    placed = all(dim[:1] == [g] or dim[:2] == [h, g] for dim in dims if g in dim)
    batched = [op for op in layer.ops if op.batched and h in _held(layer, op)]
    summed = any(g in layer.contracted(op) for op in batched if phase_of(op) == "forward")
    return placed and bool(batched) and not summed and all(g in _held(layer, op) for op in batched)


# ------------------------------------------------------------------------------------------------------------ legality
def _legal_classes(layer: Layer, factored: bool) -> list[int]:
    minor = _minor_classes(layer, factored)
    found = _parameter_classes(layer) - stream_classes(layer) - _needed_whole(layer) - minor
    return sorted(f for f in found if not _occurs_twice(layer, f))


def _parameter_classes(layer: Layer) -> set[int]:
    """Shardable classes of the parameters."""
    found = {f for i in layer.parameters for f in layer.classes(layer.inputs[i])}
    return {f for f in found if not layer.dimensions.factors.is_blocked(f)}


def _minor_classes(layer: Layer, factored: bool) -> set[int]:
    """Classes that are a minor part of a parameter's dimension.

    If ``factored``, not those behind factors that cannot be sharded anyway: blocked, or needed whole (indexed).
    """
    whole = _needed_whole(layer)

    def is_skipped(factor: int) -> bool:
        return factored and (layer.dimensions.factors.is_blocked(factor) or factor in whole)

    found: set[int] = set()
    for index in layer.parameters:
        for dim in layer.dimensions.classes(layer.inputs[index]):
            first = next((position for position, factor in enumerate(dim) if not is_skipped(factor)), len(dim))
            found.update(dim[first + 1 :])
    return found


def _needed_whole(layer: Layer) -> set[int]:
    return {f for op in layer.ops for _, dim in op.gathered for f in layer.dimensions.factors.resolve(dim)}


def _occurs_twice(layer: Layer, factor: int) -> bool:
    """Tell whether an operation holds ``factor`` twice in one array, or sums over it while its result has it again.

    The second is the recurrence of an RNN.
    """
    return any(
        any(layer.dimensions.flat_classes(v).count(factor) > 1 for v in [*op.inputs, *op.outputs])
        or (factor in layer.contracted(op) and any(factor in layer.classes(v) for v in op.outputs))
        for op in layer.ops
    )


def _held(layer: Layer, op: Op) -> set[int]:
    return {f for v in [*op.inputs, *op.outputs] for f in layer.dimensions.flat_classes(v)}


# ------------------------------------------------------------------------------------------------------------- figures
def _measure(layer: Layer, chosen: frozenset[int]) -> ClassSet:
    reduced = [collective.value for collective in tensor_collectives(layer, chosen)]
    stream = max((math.prod(v.shape) for v in layer.stream), default=0)
    return ClassSet(
        classes=chosen,
        flops_share=_share(layer, chosen),
        collective_bytes=sum(value.bytes for value in reduced),
        max_degree=math.gcd(*[layer.dimensions.factors.size(f) for f in chosen]),
        reduces_more_than_stream=any(math.prod(value.shape) > stream for value in reduced),
    )


def _joined(parts: Iterable[ClassSet]) -> ClassSet:
    parts = list(parts)
    return ClassSet(
        classes=frozenset().union(*[p.classes for p in parts]),
        flops_share=sum(p.flops_share for p in parts),
        collective_bytes=sum(p.collective_bytes for p in parts),
        max_degree=math.gcd(*[p.max_degree for p in parts]),
        reduces_more_than_stream=any(p.reduces_more_than_stream for p in parts),
    )


def _share(layer: Layer, chosen: frozenset[int]) -> float:
    """Share of the matmul FLOPs (of the parameter bytes, in a layer without products) that ``chosen`` divides."""
    dots = [op for op in layer.ops if op.flops]
    total = sum(op.flops * op.times for op in dots)
    if total:
        return sum(op.flops * op.times for op in dots if any(layer.classes(v) & chosen for v in op.inputs)) / total
    values = [layer.inputs[i] for i in layer.parameters]
    return sum(v.bytes for v in values if layer.classes(v) & chosen) / (sum(v.bytes for v in values) or 1)

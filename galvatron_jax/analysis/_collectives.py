"""Collectives that a sharding causes, predicted from the program alone.

Rules (``A``: the classes sharded over the tensor axes; both passes are explicit operations, so no duality is needed):

* an operation that sums over a class of ``A`` leaves partial results: all-reduce of its result;
* with sequence parallelism, a value that carries the whole stream (batch, seq, embed) and no class of ``A`` is sharded
  along ``seq``, and so is what sums and fused operations make of it: the all-reduce becomes a reduce-scatter, and a
  product (or scatter) of such a value with an operand or result sharded over ``A`` gathers it first: once in each pass
  for all its readers, since gathered copies are not kept in between, and on the narrow side of a cast (XLA:GPU's
  CollectiveQuantizer: gather, exchange and permute trade places with a cast beside them; a sum cannot);
* a sum over ``seq`` of such a value (the gradient of a norm's weight) is an all-reduce of its small result, and the
  gradient of a parameter that has ``seq`` (learned positions) is gathered;
* what stands in the body of a loop runs as often as the loop (the weight gradients of a recurrence, at each step);
* sharding ``batch``: every sum over it is an all-reduce; those that end in parameter gradients are left to the caller,
  who knows the ZeRO level.

Partial results that are only added up can be reduced after the sum: ``merged`` counts those (XLA:GPU does it,
AllReduceReassociate; XLA:CPU does not).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from ..profile import CollectiveKind, Phase
from ..strategy import Remat
from ._dimensions import Op, Value
from ._layer import Layer, phase_of
from ._per_sample import PerSample
from ._primitives import is_kernel_name

_LINEAR = frozenset("convert_element_type copy expand_dims neg reduce_sum reshape squeeze transpose".split())
"""A sum may move behind these."""

_VIEWS = frozenset("expand_dims reshape squeeze transpose".split())


@dataclasses.dataclass(frozen=True, slots=True)
class Predicted:
    """One collective per microbatch, ``times`` of them where it stands in a loop."""

    phase: Phase
    kind: CollectiveKind
    value: Value
    """The whole array of the group."""
    over: frozenset[int]
    """The sharded classes it sums over."""
    root: int
    """Collectives with the same root become one where sums are merged."""
    recomputed: frozenset[Remat]
    """Rematerialisations that run it again."""
    times: int = 1
    gradient: bool = False
    """It is part of the reduction of parameter gradients that ranks can make apart (``_per_sample``)."""


def tensor_collectives(layer: Layer, sharded: frozenset[int]) -> list[Predicted]:
    """Return the collectives of sharding the classes ``sharded`` with the stream replicated."""
    return [reduction(layer, op, sharded) for op in layer.ops if layer.contracted(op) & sharded and op.outputs]


def sequence_is_free(layer: Layer, sharded: frozenset[int], stream: frozenset[int], seq: int) -> bool:
    """Tell whether the stream can be sharded along ``seq`` wherever no class of ``sharded`` is.

    It can when nothing there needs ``seq`` whole, and every kernel that reads the stream is one over ``sharded``:
    attention whose heads are not sharded would have to gather.
    """
    factors, along = layer.dimensions.factors, _sharded_along(layer, sharded, stream, seq)
    if factors.is_blocked(seq):
        return False
    for op in layer.ops:
        outside = [v for v in op.inputs if id(v) in along]
        if outside and is_kernel_name(op.name) and not _holds(layer, op, sharded):
            return False
        if any(v is value and seq in factors.resolve(dim) for v in outside for value, dim in op.gathered):
            return False
    return True


def sequence_collectives(layer: Layer, sharded: frozenset[int], stream: frozenset[int], seq: int) -> list[Predicted]:
    """Return the collectives of sharding ``sharded`` with the stream sharded along ``seq`` between the products.

    Args:
        layer: The analysed layer.
        sharded: Classes over the tensor axes.
        stream: All classes of the stream.
        seq: The sequence class.
    """
    along = _sharded_along(layer, sharded, stream, seq)
    found = _gathers(layer, sharded, along)
    for op in layer.ops:
        if layer.contracted(op) & sharded:
            kind: CollectiveKind = "reduce-scatter" if stream <= layer.classes(op.outputs[0]) else "all-reduce"
            found.append(reduction(layer, op, sharded, kind))
        elif seq in layer.contracted(op) and any(id(v) in along for v in op.inputs) and not _holds(layer, op, sharded):
            found.append(reduction(layer, op, frozenset([seq])))
    return [*found, *_gradient_gathers(layer, along)]


def _sharded_along(layer: Layer, sharded: frozenset[int], stream: frozenset[int], seq: int) -> set[int]:
    """Return the ids of the values that sequence parallelism shards along ``seq``.

    Those that carry the whole stream and nothing of ``sharded``, and what is made of them element by element or by
    sums, while it has ``seq``.
    """
    edges = [*layer.dimensions.inputs, *(v for op in layer.ops for v in op.outputs)]
    found = {id(v) for v in edges if stream <= layer.classes(v) and not layer.classes(v) & sharded}
    for op in layer.ops:
        if not is_kernel_name(op.name) and any(id(v) in found for v in op.inputs):
            found.update(
                id(v)
                for v in op.outputs
                if layer.dimensions.flat_classes(v).count(seq) == 1 and not layer.classes(v) & sharded
            )
    return found


def _gathers(layer: Layer, sharded: frozenset[int], along: set[int]) -> list[Predicted]:
    """Gather sharded-along-``seq`` operands of products and scatters over ``sharded``, once in each pass.

    What the backward pass gathers again need not be gathered by a recomputed forward pass too.
    """
    found: dict[tuple[Phase, int], tuple[Op, Value]] = {}
    for op in layer.ops:
        if is_kernel_name(op.name) and _holds(layer, op, sharded):
            for value in op.inputs:
                if id(value) in along:
                    whole = narrow_source(layer, value)
                    found.setdefault((phase_of(op), id(whole)), (op, whole))
    return [
        Predicted(
            phase=phase,
            kind="all-gather",
            value=whole,
            over=frozenset(),
            root=hash((phase, key)),
            recomputed=frozenset() if ("backward", key) in found else layer.recomputed_by(op),
        )
        for (phase, key), (op, whole) in found.items()
    ]


def _gradient_gathers(layer: Layer, along: set[int]) -> Iterator[Predicted]:
    """Gather the gradients of parameters with positions: each rank has those of its part of the sequence."""
    for index in layer.parameters:
        gradient = layer.gradients.get(index)
        if gradient is not None and id(gradient) in along:
            yield Predicted("backward", "all-gather", gradient, frozenset(), id(gradient), frozenset())


def _holds(layer: Layer, op: Op, classes: frozenset[int]) -> bool:
    """Tell whether an operand or result of ``op`` carries one of ``classes``."""
    return any(layer.classes(v) & classes for v in [*op.inputs, *op.outputs])


def data_collectives(samples: PerSample, seq: int | None) -> list[Predicted]:
    """Return the collectives of sharding the batch, parameter gradients left out.

    Args:
        samples: The analysed layer, and its batch class.
        seq: The sequence class, which Ulysses shards too.
    """
    layer, batch = samples.layer, samples.batch
    classes = frozenset(f for f in (batch, seq) if f is not None)
    apart = {id(layer.gradients.get(layer.parameters[position])) for position in samples.parameters()}
    return [
        dataclasses.replace(found, gradient=set() < _results_of(layer, found.value) <= apart)
        for found in without_gradients(
            layer, [reduction(layer, op, classes) for op in layer.ops if batch in layer.contracted(op) and op.outputs]
        )
    ]


def _results_of(layer: Layer, value: Value) -> set[int]:
    """Return the ids of the layer's results (residuals and cotangents among them) that are made from ``value``."""
    results = {id(v) for v in layer.dimensions.outputs}
    reached, queue = {id(value)}, [value]
    while queue:
        for op in layer.readers.get(id(queue.pop()), ()):
            fresh = [v for v in op.outputs if id(v) not in reached]
            reached.update(id(v) for v in fresh)
            queue += fresh
    return reached & results


def without_gradients(layer: Layer, found: Iterable[Predicted]) -> list[Predicted]:
    """Leave out the reductions of parameter gradients."""
    gradients = {id(layer.gradients[i]) for i in layer.parameters if i in layer.gradients}
    return [collective for collective in found if collective.root not in gradients]


def gradient_sums(layer: Layer, batch: int | None) -> list[int]:
    """Return the id of the value that each partial result over ``batch`` ends in, with repetition."""
    return [root_of(layer, op.outputs[0]) for op in layer.ops if batch in layer.contracted(op) and op.outputs]


def reduction(layer: Layer, op: Op, classes: frozenset[int], kind: CollectiveKind = "all-reduce") -> Predicted:
    """Return the collective that completes the partial results of ``op`` over ``classes``."""
    return Predicted(
        phase=phase_of(op),
        kind=kind,
        value=op.outputs[0],
        over=layer.contracted(op) & classes,
        root=root_of(layer, op.outputs[0]),
        recomputed=layer.recomputed_by(op),
        times=op.times,
    )


def root_of(layer: Layer, value: Value) -> int:
    """Follow ``value`` through operations that a sum may move behind, to the value it ends in."""
    while True:
        readers: Sequence[Op] = layer.readers.get(id(value), ())
        if len(readers) != 1 or not (readers[0].name in _LINEAR or readers[0].name in ("add", "add_any")):
            return id(value)
        value = readers[0].outputs[0]


def narrow_source(layer: Layer, value: Value) -> Value:
    """Return the narrowest value that ``value`` is a view or a widening cast of: what a gather of it moves."""
    while True:
        value = behind_views(layer, value)
        op = layer.makers.get(id(value))
        if op is None or not _narrows(value, op):
            return value
        value = op.inputs[0]


def narrow_use(layer: Layer, value: Value) -> Value:
    """Return what the only reader of ``value``, behind views, narrows it to: what an exchange of it moves."""
    seen = value
    while (op := _only_reader(layer, seen)) is not None:
        seen = op.outputs[0]
        if _narrows(value, op):
            return seen
        if op.name not in _VIEWS:
            break
    return value


def _only_reader(layer: Layer, value: Value) -> Op | None:
    readers = layer.readers.get(id(value), ())
    return readers[0] if len(readers) == 1 else None


def _narrows(value: Value, cast: Op) -> bool:
    """Tell whether ``cast`` is one between a value as large as ``value`` and a narrower one."""
    return cast.name == "convert_element_type" and any(v.bytes < value.bytes for v in (*cast.inputs, *cast.outputs))


def behind_views(layer: Layer, value: Value) -> Value:
    """Return the value that ``value`` is another view of."""
    while True:
        op = layer.makers.get(id(value))
        if op is None or op.name not in _VIEWS:
            return value
        value = op.inputs[0]

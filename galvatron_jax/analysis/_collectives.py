"""Collectives that a sharding causes, predicted from the program alone.

Rules (``A``: the classes sharded over the tensor axes; both passes are explicit operations, so no duality is needed):

* an operation that sums over a class of ``A`` leaves partial results: all-reduce of its result;
* with sequence parallelism, a value that carries the whole stream (batch, seq, embed) and no class of ``A`` is sharded
  along ``seq``: the all-reduce becomes a reduce-scatter, and a product (or scatter) of such a value with an operand or
  result sharded over ``A`` gathers it first: once in each pass for all its readers, since gathered copies are not kept
  in between;
* a sum over ``seq`` of such a value (the gradient of a norm's weight) is an all-reduce of its small result;
* sharding ``batch``: every sum over it is an all-reduce; those that end in parameter gradients are left to the caller,
  who knows the ZeRO level.

Partial results that are only added up can be reduced after the sum: ``merged`` counts those (XLA:GPU does it,
AllReduceReassociate; XLA:CPU does not).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..profile import CollectiveKind, Phase
from ._dimensions import Op, Value
from ._layer import Layer, phase_of
from ._primitives import is_kernel_name

_LINEAR = frozenset("convert_element_type copy expand_dims neg reduce_sum reshape squeeze transpose".split())
"""A sum may move behind these."""


@dataclasses.dataclass(frozen=True, slots=True)
class Predicted:
    """One collective per microbatch."""

    phase: Phase
    kind: CollectiveKind
    value: Value
    """The whole array of the group."""
    root: int
    """Collectives with the same root become one where sums are merged."""
    recomputed: bool
    """Full rematerialisation runs it again."""


def tensor_collectives(layer: Layer, sharded: frozenset[int]) -> list[Predicted]:
    """Return the collectives of sharding the classes ``sharded`` with the stream replicated."""
    again = recomputed_ops(layer)
    return [
        _predict(layer, op, "all-reduce", op.outputs[0], again)
        for op in layer.ops
        if layer.contracted(op) & sharded and op.outputs
    ]


def sequence_collectives(layer: Layer, sharded: frozenset[int], stream: frozenset[int], seq: int) -> list[Predicted]:
    """Return the collectives of sharding ``sharded`` with the stream sharded along ``seq`` between the products.

    Args:
        layer: The analysed layer.
        sharded: Classes over the tensor axes.
        stream: All classes of the stream.
        seq: The sequence class.
    """
    again, found = recomputed_ops(layer), _gathers(layer, sharded, stream)
    for op in layer.ops:
        out = op.outputs[0]
        if layer.contracted(op) & sharded:
            kind: CollectiveKind = "reduce-scatter" if stream <= layer.classes(out) else "all-reduce"
            found.append(_predict(layer, op, kind, out, again))
        elif seq in layer.contracted(op) and not _holds(layer, op, sharded) and _stream_inputs(layer, op, stream):
            found.append(_predict(layer, op, "all-reduce", out, again))
    return found


def _gathers(layer: Layer, sharded: frozenset[int], stream: frozenset[int]) -> list[Predicted]:
    """Gather sharded-along-``seq`` operands of products and scatters over ``sharded``, once in each pass.

    What the backward pass gathers again need not be gathered by a recomputed forward pass too.
    """
    found: dict[tuple[Phase, int], tuple[Op, Value]] = {}
    for op in layer.ops:
        if is_kernel_name(op.name) and _holds(layer, op, sharded):
            for value in _stream_inputs(layer, op, stream):
                if not layer.classes(value) & sharded:
                    whole = _behind_views(layer, value)
                    found.setdefault((phase_of(op), id(whole)), (op, whole))
    again = {id(op) for (_, key), (op, _) in found.items() if ("backward", key) not in found} & recomputed_ops(layer)
    return [
        _predict(layer, op, "all-gather", whole, again, root=hash((phase, key)))
        for (phase, key), (op, whole) in found.items()
    ]


def _holds(layer: Layer, op: Op, classes: frozenset[int]) -> bool:
    """Tell whether an operand or result of ``op`` carries one of ``classes``."""
    return any(layer.classes(v) & classes for v in [*op.inputs, *op.outputs])


def _stream_inputs(layer: Layer, op: Op, stream: frozenset[int]) -> list[Value]:
    """Return the operands of ``op`` that carry the whole stream."""
    return [value for value in op.inputs if stream <= layer.classes(value)]


def data_collectives(layer: Layer, batch: int) -> list[Predicted]:
    """Return the collectives of sharding ``batch``, parameter gradients left out."""
    again = recomputed_ops(layer)
    gradients = {id(layer.gradients[i]) for i in layer.parameters if i in layer.gradients}
    found = [
        _predict(layer, op, "all-reduce", op.outputs[0], again)
        for op in layer.ops
        if batch in layer.contracted(op) and op.outputs
    ]
    return [collective for collective in found if collective.root not in gradients]


def _predict(
    layer: Layer, op: Op, kind: CollectiveKind, value: Value, again: set[int], *, root: int | None = None
) -> Predicted:
    return Predicted(
        phase=phase_of(op),
        kind=kind,
        value=value,
        root=_root(layer, value) if root is None else root,
        recomputed=id(op) in again,
    )


def _root(layer: Layer, value: Value) -> int:
    """Follow ``value`` through operations that a sum may move behind, to the value it ends in."""
    while True:
        readers: Sequence[Op] = layer.readers.get(id(value), ())
        if len(readers) != 1 or not (readers[0].name in _LINEAR or readers[0].name in ("add", "add_any")):
            return id(value)
        value = readers[0].outputs[0]


def _behind_views(layer: Layer, value: Value) -> Value:
    """Return the value that ``value`` is a cast or another view of."""
    while True:
        op = layer.makers.get(id(value))
        if op is None or op.name not in ("reshape", "transpose", "squeeze", "expand_dims"):
            return value
        value = op.inputs[0]


def recomputed_ops(layer: Layer) -> set[int]:
    """Forward operations that residuals depend on: full rematerialisation runs just these again."""
    needed = {id(v) for v in layer.residuals}
    again = set()
    for op in reversed(layer.ops):
        if phase_of(op) == "forward" and any(id(v) in needed for v in op.outputs):
            again.add(id(op))
            needed.update(id(v) for v in op.inputs)
    return again

"""Names for classes: ``batch``, ``seq``, ``embed``, ``heads``, ``head_dim``, ``mlp``, ``vocab``, ...

Names come from roles in the data flow, never from sizes. They are for people and documents; nothing that decides
anything depends on them, except ``batch`` and ``seq``, which are handed down from the batch the user gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..profile import BATCH, SEQ
from ._dimensions import Op, Value
from ._layer import Layer, phase_of

Names = dict[int, str]
"""Name of each class (by resolved factor)."""

Given = Mapping[int, Sequence[Sequence[str | None]]]
"""Names already known, by input index: one list of factor names per dimension (None: unknown)."""


def samples(given: Given) -> list[int]:
    """Return the inputs whose dimension 0 holds the samples of the batch."""
    return [i for i, dims in given.items() if dims and list(dims[0]) == [BATCH]]


def name_classes(layer: Layer, given: Given) -> Names:
    """Return a name for every shardable class of ``layer``.

    Args:
        layer: The analysed layer.
        given: Names of the factors of some inputs (from the batch, or from the layer before).
    """
    factors = layer.dimensions.factors
    names: Names = {}
    holding = samples(given)  # first: samples that a value made of parameters meets (learned queries) are the batch
    for index in sorted(given, key=lambda i: (i not in holding, i not in layer.differentiated)):
        for dim, known in zip(layer.dimensions.classes(layer.inputs[index]), given[index], strict=True):
            if len(dim) == len(known):
                fresh = [(f, n) for f, n in zip(dim, known, strict=True) if n and n not in names.values()]
                names.update((f, n) for f, n in fresh if f not in names)
    _name_stream(layer, names)
    in_parameters = {f for i in layer.parameters for f in layer.dimensions.flat_classes(layer.inputs[i])}
    for op in layer.ops:
        for value in [*op.inputs, *op.outputs]:
            for f in layer.dimensions.flat_classes(value):
                if f not in names and not factors.is_blocked(f):
                    names[f] = _fresh_name(_role(layer, f, f in in_parameters), names)
    return names


def _name_stream(layer: Layer, names: Names) -> None:
    """Name the unknown dimensions of rank-3 values that carry the batch: 1 is ``seq``, the last one ``embed``."""
    carriers = layer.stream[::-1]
    for value in carriers:
        dims = layer.dimensions.classes(value)
        if len(dims) < 3 or not dims[0] or names.get(dims[0][0]) != BATCH:
            continue
        for position, name in ((1, SEQ), (-1, "embed")):
            if len(dims[position]) == 1 and dims[position][0] not in names:
                _claim(names, dims[position][0], name)


def _claim(names: Names, factor: int, name: str) -> None:
    """Give the stream's class its name; what held it before (S + 1 tokens, of which S are read) gets another."""
    for other in [f for f, taken in names.items() if taken == name]:
        del names[other]
        names[other] = _fresh_name("positions", names)
    names[factor] = name


def _role(layer: Layer, factor: int, in_parameters: bool) -> str:
    dots = [op for op in _products(layer) if factor in _classes(layer, op)]
    if any(op.name == "gather" and factor in _resolved(layer, op.contracted) for op in layer.ops):
        return "vocab"
    if not in_parameters:
        return "positions"
    if any(factor in _experts(layer, op) for op in dots):
        return "expert"
    mixing = [op for op in _mixing(layer) if op in dots]
    if mixing:
        if all(factor in layer.dimensions.flat_classes(v) for op in mixing for v in [*op.inputs, *op.outputs]):
            return "heads"
        return "head_dim" if len(mixing) < len(_beside(layer, mixing)) else "group"
    if any(factor in _resolved(layer, op.contracted) for op in dots):
        return "mlp"
    return "vocab" if any(_sums(layer, op, factor) for op in _forward(layer)) else "features"


def _forward(layer: Layer) -> list[Op]:
    return [op for op in layer.ops if phase_of(op) == "forward"]


def _products(layer: Layer) -> list[Op]:
    return [op for op in _forward(layer) if op.name in ("dot_general", "ragged_dot_general")]


def _mixing(layer: Layer) -> list[Op]:
    """Products of attention: of two activations, neither dispatching tokens to experts nor combining them."""
    products = _products(layer)
    experts = {f for op in products for f in _experts(layer, op)}
    plain = [op for op in products if not any(_is_weight(layer, v) for v in op.inputs)]
    return [op for op in plain if not experts & _classes(layer, op)]


def _experts(layer: Layer, op: Op) -> set[int]:
    """Classes over which a product with a weight is batched: every index has a matrix of its own."""
    if not any(_is_weight(layer, v) for v in op.inputs[:2]):
        return set()
    left, right, *_ = (layer.classes(v) for v in op.inputs)
    whole = {f for _, dim in op.gathered for f in _resolved(layer, dim)} if op.name == "ragged_dot_general" else set()
    return set(left & right & layer.classes(op.outputs[0])) | {f for f in right & whole if f not in left}


def _beside(layer: Layer, mixing: Sequence[Op]) -> list[Op]:
    """Return the products of the same attention as those of ``mixing``: they share what parameters have."""
    own = {f for i in layer.parameters for f in layer.classes(layer.inputs[i])}
    held = {f for op in mixing for f in _classes(layer, op)} & own
    return [op for op in _mixing(layer) if held & _classes(layer, op)]


def _sums(layer: Layer, op: Op, factor: int) -> bool:
    return op.name == "reduce_sum" and factor in _resolved(layer, op.contracted)


def _resolved(layer: Layer, dim: Sequence[int]) -> list[int]:
    return layer.dimensions.factors.resolve(dim)


def _classes(layer: Layer, op: Op) -> set[int]:
    return {f for v in op.inputs for f in layer.dimensions.flat_classes(v)}


def _is_weight(layer: Layer, value: Value) -> bool:
    """Tell whether ``value`` is a parameter, possibly cast, reshaped or transposed."""
    own = {id(layer.inputs[i]) for i in layer.parameters}
    while id(value) not in own:
        op = layer.makers.get(id(value))
        if op is None or op.name not in ("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "copy"):
            return False
        value = op.inputs[0]
    return True


def _fresh_name(role: str, names: Names) -> str:
    taken, number = set(names.values()), 2
    name = role
    while name in taken:
        name, number = f"{role}{number}", number + 1
    return name

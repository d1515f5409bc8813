"""Where a loss mixes samples, so that the mean over microbatches is not the loss of the batch.

The runtime takes the mean of what the microbatches lose. That is the batch's own loss where the loss is linear in sums
over samples (a mean of each sample's loss), and something else where it is not: a mean over the tokens that count,
``(loss * mask).sum() / mask.sum()``; the product of two means (a router's balance); statistics of the batch
(BatchNorm); pairs of samples (contrastive losses). Training by any of these is usual, but the user should know. Not
reported is a plain sum over samples, which is linear: m microbatches give one m-th of it.

A value is *pooled* when it holds a sum over samples. Reported are the first operations that are not linear in pooled
values, that take the largest or smallest over samples, or that multiply samples with samples. Integers are followed but
not judged: counts and offsets of sorted tokens say where samples lie, and change none. Bodies of loops are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..profile import BATCH
from ._cut import Segment
from ._dimensions import Op, Value
from ._flatten import Variable
from ._kind import AnalysedKind
from ._layer import Layer, phase_of

EXTREMES = frozenset({"reduce_max", "reduce_min", "reduce_prod"})
LINEAR = frozenset(
    {"add", "sub", "neg", "add_any", "convert_element_type", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"}
    | {"transpose", "copy", "reduce_sum", "concatenate", "slice", "reduce_precision", "stop_gradient"}
)
"""Of every operand."""
BILINEAR = frozenset({"mul", "dot_general"})
"""Linear in one operand where the other one is the same for every batch."""


def mixed_samples(segments: Sequence[Segment], kinds: Mapping[str, AnalysedKind]) -> list[str]:
    """Return what mixes samples, as ``"div in head"``; empty where the loss is a mean over samples.

    Args:
        segments: All segments of the cut program, in order.
        kinds: Their kinds, analysed.
    """
    pooled: set[Variable] = set()
    seen: dict[tuple[str, tuple[bool, ...]], tuple[tuple[str, ...], tuple[bool, ...]]] = {}
    found: dict[str, None] = {}
    for segment in segments:
        key = segment.kind, tuple(variable in pooled for variable in segment.inputs)
        if key not in seen:
            seen[key] = _read(kinds[segment.kind], key[1])
        mixing, results = seen[key]
        found.update(dict.fromkeys(f"{name} in {segment.kind}" for name in mixing))
        pooled.update(v for v, is_pooled in zip(segment.outputs, results, strict=True) if is_pooled)
    return list(found)


def _read(kind: AnalysedKind, inputs: tuple[bool, ...]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Return the operations of one segment that mix, and which of its results are pooled."""
    layer, batch = kind.layer, frozenset(f for f, name in kind.names.items() if name == BATCH)
    pooled = {id(value) for value, is_pooled in zip(layer.inputs, inputs, strict=True) if is_pooled}
    varying = {id(v) for i, v in enumerate(layer.inputs) if layer.classes(v) & batch} | pooled
    mixing: list[str] = []
    for op in layer.ops:
        if phase_of(op) != "forward" or op.inner:
            continue
        if _mixes(layer, op, batch, pooled, varying):
            mixing.append(op.name)  # what follows from it is reported no more
        elif _pools(layer, op, batch) or any(id(v) in pooled for v in op.inputs):
            pooled.update(id(v) for v in op.outputs)
        if any(id(v) in varying for v in op.inputs):
            varying.update(id(v) for v in op.outputs)
    return tuple(mixing[:1]), tuple(id(value) in pooled for value in layer.outputs)


def _pools(layer: Layer, op: Op, batch: frozenset[int]) -> bool:
    """Tell whether ``op`` sums over samples (a scatter that brings sorted tokens back does not: each has its place)."""
    return op.name in ("reduce_sum", "dot_general") and bool(layer.contracted(op) & batch)


def _mixes(layer: Layer, op: Op, batch: frozenset[int], pooled: set[int], varying: set[int]) -> bool:
    if not any("float" in value.dtype for value in op.outputs):
        return False
    whole = {f for _, dim in op.gathered for f in layer.dimensions.factors.resolve(dim)}
    if op.name in EXTREMES and layer.contracted(op) & batch or op.name == "dot_general" and whole & batch:
        return True
    held = [value for value in op.inputs if id(value) in pooled]
    return bool(held) and not _is_linear(op, held, varying)


def _is_linear(op: Op, held: Sequence[Value], varying: set[int]) -> bool:
    """Tell whether ``op`` is linear in its pooled operands ``held``."""
    if op.name in LINEAR:
        return True
    others = [value for value in op.inputs if not any(value is one for one in held)]
    if op.name in BILINEAR:
        return len(held) == 1 and not any(id(value) in varying for value in others)
    return op.name == "div" and held == [op.inputs[0]] and id(op.inputs[1]) not in varying

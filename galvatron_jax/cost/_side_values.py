"""Side values: what layers far apart share besides the stream (an encoder's output, a table made from parameters).

A value that some layer makes and a later stage takes travels from stage to stage with the stream, and its cotangent
travels back. A profile does not say which layer made an input, so it is found by its shape: the last layer before the
first that takes it with an output of that dtype and those classes, an output other than the stream first. What has a
gradient but no such layer is taken to come from the first layer. What has no gradient and no such layer comes from the
batch, and what depends on the batch alone (``Boundary.recomputed``) every stage makes again: both cross nothing.

Limit: inside a stage a side value's change of layout is not priced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from ..profile import Array, Boundary, LayerKind, ModelProfile


class SideValue(NamedTuple):
    """``copies`` equal values that cross all positions after ``first`` up to ``last``."""

    array: Array
    sizes: Mapping[str, int]
    """Size of each class."""
    copies: int
    first: int
    """The layer that makes it."""
    last: int
    """The last layer that takes it."""


def side_values(model: ModelProfile) -> tuple[SideValue, ...]:
    """Return what would cross stage boundaries besides the stream: one before layer ``j`` if ``first < j <= last``."""
    kinds = [model.kind(run.kind) for run in model.layers for _ in range(run.count)]
    takes = {kind.name: Counter(boundary.array for boundary in _taken(kind)) for kind in model.kinds}
    gradients = {boundary.array for kind in model.kinds for boundary in _taken(kind) if boundary.gradient}
    found = []
    for array in dict.fromkeys(array for kind in kinds for array in takes[kind.name]):
        takers = [i for i, kind in enumerate(kinds) if array in takes[kind.name]]
        maker = _maker(kinds[: takers[0]], array)
        if maker is not None or array in gradients:
            copies = max(takes[kinds[i].name][array] for i in takers)
            found.append(SideValue(array, kinds[takers[0]].classes, copies, maker or 0, takers[-1]))
    return tuple(found)


def _taken(kind: LayerKind) -> list[Boundary]:
    return [boundary for boundary in kind.inputs if not boundary.stream and not boundary.recomputed]


def _maker(kinds: list[LayerKind], array: Array) -> int | None:
    """The last of the layers with such an output."""
    for streams in (False, True):
        for i in range(len(kinds) - 1, -1, -1):
            if any(output.array == array and output.stream == streams for output in kinds[i].outputs):
                return i
    return None

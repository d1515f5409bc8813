"""The wire: in which layout a value crosses from one stage to the next.

Each device hands an equal part to its partner of the next stage: the batch over as many leading mesh axes as divide it,
the sequence over the rest where they divide that. Stages of equal size have equal wire layouts whatever their layers'
strategies, so a link moves bytes and never changes a layout; the stages' own programs do.
"""

from __future__ import annotations

import math

from jax.sharding import PartitionSpec

from ..analysis import AnalysedKind, Value
from ..profile import BATCH, SEQ
from ._mesh import Axes, StageMesh


def wire_spec(mesh: StageMesh, kind: AnalysedKind, value: Value) -> PartitionSpec:
    """Return the layout of ``value``, an output of ``kind``, on the wire; what cannot be divided crosses whole."""
    dims = kind.layer.dimensions.classes(value)
    names = [kind.names.get(dim[0]) if dim else None for dim in dims]
    entries: list[Axes | None] = [None] * len(names)
    rest = tuple(mesh.mesh.axis_names)
    for wanted in (BATCH, SEQ):
        if wanted in names:
            dim = names.index(wanted)
            taken = _dividing(mesh, rest, value.shape[dim])
            entries[dim], rest = taken or None, rest[len(taken) :]
    return PartitionSpec(*entries)


def _dividing(mesh: StageMesh, axes: Axes, size: int) -> Axes:
    """Return the most leading ``axes`` whose sizes divide ``size`` together."""
    for count in range(len(axes), 0, -1):
        if size % math.prod(mesh.mesh.shape[name] for name in axes[:count]) == 0:
            return axes[:count]
    return ()

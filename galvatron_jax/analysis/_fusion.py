"""Which values a compiler with loop fusion writes to memory, and what its memory-bound kernels move.

Matrix products, convolutions, gathers, scatters, sorts and loops are kernels of their own: their operands and results
are *materialised*. Everything between them fuses: a fused kernel reads each materialised value it needs once and writes
the materialised values it makes. Reshapes and transposes are views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..profile import Phase
from ..strategy import Remat
from ._dimensions import Op, Value
from ._layer import Layer, phase_of
from ._primitives import VIEWS, is_kept, is_kernel_name


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """A materialised value that a fused kernel reads or writes once."""

    phase: Phase
    value: Value


class Fusion:
    """Materialised values and memory traffic of one layer."""

    def __init__(self, layer: Layer) -> None:
        """Analyse the live operations of ``layer``."""
        self.layer = layer
        self._source: dict[int, Value] = {}
        self.maker: dict[int, Op] = {}
        self.readers: dict[int, list[Op]] = {}
        for op in layer.ops:
            self._link(op)
        self._data = self._depending_on(v for i, v in enumerate(layer.dimensions.inputs) if i not in layer.parameters)
        self._given = self._depending_on(layer.dimensions.inputs)
        edges = [*layer.dimensions.inputs, *layer.dimensions.outputs]
        self._materialised = {id(self.source(v)) for v in edges}
        for op in layer.ops:
            if is_kernel(op):
                self._materialised.update(id(self.source(v)) for v in [*op.inputs, *op.outputs])

    def source(self, value: Value) -> Value:
        """Return the value that ``value`` is a view of (itself when it is none)."""
        return self._source.get(id(value), value)

    def is_materialised(self, value: Value) -> bool:
        """Tell whether ``value`` is written to memory (a constant is made again wherever it is read)."""
        return id(self.source(value)) in self._materialised and id(value) in self._given

    def depends_on_data(self, value: Value) -> bool:
        """Tell whether ``value`` depends on more than parameters and constants."""
        return id(value) in self._data

    def moves(self) -> list[Move]:
        """Return what all fused kernels read and write."""
        clusters = self._clusters()
        found: dict[tuple[int, int, bool], Move] = {}
        for op in self.layer.ops:
            if is_kernel(op) or op.name in VIEWS:
                continue
            for values, writes in ((op.inputs, False), (op.outputs, True)):
                for value in map(self.source, values):
                    if value.shape and self.is_materialised(value) and not self._own(op, value, writes, clusters):
                        key = (clusters[id(op)], id(value), writes)
                        found.setdefault(key, Move(phase_of(op), value))
        return list(found.values())

    def sources_of(self, value: Value, remat: Remat = "none") -> list[Value]:
        """Return what ``remat`` keeps of that from which ``value`` can be made again."""
        found: dict[int, Value] = {}
        queue = [self.source(value)]
        while queue:
            current = queue.pop()
            op = self.maker.get(id(current))
            if op is None or is_kept(op.name, remat, batched=op.batched) or (remat == "none" and is_kernel(op)):
                found[id(current)] = current
            else:
                queue += [self.source(v) for v in op.inputs]
        return list(found.values())

    def _link(self, op: Op) -> None:
        for value in op.inputs:
            self.readers.setdefault(id(self.source(value)), []).append(op)
        if op.name in VIEWS:
            self._source.update((id(o), self.source(i)) for o, i in zip(op.outputs, op.inputs, strict=False))
        else:
            self.maker.update((id(v), op) for v in op.outputs)

    def _depending_on(self, values: Iterable[Value]) -> set[int]:
        found = {id(v) for v in values}
        for op in self.layer.ops:
            if any(id(v) in found for v in op.inputs):
                found.update(id(v) for v in op.outputs)
        return found

    def _own(self, op: Op, value: Value, writes: bool, clusters: dict[int, int]) -> bool:
        """A value made inside a fused kernel is not read back by it."""
        maker = self.maker.get(id(value))
        return not writes and maker is not None and clusters.get(id(maker)) == clusters[id(op)]

    def _clusters(self) -> dict[int, int]:
        """Number the fused kernel that each fusible operation belongs to."""
        parent = {id(op): id(op) for op in self.layer.ops if not is_kernel(op)}

        def find(key: int) -> int:
            while parent[key] != key:
                parent[key] = key = parent[parent[key]]
            return key

        for op in self.layer.ops:
            for value in map(self.source, op.inputs):
                maker = self.maker.get(id(value))
                if id(op) in parent and maker is not None and id(maker) in parent and phase_of(op) == phase_of(maker):
                    parent[find(id(op))] = find(id(maker))
        return {key: find(key) for key in parent}


def is_kernel(op: Op) -> bool:
    """Tell whether ``op`` is a kernel of its own."""
    return is_kernel_name(op.name) or op.inner


def unique(values: Iterable[Value]) -> list[Value]:
    """Return ``values`` without repetition, in order."""
    return list({id(v): v for v in values}.values())

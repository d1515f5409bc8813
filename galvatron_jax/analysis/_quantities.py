"""Quantities of a layer kind as monomials over named classes: products, traffic, residuals, workspace, boundaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import msgspec

from ..profile import Array, Boundary, Collective, Dot, Live, Lookup, Moment, Parameter, Phase, Traffic
from ..strategy import Remat
from ._candidates import class_sets
from ._collectives import Predicted, gradient_sums, narrow_source, root_of
from ._dimensions import Op, Value
from ._fusion import Fusion, unique
from ._layer import Layer, phase_of
from ._marks import ATTENTION
from ._moments import Backward
from ._moments import Moment as Alive
from ._names import Names
from ._per_sample import PerSample

_LARGE_DEGREE = 8
"""Of tensor parallelism, where moments are compared."""


class Quantities:
    """Turns values of one layer into named arrays."""

    def __init__(self, layer: Layer, names: Names) -> None:
        """Hold the layer, the names of its classes and its fusion analysis."""
        self.layer, self.names, self.fusion = layer, names, Fusion(layer)

    def array(self, value: Value, count: int = 1) -> Array:
        """Return the size of ``value`` as a monomial."""
        classes, factor = self._monomial(self.layer.dimensions.flat_classes(value))
        return Array(
            dtype=value.dtype, classes=classes, factor=factor, count=count, attention=self._inside_attention(value)
        )

    def arrays(self, values: Iterable[Value]) -> tuple[Array, ...]:
        """Return the sizes of ``values``, equal ones counted."""
        counts = Counter(self.array(value) for value in values)
        return tuple(_with_count(array, n) for array, n in counts.items())

    def parameters(self, paths: Sequence[str], samples: PerSample) -> tuple[Parameter, ...]:
        """Return the parameters with the factors of each dimension, in input order."""
        sums, apart = Counter(gradient_sums(self.layer, samples.batch)), samples.parameters()
        return tuple(
            Parameter(
                path=path,
                dtype=self.layer.inputs[index].dtype,
                compute_dtype=self._compute_dtype(self.layer.inputs[index]),
                dims=self._dims(self.layer.inputs[index]),
                reread=tuple(r for r in get_args(Remat) if self.layer.reads_again(self.layer.inputs[index], r)),
                sums=sums[id(self.layer.gradients.get(index))],
                per_sample=position in apart,
                lookups=self._lookups(index, samples.batch),
            )
            for position, (path, index) in enumerate(zip(paths, self.layer.parameters, strict=True))
        )

    def dots(self) -> tuple[Dot, ...]:
        """Return all matrix products of both passes, equal ones counted."""
        counts: Counter[Dot] = Counter()
        for op in self.layer.ops:
            if op.flops:
                counts[self._dot(op)] += op.times
        return tuple(msgspec.structs.replace(dot, count=n) for dot, n in counts.items())

    def traffic(self) -> tuple[Traffic, ...]:
        """Return what memory-bound kernels read and write, equal arrays counted."""
        counts: Counter[tuple[Phase, Array]] = Counter(
            (move.phase, self.array(move.value)) for move in self.fusion.moves()
        )
        return tuple(Traffic(phase=phase, array=_with_count(array, n)) for (phase, array), n in counts.items())

    def residuals(self, remat: Remat) -> tuple[Array, ...]:
        """Return what the forward pass keeps for the backward pass.

        Under ``none``: results of kernels and of reductions; values that fused kernels made from them are made again by
        the fused kernels of the backward pass. ``is_kept`` is the rule, for the runtime's policy too.
        Left out are values made from parameters alone (casts, gathered copies) and constants (masks, rotary tables).
        """
        return self.arrays(self._kept(remat))

    def workspace(self) -> tuple[Array, ...]:
        """Return the temporaries alive at the worst moment of the backward pass.

        Residuals, inputs and gradients are left out (counted elsewhere). Attention scores are taken at their own worst
        moment, so that a fused kernel, which has none, leaves the rest right.
        """
        moments = self._alive_in_backward()
        plain = max(moments, key=lambda m: _bytes(m, self._inside_attention, False), default=[])
        scores = max(moments, key=lambda m: _bytes(m, self._inside_attention, True), default=[])
        return self.arrays(
            [v for v in plain if not self._inside_attention(v)] + [v for v in scores if self._inside_attention(v)]
        )

    def live(self) -> dict[Remat, Live]:
        """Return what is alive in the backward pass under each remat policy (see ``_moments``)."""
        return {remat: self._live(remat) for remat in get_args(Remat)}

    def _live(self, remat: Remat) -> Live:
        backward = Backward(self.layer, self.fusion, self._kept(remat) if remat != "full" else (), remat)
        return Live(
            moments=tuple(dict.fromkeys(map(self._moment, self._fullest(backward.moments())))),
            prefetched=self._prefetched(),
            waiting=self.arrays(backward.waiting()),
        )

    def _moment(self, moment: Alive) -> Moment:
        weights = Counter(self._used(position) for position in moment.parameters)
        return Moment(
            arrays=tuple(array for array in self.arrays(moment.values) if array.classes),
            weights=tuple(_with_count(array, n) for array, n in weights.items()),
        )

    def _fullest(self, moments: Sequence[Alive]) -> list[Alive]:
        """Return the fullest moments: with scores or without (fused kernels have none), whole or tensor-parallel."""
        tensor = {f for found in class_sets(self.layer)[:1] for f in found.classes}

        def share(value: Value) -> float:
            return 1 / _LARGE_DEGREE if tensor.intersection(self.layer.dimensions.flat_classes(value)) else 1.0

        def size(moment: Alive, divided: bool, scores: bool) -> float:
            counted = [v for v in moment.values if scores or not self._inside_attention(v)]
            return sum(v.bytes * (share(v) if divided else 1.0) for v in counted)

        return [
            max(moments, key=lambda m: size(m, divided, scores))
            for divided in (False, True)
            for scores in (True, False)
            if moments
        ]

    def _used(self, position: int) -> Array:
        value = self.layer.inputs[self.layer.parameters[position]]
        return msgspec.structs.replace(self.array(value), dtype=self._compute_dtype(value))

    def _prefetched(self) -> tuple[Array, ...]:
        """The largest weight, twice: one gather arrives while the result of the one before waits for its product."""
        if not self.layer.parameters:
            return ()
        position = max(
            range(len(self.layer.parameters)), key=lambda p: self.layer.inputs[self.layer.parameters[p]].bytes
        )
        return (_with_count(self._used(position), 2),)

    def boundaries(self) -> tuple[tuple[Boundary, ...], tuple[Boundary, ...]]:
        """Return the values that enter and leave the layer, parameters left out."""
        layer = self.layer
        inputs = tuple(
            Boundary(array=self.array(value), gradient=i in layer.gradients, stream=i in layer.gradients)
            for i, value in enumerate(layer.inputs)
            if i not in layer.parameters
        )
        outputs = tuple(
            Boundary(array=self.array(value), gradient=_is_float(value), stream=_is_float(value))
            for value in layer.outputs
        )
        return inputs, outputs

    def collectives(self, predicted: Iterable[Predicted]) -> tuple[Collective, ...]:
        """Return predicted collectives with equal ones counted, before and after sums are merged."""
        counts: Counter[Collective] = Counter()
        merged: Counter[Collective] = Counter()
        roots: set[int] = set()
        for item in predicted:
            key = self._collective(item)
            counts[key] += item.times
            merged[key] += item.times * (item.root not in roots)
            roots.add(item.root)
        return tuple(
            msgspec.structs.replace(key, array=_with_count(key.array, n), merged_count=merged[key])
            for key, n in counts.items()
        )

    # ------------------------------------------------------------------------------------------------------ helpers
    def _collective(self, item: Predicted) -> Collective:
        return Collective(
            phase=item.phase,
            kind=item.kind,
            array=self.array(item.value),
            merged_count=0,
            over=tuple(sorted(self.names[f] for f in item.over)),
            recomputed="full" in item.recomputed,
            recomputed_dots="dots" in item.recomputed,
            gradient=item.gradient,
        )

    def _kept(self, remat: Remat) -> list[Value]:
        own = {id(v) for v in self.layer.dimensions.inputs}
        needed = [v for v in self.layer.residuals if self.fusion.depends_on_data(v)]
        sources = unique(source for value in needed for source in self.fusion.sources_of(value, remat))
        return [v for v in sources if id(v) not in own and self.fusion.depends_on_data(v) and v.shape]

    def _monomial(self, factors: Iterable[int]) -> tuple[tuple[str, ...], int]:
        classes, constant = [], 1
        for f in factors:
            if f in self.names:
                classes.append(self.names[f])
            else:
                constant *= self.layer.dimensions.factors.size(f)
        return tuple(sorted(classes)), constant

    def _dims(self, value: Value) -> tuple[tuple[str | int, ...], ...]:
        size = self.layer.dimensions.factors.size
        return tuple(tuple(self.names.get(f, size(f)) for f in dim) for dim in self.layer.dimensions.classes(value))

    def _dot(self, op: Op) -> Dot:
        left, right = (self.layer.dimensions.flat_classes(v) for v in op.inputs[:2])
        shared = Counter(left) & Counter(right)
        both = list((Counter(left) + Counter(right) - self._batch_or_sum(op, shared)).elements())
        classes, factor = self._monomial(both)
        exact = op.flops // 2
        whole = factor
        sizes = {self.names[f]: self.layer.dimensions.factors.size(f) for f in both if f in self.names}
        for name in classes:
            whole *= sizes[name]
        # A convolution or an unusual product may not be a product of its classes: the constant makes up for it.
        factor = factor * exact // whole if whole and exact % whole == 0 else factor
        return Dot(
            phase=phase_of(op),
            dtype=op.inputs[0].dtype,
            classes=classes,
            factor=factor,
            attention=_marked(op),
            recomputed=phase_of(op) == "backward" or "full" in self.layer.recomputed_by(op),
            batched=op.batched,
        )

    def _batch_or_sum(self, op: Op, shared: Counter[int]) -> Counter[int]:
        """Classes that both operands of a product index together, once each."""
        if op.name != "dot_general":
            return shared
        out = Counter(self.layer.dimensions.flat_classes(op.outputs[0]))
        summed = Counter(self.layer.dimensions.factors.resolve(op.contracted))
        left, right = (Counter(self.layer.dimensions.flat_classes(v)) for v in op.inputs[:2])
        return left + right - out - summed

    def _lookups(self, index: int, batch: int | None) -> tuple[Lookup, ...]:
        """Return the lookups in a parameter's table whose gradients are sums over the batch."""
        layer, gradient = self.layer, id(self.layer.gradients.get(index))
        return tuple(
            Lookup(rows=self.array(narrow_source(layer, op.inputs[2])), indices=self.array(op.inputs[1]))
            for op in layer.ops
            if op.name == "scatter-add" and batch in layer.contracted(op) and root_of(layer, op.outputs[0]) == gradient
        )

    def _compute_dtype(self, value: Value) -> str:
        readers = [op for op in self.layer.readers.get(id(value), ()) if phase_of(op) == "forward"]
        casts = {op.outputs[0].dtype for op in readers if op.name == "convert_element_type"}
        only_casts = readers and all(op.name == "convert_element_type" for op in readers)
        return casts.pop() if only_casts and len(casts) == 1 else value.dtype

    def _inside_attention(self, value: Value) -> bool:
        """Made and read only inside attention calls, and larger than what leaves them: scores and their like."""
        value = self.fusion.source(value)
        maker = self.fusion.maker.get(id(value))
        if maker is None or not _marked(maker):
            return False
        classes = self.layer.dimensions.flat_classes(value)
        quadratic = len(classes) > len(set(classes)) or "positions" in {self.names.get(f, "")[:9] for f in classes}
        return quadratic and all(_marked(op) for op in self.fusion.readers.get(id(value), ()))

    def _alive_in_backward(self) -> list[list[Value]]:
        """Materialised temporaries alive during each backward operation.

        A forward value that was not kept is made again when it is first read.
        """
        fusion, layer = self.fusion, self.layer
        steps = [op for op in layer.ops if phase_of(op) == "backward"]
        elsewhere = {id(fusion.source(v)) for v in [*layer.dimensions.inputs, *self._kept("none")]}
        elsewhere.update(id(fusion.source(layer.gradients[i])) for i in layer.parameters if i in layer.gradients)
        last = {id(fusion.source(v)): n for n, op in enumerate(steps) for v in op.inputs}
        alive: dict[int, Value] = {}
        moments = []
        for n, op in enumerate(steps):
            for value in map(fusion.source, [*op.inputs, *op.outputs]):
                if value.shape and id(value) not in elsewhere and fusion.is_materialised(value):
                    alive[id(value)] = value
            moments.append(list(alive.values()))
            alive = {key: value for key, value in alive.items() if last.get(key, n) > n}
        return moments


def _with_count(array: Array, count: int) -> Array:
    return msgspec.structs.replace(array, count=count)


def _marked(op: Op) -> bool:
    return ATTENTION in op.scope


def _is_float(value: Value) -> bool:
    return "float" in value.dtype and len(value.shape) > 0


def _bytes(values: Iterable[Value], inside: Callable[[Value], bool], wanted: bool) -> int:
    return sum(v.bytes for v in values if inside(v) is wanted)

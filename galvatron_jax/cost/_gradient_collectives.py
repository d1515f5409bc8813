"""How the gradients of one layer's parameters are reduced over the ranks that hold the same weights.

With R ranks in r replicas (hsdp; 1 otherwise), so that z = R / r ranks share weights out among them:

    zero 0                                  all-reduce over R
    zero 1 to 3, z divides the parameter    reduce-scatter over z, then all-reduce of the shards over r
    zero 1 to 3, it does not                all-reduce over z, then over r
    replicas, and use that mixes samples    all-reduce of the whole gradient over R: no replica can make its own part
                                            (``Parameter.per_sample``), so the partitioner sums over all ranks at once

as often as the gradient adds up partial results (``Parameter.sums``), or once where the compiler adds first; over r
once. A gradient made from what is reduced already (positions: the sum over the batch comes before the table) is not
reduced again, but for the replicas: that sum was taken inside a group (``Collective.gradient``).

Replicas without tensor ranks (nor Ulysses) leave the layout of a lookup's gradient to the partitioner until it is
scattered, and it makes what takes the smallest arrays (xla/service/spmd/gather_scatter_handler.cc orders its methods
so): the table reduced, or the rows of the samples moved to who holds the part of the table that they are of. Where
rows are moved:

    z divides the looked-up dimension    all-gather of rows and indices over z
    z divides another one                all-to-all of rows over z, all-gather of indices

What another layer keeps elsewhere (``_keepers``) is reduced whole over R, and gathered over the tensor ranks.

With several microbatches, zero 0 and 1 reduce *once* a step, and so replicas meet: the accumulated sum, in the storage
dtype. What mixes samples is reduced in every microbatch at all levels.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from ..plan import Strategy
from ..profile import BATCH, SEQ, CollectiveKind, LayerKind, Lookup, Parameter
from ._keepers import Reading, read_parameters


class Reduction(NamedTuple):
    """The reductions of one kind over one group, all parameters together."""

    kind: CollectiveKind
    group: int
    once: bool
    """Once a step, not in every microbatch."""
    bytes: float = 0.0


def gradient_reductions(
    kind: LayerKind,
    strategy: Strategy,
    microbatch: int,
    readings: Iterable[Reading] = (),
    *,
    accumulates: bool,
    merged: bool,
) -> tuple[Reduction, ...]:
    """Return the reductions of all gradients of a layer.

    Args:
        kind: The layer kind.
        strategy: Its strategy.
        microbatch: Samples over all ranks.
        readings: Its parameters and who keeps them; none: it keeps them all.
        accumulates: Gradients of several microbatches are summed up.
        merged: Partial results are added up before they are reduced.
    """
    gradients, totals = (
        _Gradients(kind, strategy, microbatch, accumulates, merged),
        defaultdict[Reduction, float](float),
    )
    for reading in list(readings) or next(read_parameters([(kind, strategy)])):
        for reduction in gradients.reductions(reading):
            if reduction.once and reading.keeper is not reading.own:
                continue  # the accumulated sum of all layers that hold it: the first of them reduces it
            totals[reduction._replace(bytes=0.0)] += reduction.bytes
    return tuple(key._replace(bytes=size) for key, size in totals.items() if size)


def is_deferred(strategy: Strategy, *, accumulates: bool) -> bool:
    """Return whether ranks reduce gradients that they can make apart after the last microbatch only."""
    return accumulates and strategy.zero <= 1


class _Gradients:
    """The gradients of one layer under one strategy."""

    def __init__(self, kind: LayerKind, strategy: Strategy, microbatch: int, accumulates: bool, merged: bool) -> None:
        self._kind, self._strategy, self._samples = kind, strategy, microbatch // strategy.replicas
        self._accumulates, self._merged = accumulates, merged
        self._candidate = kind.best_candidate
        self._shards = self._candidate.shards(strategy.tp, kind.classes) if self._candidate else {}
        self._sums_before = any(collective.gradient for collective in kind.data)

    def reductions(self, reading: Reading) -> Iterator[Reduction]:
        s, parameter = self._strategy, reading.own.parameter
        deferred = parameter.per_sample and reading.agreed and is_deferred(s, accumulates=self._accumulates)
        dim = reading.own.zero_dim if s.zero and reading.scatters else None
        kind: CollectiveKind = "all-reduce" if dim is None else "reduce-scatter"
        for gather in reading.gradient_gathers if self._meets(parameter) else ():
            yield Reduction("all-gather", gather.ranks, deferred, gather.bytes)
        apart = reading.agreed if self._accumulates else reading.scatters
        if s.replicas == 1 or not parameter.per_sample or not apart:
            whole = self._each(parameter, parameter.sums, deferred=deferred)
            yield Reduction(kind if s.replicas == 1 else "all-reduce", s.dp * s.ulysses, deferred, whole)
            return
        lookups = () if dim is None or self._accumulates or s.inner > 1 else parameter.lookups
        moved = [self._moves(parameter, lookup, parameter.dims[dim or 0]) for lookup in lookups]
        left = parameter.sums - sum(map(bool, moved))
        yield from itertools.chain(*moved)
        yield Reduction(kind, s.zero_ranks, deferred, self._each(parameter, left, deferred=deferred))
        summed = self._size(parameter, stored=self._accumulates) if self._meets(parameter) else 0.0
        yield Reduction("all-reduce", s.replicas, self._accumulates, summed / (1 if dim is None else s.zero_ranks))

    def _moves(self, parameter: Parameter, lookup: Lookup, scattered: tuple[str | int, ...]) -> list[Reduction]:
        """Return what moves rows and indices in place of the table; nothing where the table is smaller.

        Args:
            parameter: The table.
            lookup: One lookup in it.
            scattered: The dimension of the table that the ranks share out.
        """
        table, ranks = self._size(parameter, stored=False), self._strategy.zero_ranks
        sizes = {**self._kind.classes, BATCH: self._samples}
        exchanged = set(scattered) <= set(lookup.rows.classes)
        wide, rows = (
            array.local_bytes(sizes, {}) / (ranks if exchanged else 1)
            for array in (msgspec.structs.replace(lookup.rows, dtype=parameter.compute_dtype), lookup.rows)
        )
        indices = lookup.indices.local_bytes(sizes, {})
        if (max(wide, indices, table / ranks), wide + indices) >= (table, table):
            return []
        kind: CollectiveKind = "all-to-all" if exchanged else "all-gather"
        return [Reduction(kind, ranks, False, rows), Reduction("all-gather", ranks, False, indices)]

    def _each(self, parameter: Parameter, number: int, *, deferred: bool) -> float:
        """Bytes of reducing ``number`` partial results of one gradient, or their sum, over the ranks of a group."""
        size = self._size(parameter, stored=deferred)
        if deferred:
            return size if self._meets(parameter) else 0.0
        return (min(number, 1) if self._merged else number) * size / self._parts(parameter)

    def _meets(self, parameter: Parameter) -> bool:
        """Ranks (or replicas) that made gradients of their own have something to add up."""
        return parameter.sums > 0 or self._sums_before

    def _parts(self, parameter: Parameter) -> int:
        """Under sp the gradient of a parameter with positions is reduced in as many parts, and gathered after."""
        candidate, classes = self._candidate, set(parameter.classes())
        along = self._strategy.sp and SEQ in classes and candidate and classes.isdisjoint(candidate.classes)
        return self._strategy.tp if along else 1

    def _size(self, parameter: Parameter, *, stored: bool) -> float:
        """Bytes of one tensor shard, in the compute dtype or as ``stored``."""
        array = parameter.array(parameter.dtype if stored else parameter.compute_dtype)
        return array.local_bytes(self._kind.classes, self._shards)

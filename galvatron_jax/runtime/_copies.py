"""Copies: every data-parallel rank reads weights of its own, so that nothing is reduced before the last microbatch.

The gradient of a weight that all ranks share is a sum over them, and the partitioner takes that sum where the gradient
is made: once for every microbatch. Here the weight becomes an array [dp, ...], sharded so that each rank holds its own
(equal) row: no memory, no communication. Equations that mix it with samples run per rank,

    x [batch, ...], w [dp, ...]   ->   x [dp, batch / dp, ...], one product for each rank   ->   [batch, ...]

and the gradient is [dp, ...] too, every row where it was made. Gradients are added up in that form over the loop of
microbatches; after it, one sum over the first dimension is the reduction (notes: Galvatron's and Megatron's "no sync"
until the last microbatch, but for every layer's own data-parallel degree). Under Ulysses every rank has a part of the
samples and a part of each one's sequence, so there are dp * ulysses rows:

    x [batch, seq, ...]   ->   [dp * ulysses, batch / dp, seq / ulysses, ...]

Only equations that treat every sample (and position) alike can run per rank. A parameter that meets any other one (a
product over the batch, an unknown primitive) is not copied: its gradient is reduced in every microbatch, which is
slower and as right.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import ELEMENTWISE, Equation, Value, refused_parameters, run_equation
from ._layout import LayerLayout
from ._mesh import Axes

_PER_SAMPLE = ELEMENTWISE | {"dot_general", "gather"}
"""Primitives without a parameter that names the size of the batch: the same equation serves any number of samples."""


def partial_axes(layout: LayerLayout) -> Axes:
    """Return the mesh axes along which every rank makes a part of the sum that a gradient is."""
    inner = layout.stage.tensor_axes(layout.strategy) if layout.strategy.ulysses > 1 else ()
    return layout.stage.data_axes(layout.strategy) + inner


def unreduced_axes(layout: LayerLayout) -> Axes:
    """Return the mesh axes over which gradients stay unreduced until the last microbatch.

    Under zero 0 and 1 all of them. Zero 2 and 3 keep gradients sharded, so they reduce (scatter) inside a group of
    ranks in every microbatch, and only across the replicas of hsdp at the end.
    """
    return partial_axes(layout) if layout.strategy.zero <= 1 else layout.replica_axes


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of weights of one layer along ``axes``."""

    layout: LayerLayout
    axes: Axes

    @property
    def count(self) -> int:
        """How many there are."""
        return self.layout.stage.size(self.axes)

    def place(self, row: NamedSharding, *, lead: int = 0) -> NamedSharding:
        """Return the place of [copies, ...], behind ``lead`` dimensions of a stack, whose rows live as ``row`` says."""
        return self.layout.stage.sharding(PartitionSpec(*[None] * lead, self.axes, *row.spec))

    def spread(self, array: Any, row: NamedSharding, *, lead: int = 0) -> Any:
        """Return the copies of ``array``, whose rows live as ``row`` says: no bytes move."""
        shape = (*array.shape[:lead], self.count, *array.shape[lead:])
        copies = jnp.broadcast_to(jnp.expand_dims(array, lead), shape)
        return jax.lax.with_sharding_constraint(copies, self.place(row, lead=lead))

    def spread_on(self, array: Any, row: NamedSharding, outer: Copies) -> Any:
        """Return the copies of what is a copy for each group of ranks already; ``outer`` has the leading axes."""
        each = jnp.broadcast_to(array[:, None], (outer.count, self.count // outer.count, *array.shape[1:]))
        return jax.lax.with_sharding_constraint(each.reshape(self.count, *array.shape[1:]), self.place(row))

    def sum(self, array: Any, row: NamedSharding, *, lead: int = 0) -> Any:
        """Return the sum over the copies, put as ``row`` says: the reduction over the ranks.

        With replicas (hsdp) first inside each group, scattered there, then across: in one step the partitioner would
        reduce whole arrays over all ranks. In the array's own dtype: ``jnp.sum`` would add bfloat16 up in float32, and
        so move twice the bytes.
        """
        across = self.layout.replica_axes
        if across and self.layout.strategy.zero and len(across) < len(self.axes):
            array = self.sum_inside(array, row, Copies(self.layout, across), lead=lead)
        total = jax.lax.reduce_sum(array, (lead,))
        place = self.layout.stage.sharding(PartitionSpec(*[None] * lead, *row.spec))
        return jax.lax.with_sharding_constraint(total, place)

    def sum_inside(self, array: Any, row: NamedSharding, outer: Copies, *, lead: int = 0) -> Any:
        """Return the sums inside each group of ranks, copies along the leading axes ``outer``: undoes ``spread_on``."""
        shape = (*array.shape[:lead], outer.count, self.count // outer.count, *array.shape[lead + 1 :])
        sums = jax.lax.reduce_sum(array.reshape(shape), (lead + 1,))
        return jax.lax.with_sharding_constraint(sums, outer.place(row, lead=lead))

    @functools.cached_property
    def shared(self) -> dict[int, Axes]:
        """The classes of which every rank along ``axes`` has a share, and the axes of each: batch, then sequence."""
        found = {f: tuple(n for n in axes if n in self.axes) for f, axes in self.layout.sample_axes.items()}
        return {f: axes for f, axes in found.items() if axes}

    def dims(self, value: Value) -> tuple[int, ...] | None:
        """Return the dimension of each shared class; None unless each is the major factor of one and in no other."""
        classes = self.layout.kind.layer.dimensions.classes(value)
        found = [[d for d, dim in enumerate(classes) if f in dim] for f in self.shared]
        alone = all(len(d) == 1 and classes[d[0]][0] == f for f, d in zip(self.shared, found, strict=True))
        return tuple(d[0] for d in found) if found and alone else None

    def has_samples(self, value: Value) -> bool:
        """Tell whether ``value`` has any shared class."""
        return not self.shared.keys().isdisjoint(self.layout.kind.layer.dimensions.flat_classes(value))

    def split(self, array: Any, dims: Sequence[int], value: Value, *, sequence: bool = True) -> Any:
        """Return [..., batch, ...] as [copies, ..., batch / copies, ...], each rank's samples where they are.

        Args:
            array: Of samples.
            dims: Its shared dimensions.
            value: What it is.
            sequence: False: every tensor rank gets the whole sequence.
        """
        counts = [self.layout.stage.size(axes) for axes in self.shared.values()]
        shape: list[int] = []
        fronts, rest = [0] * len(dims), []
        for d, size in enumerate(array.shape):
            if d in dims:
                part = dims.index(d)
                fronts[part] = len(shape)
                shape.append(counts[part])
                size //= counts[part]
            rest.append(len(shape))
            shape.append(size)
        apart = jnp.transpose(array.reshape(shape), fronts + rest)
        return self.place_shares(apart.reshape(self.count, *apart.shape[len(dims) :]), value, sequence=sequence)

    def place_shares(self, shares: Any, value: Value, *, sequence: bool = True) -> Any:
        """Return what ``split`` makes of ``value``, put where each rank has its own.

        Under sequence parallelism what is not the stream, but goes with it (a norm's mean), stays as it is sharded.
        """
        entries = list(self.layout.value(value, sequence=sequence).spec)
        entries += [None] * (shares.ndim - 1 - len(entries))
        free = sequence and self.layout.strategy.sp and not self.layout.is_stream(value)
        row = [self._without(entry) or (PartitionSpec.UNCONSTRAINED if free else None) for entry in entries]
        return jax.lax.with_sharding_constraint(shares, self.layout.stage.sharding(PartitionSpec(self.axes, *row)))

    def merge(self, array: Any, dims: Sequence[int]) -> Any:
        """Undo ``split``."""
        counts = [self.layout.stage.size(axes) for axes in self.shared.values()]
        apart = array.reshape(*counts, *array.shape[1:])
        order: list[int] = []
        shape = list(array.shape[1:])
        for d in range(array.ndim - 1):
            if d in dims:
                order.append(dims.index(d))
                shape[d] *= counts[dims.index(d)]
            order.append(len(dims) + d)
        return jnp.transpose(apart, order).reshape(shape)

    def _without(self, entry: str | Axes | None) -> Axes | None:
        """An entry of a ``PartitionSpec`` less the axes of the copies."""
        kept = entry if isinstance(entry, tuple) else (entry,)
        return tuple(name for name in kept if name is not None and name not in self.axes) or None


class PerRank:
    """One run of a layer's equations, some of whose values are copies.

    An array of samples is taken apart into the ranks' shares once, whoever reads it: what a product needs whole (the
    stream, under sequence parallelism) the partitioner gathers for each array that it meets, so one array taken apart
    for each of three products would be gathered three times. It is put where the product needs it, and so is the
    cotangent of what a product makes: left to find out itself, the partitioner names a group of ranks in two ways, and
    the compiler takes two gathers of one array for two.
    """

    def __init__(self, copies: Copies, copied: Iterable[Any]) -> None:
        """``copied`` are the variables of the layer's program that are copies from the start."""
        self._copies, self._values = copies, copies.layout.kind.layer.forward_values
        self.copied = set(copied)
        """The variables that are copies so far."""
        self._shares: dict[tuple[int, bool], tuple[Any, Any]] = {}
        """Arrays by their identity, with their sequence sharded or not, and as shares; the former only to keep the
        identity."""

    def reads_copies(self, equation: Equation) -> bool:
        """Tell whether any operand is a copy."""
        return any(not isinstance(v, Literal) and v in self.copied for v in equation.inputs)

    def run(self, equation: Equation, arguments: Sequence[Any]) -> list[Any]:
        """Return the results: copies again when only weights are read, else arrays of the whole batch."""
        copied = [not isinstance(v, Literal) and v in self.copied for v in equation.inputs]
        if not any(copied):
            return run_equation(equation.eqn, arguments)
        if not _mixes(self._copies, equation, copied):
            self.copied.update(equation.outputs)
            results = _mapped(equation, arguments, copied)
            whole = self._needs_sequence(equation)
            return [self._place_copies(r, v) if whole else r for r, v in zip(results, equation.outputs, strict=True)]
        shares, mapped = list(arguments), list(copied)
        whole = self._needs_sequence(equation)
        for i, variable in enumerate(equation.inputs):
            if copied[i] or isinstance(variable, Literal):
                continue
            value = self._values[variable]
            dims = self._copies.dims(value)
            if dims is not None:
                shares[i], mapped[i] = self._share(arguments[i], dims, value, sequence=not whole), True
        results = _mapped(equation, shares, mapped)
        return [
            self._merge(result, self._values[v], whole=whole)
            for result, v in zip(results, equation.outputs, strict=True)
        ]

    def _needs_sequence(self, equation: Equation) -> bool:
        """Tell whether a product under sequence parallelism reads, or makes, the stream of the whole sequence."""
        layout = self._copies.layout
        operands = [self._values[v] for v in equation.inputs if not isinstance(v, Literal)]
        return layout.strategy.sp and any(layout.is_tensor_sharded(value) for value in operands)

    def _share(self, array: Any, dims: Sequence[int], value: Value, *, sequence: bool) -> Any:
        key = (id(array), sequence)
        if key not in self._shares:
            self._shares[key] = (array, self._copies.split(array, dims, value, sequence=sequence))
        return self._shares[key][1]

    def _place_copies(self, copies: Any, variable: Any) -> Any:
        row = self._copies.layout.value(self._values[variable], sequence=False)
        return jax.lax.with_sharding_constraint(copies, self._copies.place(row))

    def _merge(self, shares: Any, value: Value, *, whole: bool) -> Any:
        placed = self._copies.place_shares(shares, value, sequence=False) if whole else shares
        return self._copies.merge(placed, self._copies.dims(value) or ())


def _mapped(equation: Equation, arguments: Sequence[Any], mapped: Sequence[bool]) -> list[Any]:
    axes = tuple(0 if one else None for one in mapped)
    results: list[Any] = jax.vmap(lambda *each: run_equation(equation.eqn, each), in_axes=axes)(*arguments)
    return results


# ------------------------------------------------------------------------------------------------------ which ones may
def copyable(layout: LayerLayout, axes: Axes) -> frozenset[int]:
    """Return the parameters (by position) of which every use can run per rank along ``axes``."""
    copies = Copies(layout, axes)
    positions = (
        frozenset(i for i, p in enumerate(layout.kind.profile.parameters) if p.per_sample) if axes else frozenset()
    )
    # The analysis knows what treats all samples alike; what treats all positions alike matters under Ulysses only.
    makes, runs = functools.partial(_makes_samples, copies), functools.partial(_runs_apart, copies)
    while layout.strategy.ulysses > 1 and (refused := refused_parameters(layout.kind.layer, positions, makes, runs)):
        positions -= refused
    return positions


def unreduced_by_parameter(layout: LayerLayout) -> list[Axes]:
    """Return the axes over which each parameter's gradient stays unreduced; none where it cannot be copied."""
    axes = unreduced_axes(layout)
    able = copyable(layout, axes)
    return [axes if position in able else () for position in range(len(layout.kind.layer.parameters))]


def _mixes(copies: Copies, equation: Equation, copied: Sequence[bool]) -> bool:
    values = copies.layout.kind.layer.forward_values
    return any(
        not one and not isinstance(v, Literal) and copies.dims(values[v]) is not None
        for v, one in zip(equation.inputs, copied, strict=True)
    )


def _makes_samples(copies: Copies, equation: Equation) -> bool:
    values = copies.layout.kind.layer.forward_values
    return any(copies.has_samples(values[v]) for v in equation.outputs)


def _runs_apart(
    copies: Copies, equation: Equation, copied: Sequence[bool], others: Sequence[Any], sampled: set[Any]
) -> bool:
    return _mixes(copies, equation, copied) and _is_per_sample(copies, equation, others, sampled)


def _is_per_sample(copies: Copies, equation: Equation, others: Sequence[Any], sampled: set[Any]) -> bool:
    """Every result and every operand made of samples can be taken apart into the ranks' shares."""
    values = copies.layout.kind.layer.forward_values
    whole = [v for v in others if v in sampled or copies.has_samples(values[v])]
    return equation.name in _PER_SAMPLE and all(copies.dims(values[v]) is not None for v in [*whole, *equation.outputs])

"""Copies: every data-parallel rank reads weights of its own, so that nothing is reduced before the last microbatch.

The gradient of a weight that all ranks share is a sum over them, and the partitioner takes that sum where the gradient
is made: once for every microbatch. Here the weight becomes an array [dp, ...], sharded so that each rank holds its own
(equal) row: no memory, no communication. Equations that mix it with samples run per rank,

    x [batch, ...], w [dp, ...]   ->   x [dp, batch / dp, ...], one product for each rank   ->   [batch, ...]

and the gradient is [dp, ...] too, every row where it was made. Gradients are added up in that form over the loop of
microbatches; after it, one sum over the first dimension is the reduction (notes: Galvatron's and Megatron's "no sync"
until the last microbatch, but for every layer's own data-parallel degree).

Only equations that treat every sample alike can run per rank. A parameter that meets any other one (a product over the
batch, an unknown primitive) is not copied: its gradient is reduced in every microbatch, which is slower and as right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import AnalysedKind, Equation, Value, run_equation
from ._layout import LayerLayout
from ._mesh import Axes


def copyable(kind: AnalysedKind) -> frozenset[int]:
    """Return the parameters (by position) of which every use can run per data-parallel rank."""
    return frozenset(i for i, parameter in enumerate(kind.profile.parameters) if parameter.per_sample)


def unreduced_axes(layout: LayerLayout) -> Axes:
    """Return the mesh axes over which gradients stay unreduced until the last microbatch.

    Under zero 0 and 1 all data axes. Zero 2 and 3 keep gradients sharded, so they reduce (scatter) inside a group of
    ranks in every microbatch, and only across the replicas of hsdp at the end.
    """
    return layout.stage.data_axes(layout.strategy) if layout.strategy.zero <= 1 else layout.replica_axes


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of weights of one layer along ``axes``."""

    layout: LayerLayout
    axes: Axes

    @property
    def count(self) -> int:
        """How many there are."""
        return self.layout.stage.size(self.axes)

    def place(self, row: NamedSharding, *, stacked: bool = False) -> NamedSharding:
        """Return the place of an array [copies, ...] (or [layers, copies, ...]) whose rows live as ``row`` says."""
        spec = PartitionSpec(self.axes, *row.spec)
        return self.layout.stage.sharding(PartitionSpec(None, *spec) if stacked else spec)

    def spread(self, array: Any, row: NamedSharding, *, stacked: bool = False) -> Any:
        """Return the copies of ``array``, whose rows live as ``row`` says: no bytes move."""
        axis = int(stacked)
        shape = (*array.shape[:axis], self.count, *array.shape[axis:])
        copies = jnp.broadcast_to(jnp.expand_dims(array, axis), shape)
        return jax.lax.with_sharding_constraint(copies, self.place(row, stacked=stacked))

    def sum(self, array: Any, row: NamedSharding, *, stacked: bool = False) -> Any:
        """Return the sum over the copies, put as ``row`` says: the reduction over the ranks.

        With replicas (hsdp) first inside each group, scattered there, then across: in one step the partitioner would
        reduce whole arrays over all ranks. In the array's own dtype: ``jnp.sum`` would add bfloat16 up in float32, and
        so move twice the bytes.
        """
        axis, across = int(stacked), self.layout.replica_axes
        if across and self.layout.strategy.zero and len(across) < len(self.axes):
            groups = self.layout.stage.size(across)
            shape = (*array.shape[:axis], groups, self.count // groups, *array.shape[axis + 1 :])
            inside = Copies(self.layout, across)
            array = jax.lax.with_sharding_constraint(
                jax.lax.reduce_sum(array.reshape(shape), (axis + 1,)), inside.place(row, stacked=stacked)
            )
        total = jax.lax.reduce_sum(array, (axis,))
        spec = PartitionSpec(None, *row.spec) if stacked else row.spec
        return jax.lax.with_sharding_constraint(total, self.layout.stage.sharding(spec))

    def split(self, array: Any, dim: int, value: Value) -> Any:
        """Return [..., batch, ...] as [copies, ..., batch / copies, ...], each rank's samples where they are."""
        shape = (*array.shape[:dim], self.count, array.shape[dim] // self.count, *array.shape[dim + 1 :])
        entries = list(self.layout.value(value).spec)
        entries += [None] * (array.ndim - len(entries))
        kept = entries[dim] if isinstance(entries[dim], tuple) else (entries[dim],)
        entries[dim] = tuple(name for name in kept if name is not None and name not in self.axes) or None
        split = jnp.moveaxis(array.reshape(shape), dim, 0)
        return jax.lax.with_sharding_constraint(split, self.layout.stage.sharding(PartitionSpec(self.axes, *entries)))


class PerRank:
    """One run of a layer's equations, some of whose values are copies.

    An array of samples is taken apart into the ranks' shares once, whoever reads it: what a product needs whole (the
    stream, under sequence parallelism) the partitioner gathers for each array that it meets, so one array taken apart
    for each of three products would be gathered three times.
    """

    def __init__(self, copies: Copies, copied: Iterable[Any]) -> None:
        """``copied`` are the variables of the layer's program that are copies from the start."""
        self._copies = copies
        self.copied = set(copied)
        """The variables that are copies so far."""
        self._shares: dict[int, tuple[Any, Any]] = {}
        """Arrays by their identity, and as shares; the former only to keep the identity."""

    def reads_copies(self, equation: Equation) -> bool:
        """Tell whether any operand is a copy."""
        return any(not isinstance(v, Literal) and v in self.copied for v in equation.inputs)

    def run(self, equation: Equation, arguments: Sequence[Any]) -> list[Any]:
        """Return the results: copies again when only weights are read, else arrays of the whole batch."""
        samples, values = self._copies.layout.kind.samples, self._copies.layout.kind.layer.forward_values
        copied = [not isinstance(v, Literal) and v in self.copied for v in equation.inputs]
        if not any(copied):
            return run_equation(equation.eqn, arguments)
        if not samples.mixes(equation, copied):
            self.copied.update(equation.outputs)
            return _mapped(equation, arguments, copied)
        shares, mapped = list(arguments), list(copied)
        for i, variable in enumerate(equation.inputs):
            if copied[i] or isinstance(variable, Literal):
                continue
            dim = samples.batch_dim(values[variable])
            if dim is not None:
                shares[i], mapped[i] = self._share(arguments[i], dim, values[variable]), True
        results = _mapped(equation, shares, mapped)
        return [
            _merge(result, samples.batch_dim(values[v]) or 0)
            for result, v in zip(results, equation.outputs, strict=True)
        ]

    def _share(self, array: Any, dim: int, value: Value) -> Any:
        if id(array) not in self._shares:
            self._shares[id(array)] = (array, self._copies.split(array, dim, value))
        return self._shares[id(array)][1]


def _merge(array: Any, dim: int) -> Any:
    """Undo ``Copies.split``."""
    moved = jnp.moveaxis(array, 0, dim)
    return moved.reshape(*moved.shape[:dim], moved.shape[dim] * moved.shape[dim + 1], *moved.shape[dim + 2 :])


def _mapped(equation: Equation, arguments: Sequence[Any], mapped: Sequence[bool]) -> list[Any]:
    axes = tuple(0 if one else None for one in mapped)
    results: list[Any] = jax.vmap(lambda *each: run_equation(equation.eqn, each), in_axes=axes)(*arguments)
    return results

"""Sums of gradients over the microbatches of a step.

A backward loop over layers makes a stack of gradients, which is then added to the sums: twice the bytes of the
gradients. Gradients that nobody reduces before the last microbatch are therefore added up *in place*, layer by layer,
where they are made. Those that every microbatch reduces (zero 2 and 3) come as a stack of shards: only there XLA hides
the reduction of a layer behind the next one (compiled for 16 H100, docs/design/0055: in place, twice the exposed time
of collectives).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

_RETURNED = 0
"""For a parameter whose gradient the pullback returns."""


class GradientSums:
    """Running sums of the gradients of parameters, in a program; made outside its loop over microbatches."""

    def __init__(self, sums: Sequence[Any], places: Sequence[NamedSharding], in_place: Iterable[bool]) -> None:
        """Begin with the sums of the microbatches before.

        Args:
            sums: One array for each parameter that is differentiated.
            places: Where each sum lives.
            in_place: Which of them are added up inside the backward pass.
        """
        self._places = list(places)
        self._sums = jax.lax.with_sharding_constraint(list(sums), self._places)
        self._refs = [jax.new_ref(s) if one else None for s, one in zip(self._sums, in_place, strict=True)]

    @classmethod
    def zero(cls, parameters: Sequence[Any], places: Sequence[NamedSharding], in_place: Iterable[bool]) -> Self:
        """Begin at zero."""
        return cls([jnp.zeros(p.shape, p.dtype) for p in parameters], places, in_place)

    @property
    def start(self) -> list[Any]:
        """The sums that the loop carries: those not in place."""
        return self._carried(self._sums)

    def add(
        self, carried: list[Any], pullback: Any, cotangent: Any, arriving: int | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Add the gradients of one microbatch; return the sums to carry on, and the cotangents of arriving values.

        Args:
            carried: What ``start`` or the call before returned.
            pullback: Of ``jax.vjp`` with respect to the list of parameters (and a list of arriving values).
            cotangent: Of the results.
            arriving: How many values arrive; None where the pullback knows parameters only.
        """
        taken = [_RETURNED if ref is None else ref for ref in self._refs]
        others = () if arriving is None else ([_RETURNED] * arriving,)
        gradients, *returned = pullback.with_refs(taken, *others)(cotangent)
        places = self._carried(self._places)
        gradients = jax.lax.with_sharding_constraint(self._carried(gradients), places)
        sums: list[Any] = [total + gradient for total, gradient in zip(carried, gradients, strict=True)]
        return list(jax.lax.with_sharding_constraint(sums, places)), returned[0] if returned else []

    def finish(self, carried: Sequence[Any]) -> list[Any]:
        """Return all sums."""
        rest = iter(carried)
        sums = [next(rest) if ref is None else jax.freeze(ref) for ref in self._refs]
        return list(jax.lax.with_sharding_constraint(sums, self._places))

    def _carried(self, values: Sequence[Any]) -> list[Any]:
        return [value for value, ref in zip(values, self._refs, strict=True) if ref is None]

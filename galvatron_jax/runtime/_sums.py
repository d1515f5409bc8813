"""Sums of gradients over the microbatches of a step.

A backward loop over layers makes a stack of gradients, which is then added to the sums: twice the bytes of the
gradients. Gradients that nobody reduces before the last microbatch are therefore added up *in place*, layer by layer,
where they are made. Those that every microbatch reduces (zero 2 and 3) come as a stack of shards: only there XLA hides
the reduction of a layer behind the next one (compiled for 16 H100, docs/design/0055: in place, twice the exposed time
of collectives).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

_RETURNED = 0
"""For a parameter whose gradient the pullback returns."""


class GradientSums:
    """Running sums of the gradients of ``parameters``; made outside the loop over microbatches."""

    def __init__(self, parameters: Sequence[Any], places: Sequence[NamedSharding], in_place: Iterable[bool]) -> None:
        """Begin at zero.

        Args:
            parameters: What is differentiated.
            places: Where each sum lives.
            in_place: Which of them are added up inside the backward pass.
        """
        self._places = list(places)
        zeros = [jnp.zeros(p.shape, p.dtype) for p in parameters]
        self._zeros = jax.lax.with_sharding_constraint(zeros, self._places)
        self._refs = [jax.new_ref(z) if one else None for z, one in zip(self._zeros, in_place, strict=True)]

    @property
    def start(self) -> list[Any]:
        """The sums that the loop carries: those not in place."""
        return self._carried(self._zeros)

    def add(self, carried: list[Any], pullback: Any, cotangent: Any) -> list[Any]:
        """Add the gradients of one microbatch; return the sums to carry on.

        Args:
            carried: What ``start`` or the call before returned.
            pullback: Of ``jax.vjp`` with respect to the list of parameters.
            cotangent: Of the loss.
        """
        taken = [_RETURNED if ref is None else ref for ref in self._refs]
        (gradients,) = pullback.with_refs(taken)(cotangent)
        places = self._carried(self._places)
        gradients = jax.lax.with_sharding_constraint(self._carried(gradients), places)
        sums: list[Any] = [total + gradient for total, gradient in zip(carried, gradients, strict=True)]
        return list(jax.lax.with_sharding_constraint(sums, places))

    def finish(self, carried: Sequence[Any]) -> list[Any]:
        """Return all sums."""
        rest = iter(carried)
        sums = [next(rest) if ref is None else jax.freeze(ref) for ref in self._refs]
        return list(jax.lax.with_sharding_constraint(sums, self._places))

    def _carried(self, values: Sequence[Any]) -> list[Any]:
        return [value for value, ref in zip(values, self._refs, strict=True) if ref is None]

"""Parameters that another layer keeps: how a layer reads what it shares with an earlier one.

A stage stores a shared parameter once, as the first layer that reads it wants it (its keeper; ``_slots``). A layer
under another strategy may want it in another layout. Left to itself the partitioner finds a way of its own between the
two: gathers over some mesh axes and permutes, each way another one for each shape, all of them in every pass. Here the
way is always the same,

    where it is stored   ->   as the keeper uses it   ->   whole   ->   as the reader uses it
                   gather (zero 3)              gather (tp)      free

and the cotangent goes back from the reader's layout, reduced there, whole, to where the keeper has gradients. Where the
reader wants it right as it is stored (zero 3 over the reader's tensor ranks) nothing moves. The first gather is the
keeper's own or that of other readers, and the partitioner moves a value once for all of them (what is made of a
gathered value is another value in each layer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from ._layout import LayerLayout, Role


@dataclasses.dataclass(frozen=True)
class Kept:
    """A parameter as the layer that keeps it has it."""

    stored: NamedSharding
    used: NamedSharding
    gradient: NamedSharding
    whole: NamedSharding
    """A copy on every device."""

    @classmethod
    def of(cls, keeper: LayerLayout, position: int, role: Role) -> Kept:
        """Return how ``keeper`` has one of its parameters.

        Args:
            keeper: The layout of the layer that keeps it.
            position: Which of that layer's parameters it is.
            role: Where gradients are put.
        """
        value = keeper.kind.layer.inputs[keeper.kind.layer.parameters[position]]
        stored, gradient = keeper.stored(position, "parameter"), keeper.stored(position, role)
        return cls(stored, keeper.value(value), gradient, keeper.stage.replicated)

    def copied(self, place: Callable[[NamedSharding], NamedSharding]) -> Kept:
        """Return the same of copies of the parameter, which are where ``place`` says."""
        return Kept(*map(place, (self.stored, self.used, self.gradient, self.whole)))

    def bring(self, weight: Any, used: NamedSharding) -> Any:
        """Return what is stored with the keeper in a reader's layout ``used``; see ``take_back`` for its cotangent."""
        if not any(_is_same(place, used, weight.ndim) for place in (self.stored, self.used)):
            if not _is_same(self.stored, self.used, weight.ndim):
                weight = jax.lax.with_sharding_constraint(weight, self.used)
            weight = jax.lax.with_sharding_constraint(weight, self.whole)
        return jax.lax.with_sharding_constraint(weight, used)

    def take_back(self, gradient: Any, used: NamedSharding) -> Any:
        """Return a gradient, reduced in a reader's layout ``used``, on its way to the keeper's."""
        gradient = jax.lax.with_sharding_constraint(gradient, used)
        if any(_is_same(place, used, gradient.ndim) for place in (self.gradient, self.used)):
            return gradient
        whole = jax.lax.with_sharding_constraint(gradient, self.whole)
        return jax.lax.with_sharding_constraint(whole, self.used)


def _is_same(one: NamedSharding, other: NamedSharding, ndim: int) -> bool:
    return one.is_equivalent_to(other, ndim)

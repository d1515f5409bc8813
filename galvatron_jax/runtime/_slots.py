"""Slots: the arrays in which a stage stores parameters, their gradients and their optimizer state.

A layer of its own has a slot per parameter. A run of layers has one slot for each parameter of the layer, of shape
[layers, ...]: the loop over layers reads its rows, and nothing is stacked or copied inside a step. So has each run of a
cycle, for its layers in all turns. A fused projection
may be stored in another shape than the user's (``_view``). What the user sees (checkpoints, ``model``) is the user's
own tree: ``to_user`` and ``to_stored`` go between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import Variable
from ._cycles import Cycle, stacks_of
from ._layout import LayerLayout, Role
from ._mesh import StageMesh
from ._runs import Run
from ._view import View


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One stored array."""

    leaves: tuple[int, ...]
    """Positions in the user's parameter leaves, layer by layer; exactly one when it is not stacked."""
    is_stacked: bool
    mesh: StageMesh
    layout: LayerLayout | None
    """Of the first layer that reads it; None when no layer does."""
    position: int
    """Which of that layer's parameters it is."""
    view: View | None = None
    """The shape of a single layer's part, where it is not stored in the user's."""
    turns: int = 1
    """Of a run inside a cycle: how often it comes."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions of the array as loops read it: layers, or turns and the layers of each."""
        if not self.is_stacked:
            return ()
        return (len(self.leaves),) if self.turns == 1 else (self.turns, len(self.leaves) // self.turns)

    def by_turn(self, array: Any) -> Any:
        """Return a stored array with the leading dimensions ``lead``."""
        return array.reshape(*self.lead, *array.shape[int(self.is_stacked) :])

    def by_row(self, array: Any) -> Any:
        """Undo ``by_turn``."""
        return array.reshape(len(self.leaves), *array.shape[len(self.lead) :]) if self.is_stacked else array

    def sharding(self, role: Role) -> NamedSharding:
        """Return where the array (its gradient, its optimizer moments) lives."""
        place = self.leaf_sharding(role)
        return self.mesh.sharding(PartitionSpec(None, *place.spec)) if self.is_stacked else place

    def leaf_sharding(self, role: Role) -> NamedSharding:
        """Return where a single layer's part of the array lives, in the shape in which it is stored."""
        return self.mesh.replicated if self.layout is None else self.layout.stored(self.position, role)

    def user_sharding(self, role: Role) -> NamedSharding:
        """Return where a single layer's part lives in the user's shape."""
        if self.view is None:
            return self.leaf_sharding(role)
        return self.mesh.sharding(self.view.of_user(self._moved(self.view, role).spec))

    def is_moved(self, role: Role) -> bool:
        """Tell whether the user's shape cannot be sharded as the array is stored."""
        return self.view is not None and self._moved(self.view, role) != self.leaf_sharding(role)

    def to_stored(self, leaf: Any, role: Role) -> Any:
        """Return a single layer's part as it is stored, from one of the user's shape."""
        if self.view is None:
            return leaf
        return jax.lax.with_sharding_constraint(jnp.reshape(leaf, self.view.stored), self._moved(self.view, role))

    def to_user(self, row: Any, role: Role) -> Any:
        """Return a single layer's part in the user's shape."""
        if self.view is None:
            return row
        return jnp.reshape(jax.lax.with_sharding_constraint(row, self._moved(self.view, role)), self.view.user)

    def stored_shape(self, leaf: Any) -> tuple[int, ...]:
        """Return the shape in which a single layer's part is stored; ``leaf`` is the user's, of the same shape."""
        return tuple(leaf.shape) if self.view is None else self.view.stored

    def _moved(self, view: View, role: Role) -> NamedSharding:
        return self.mesh.sharding(view.moved(self.leaf_sharding(role).spec, self.mesh.size))


Leaves = Mapping[int, Any] | Sequence[Any]
"""By position in the user's tree; at least those that are read."""


def make_slots(
    mesh: StageMesh, pieces: Sequence[Run | Cycle], held: Sequence[int], variables: Sequence[Variable]
) -> tuple[Slot, ...]:
    """Return the slots of a stage, ordered by their first leaf.

    Args:
        mesh: The stage's devices.
        pieces: Its runs and cycles.
        held: The parameter leaves that it holds.
        variables: The variable of every parameter leaf of the program.
    """
    leaf_of = {variables[leaf]: leaf for leaf in held}
    found: dict[int, Slot] = {}
    for stack in (stack for piece in pieces for stack in stacks_of(piece)):
        leaves, layout = tuple(leaf_of[v] for v in stack.variables), stack.run.layout
        view = _view(variables[leaves[0]].aval.shape, layout.kind.stored_shapes[stack.position])
        found.setdefault(leaves[0], Slot(leaves, stack.is_stacked, mesh, layout, stack.position, view, stack.turns))
    placed = {leaf for slot in found.values() for leaf in slot.leaves}
    found |= {leaf: Slot((leaf,), False, mesh, None, 0) for leaf in held if leaf not in placed}
    return tuple(found[leaf] for leaf in sorted(found))


def _view(user: tuple[int, ...], stored: tuple[int, ...]) -> View | None:
    return None if user == stored else View(user, stored)


def to_stored(slots: Sequence[Slot], leaves: Leaves) -> list[Any]:
    """Return the stored arrays of ``slots`` from the user's leaves (by position); runs under ``jax.jit``."""
    rows = [[slot.to_stored(leaves[leaf], "parameter") for leaf in slot.leaves] for slot in slots]
    return [jnp.stack(row) if slot.is_stacked else row[0] for slot, row in zip(slots, rows, strict=True)]


def to_user(slots: Sequence[Slot], arrays: Sequence[Any]) -> dict[int, Any]:
    """Return the user's leaves by position from stored arrays; runs under ``jax.jit``."""
    found: dict[int, Any] = {}
    for slot, array in zip(slots, arrays, strict=True):
        rows = [array[row] for row in range(len(slot.leaves))] if slot.is_stacked else [array]
        found.update(zip(slot.leaves, [slot.to_user(row, "parameter") for row in rows], strict=True))
    return found


def abstract_stored(slots: Sequence[Slot], leaves: Sequence[Any], role: Role) -> list[jax.ShapeDtypeStruct]:
    """Return shape, dtype and place of every stored array; ``leaves`` are all abstract parameters of the program."""
    made = []
    for slot in slots:
        leaf = leaves[slot.leaves[0]]
        row = slot.stored_shape(leaf)
        shape = (len(slot.leaves), *row) if slot.is_stacked else row
        made.append(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=slot.sharding(role)))
    return made

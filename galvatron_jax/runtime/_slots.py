"""Slots: the arrays in which a stage stores parameters, their gradients and their optimizer state.

A layer of its own has a slot per parameter, of the user's shape. A run of layers has one slot for each parameter of the
layer, of shape [layers, ...]: the loop over layers reads its rows, and nothing is stacked or copied inside a step. What
the user sees (checkpoints, ``model``) is the user's own tree: ``to_user`` and ``to_stored`` go between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import Variable
from ._layout import LayerLayout, Role
from ._mesh import StageMesh
from ._runs import Run


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

    def sharding(self, role: Role) -> NamedSharding:
        """Return where the array (its gradient, its optimizer moments) lives."""
        place = self.leaf_sharding(role)
        return self.mesh.sharding(PartitionSpec(None, *place.spec)) if self.is_stacked else place

    def leaf_sharding(self, role: Role) -> NamedSharding:
        """Return where a single layer's part of the array lives, in the user's shape."""
        return self.mesh.replicated if self.layout is None else self.layout.stored(self.position, role)


Leaves = Mapping[int, Any] | Sequence[Any]
"""By position in the user's tree; at least those that are read."""


def make_slots(
    mesh: StageMesh, runs: Sequence[Run], held: Sequence[int], variables: Sequence[Variable]
) -> tuple[Slot, ...]:
    """Return the slots of a stage, ordered by their first leaf.

    Args:
        mesh: The stage's devices.
        runs: Its runs.
        held: The parameter leaves that it holds.
        variables: The variable of every parameter leaf of the program.
    """
    leaf_of = {variables[leaf]: leaf for leaf in held}
    found: dict[int, Slot] = {}
    for run in runs:
        for position, index in enumerate(run.layout.kind.layer.parameters):
            leaves = tuple(leaf_of[segment.inputs[index]] for segment in run.segments)
            stacked = run.is_scanned and run.feeds[index].source == "stacked"
            found.setdefault(leaves[0], Slot(leaves if stacked else leaves[:1], stacked, mesh, run.layout, position))
    placed = {leaf for slot in found.values() for leaf in slot.leaves}
    found |= {leaf: Slot((leaf,), False, mesh, None, 0) for leaf in held if leaf not in placed}
    return tuple(found[leaf] for leaf in sorted(found))


def to_stored(slots: Sequence[Slot], leaves: Leaves) -> list[Any]:
    """Return the stored arrays of ``slots`` from the user's leaves (by position); runs under ``jax.jit``."""
    return [
        jnp.stack([leaves[leaf] for leaf in slot.leaves]) if slot.is_stacked else leaves[slot.leaves[0]]
        for slot in slots
    ]


def to_user(slots: Sequence[Slot], arrays: Sequence[Any]) -> dict[int, Any]:
    """Return the user's leaves by position from stored arrays; runs under ``jax.jit``."""
    found: dict[int, Any] = {}
    for slot, array in zip(slots, arrays, strict=True):
        rows = [array[row] for row in range(len(slot.leaves))] if slot.is_stacked else [array]
        found.update(zip(slot.leaves, rows, strict=True))
    return found


def abstract_stored(slots: Sequence[Slot], leaves: Sequence[Any], role: Role) -> list[jax.ShapeDtypeStruct]:
    """Return shape, dtype and place of every stored array; ``leaves`` are all abstract parameters of the program."""
    made = []
    for slot in slots:
        leaf = leaves[slot.leaves[0]]
        shape = (len(slot.leaves), *leaf.shape) if slot.is_stacked else leaf.shape
        made.append(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=slot.sharding(role)))
    return made

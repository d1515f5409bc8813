"""Any optax transformation over stored arrays, with the numbers that it would give on the user's own tree.

The transformation is traced on the user's tree, once, and its equations are merged over the stacked arrays
(``_lanes``), so nothing in it needs to know of runs, and the compiled update is as long for 128 layers as for 3. Of its
state, leaves that belong to a parameter (their path ends with the parameter's path) are stored as the parameter is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import flatten, is_call
from ._lanes import Group, LaneProgram, merge_lanes
from ._restate import restate
from ._slots import Slot
from ._view import View


class _StateGroup(NamedTuple):
    """Leaves of the optax state that are stored as one array."""

    group: Group
    slot: Slot | None
    """The parameter whose shape (and place) they have; None for others, which stand whole on every device."""
    whole: NamedSharding

    def stored(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """Return shape, dtype and place of the array; ``leaf`` is one of the leaves, in the user's shape."""
        shape, place = tuple(leaf.shape), self.whole
        if self.slot is not None:
            shape, place = self.slot.stored_shape(leaf), self.slot.leaf_sharding("optimizer")
        if self.group.is_stacked:
            shape = (len(self.group.positions), *shape)
            place = NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)

    @property
    def user_place(self) -> NamedSharding:
        """Where one leaf lives in the user's shape."""
        return self.whole if self.slot is None else self.slot.user_sharding("optimizer")

    @property
    def view(self) -> View | None:
        return None if self.slot is None else self.slot.view

    def to_user(self, row: Any) -> Any:
        return row if self.slot is None else self.slot.to_user(row, "optimizer")

    def to_stored(self, leaf: Any) -> Any:
        return leaf if self.slot is None else self.slot.to_stored(leaf, "optimizer")


class _Stored(NamedTuple):
    """Leaves of a tree that are stored as one array, and the view through which each of them is."""

    group: Group
    view: View | None


@dataclasses.dataclass(frozen=True)
class StoredOptimizer:
    """An optimizer over the arrays of a stage's slots; its stored state is a list of arrays."""

    optimizer: optax.GradientTransformation
    parameters: Any
    """The user's parameters, abstract."""
    slots: tuple[Slot, ...]

    # ------------------------------------------------------------------------------------------------------- running
    def init(self, parameters: Sequence[Any]) -> list[Any]:
        """Return the fresh state for stored ``parameters``."""
        return self._init.run(parameters)

    def update(
        self, gradients: Sequence[Any], state: Sequence[Any], parameters: Sequence[Any]
    ) -> tuple[list[Any], Any]:
        """Return (new parameters, new state), all stored."""
        results = self._update.run([*gradients, *state, *parameters])
        return results[: len(self.slots)], results[len(self.slots) :]

    def to_user(self, state: Sequence[Any]) -> Any:
        """Return the optax state over the user's own tree."""
        leaves: dict[int, Any] = {}
        for stored, array in zip(self._groups, state, strict=True):
            group = stored.group
            rows = [array[row] for row in range(len(group.positions))] if group.is_stacked else [array]
            leaves.update(zip(group.positions, map(stored.to_user, rows), strict=True))
        return jax.tree.unflatten(jax.tree.structure(self._user_state), [leaves[i] for i in range(len(leaves))])

    def to_stored(self, state: Any) -> list[Any]:
        """Return the stored form of an optax state over the user's own tree."""
        leaves = jax.tree.leaves(state)
        rows = [[stored.to_stored(leaves[i]) for i in stored.group.positions] for stored in self._groups]
        return [jnp.stack(r) if s.group.is_stacked else r[0] for s, r in zip(self._groups, rows, strict=True)]

    # -------------------------------------------------------------------------------------------------------- places
    @functools.cached_property
    def abstract_state(self) -> list[jax.ShapeDtypeStruct]:
        """Shape, dtype and place of each stored array."""
        leaves = jax.tree.leaves(self._user_state)
        return [stored.stored(leaves[stored.group.positions[0]]) for stored in self._groups]

    @functools.cached_property
    def abstract_user_state(self) -> Any:
        """Shape, dtype and place of each leaf of the optax state over the user's own tree."""
        leaves, structure = jax.tree.flatten(self._user_state)
        places = {position: stored.user_place for stored in self._groups for position in stored.group.positions}
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[i]) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, placed)

    # -------------------------------------------------------------------------------------------------------- traces
    @functools.cached_property
    def _user_state(self) -> Any:
        return jax.eval_shape(self.optimizer.init, self.parameters)

    @functools.cached_property
    def _init(self) -> LaneProgram:
        return self._merged(self.optimizer.init, [self.parameters], [self._weights], [self._states])

    @functools.cached_property
    def _update(self) -> LaneProgram:
        def step(gradients: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
            updates, state = self.optimizer.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        tree, state = self._weights, self._states
        return self._merged(
            step, [self.parameters, self._user_state, self.parameters], [tree, state, tree], [tree, state]
        )

    @staticmethod
    def _merged(
        function: Callable[..., Any], trees: list[Any], inputs: list[list[_Stored]], outputs: list[list[_Stored]]
    ) -> LaneProgram:
        program = flatten(jax.make_jaxpr(function)(*trees), is_call)
        program = restate(program, _views(inputs), _views(outputs))
        return merge_lanes(program, _in_turn(inputs), _in_turn(outputs))

    # -------------------------------------------------------------------------------------------------------- groups
    @property
    def _weights(self) -> list[_Stored]:
        return [_Stored(Group(slot.leaves, slot.is_stacked), slot.view) for slot in self.slots]

    @property
    def _states(self) -> list[_Stored]:
        return [_Stored(stored.group, stored.view) for stored in self._groups]

    @functools.cached_property
    def _groups(self) -> list[_StateGroup]:
        """Leaves of the optax state as they are stored, ordered by their first position."""
        leaves = [leaf for _, leaf in jax.tree_util.tree_flatten_with_path(self._user_state)[0]]
        found: dict[int, _StateGroup] = {}
        whole = self.slots[0].mesh.replicated
        for slot, positions in self._owned():
            alike = len({(leaves[p].shape, str(leaves[p].dtype)) for p in positions}) == 1
            together = slot.is_stacked and alike and len(positions) == len(slot.leaves)
            for group in [Group(positions, True)] if together else [Group((p,), False) for p in positions]:
                like = slot if self._is_like(slot, leaves[group.positions[0]]) else None
                found[group.positions[0]] = _StateGroup(group, like, whole)
        grouped = {p for stored in found.values() for p in stored.group.positions}
        found |= {p: _StateGroup(Group((p,), False), None, whole) for p in range(len(leaves)) if p not in grouped}
        return [found[p] for p in sorted(found)]

    def _owned(self) -> list[tuple[Slot, tuple[int, ...]]]:
        """Return, for each slot and each copy of it in the optax state, the positions of the copy's leaves in order."""
        named = jax.tree_util.tree_flatten_with_path(self.parameters)[0]
        leaf_by_path = {tuple(path): index for index, (path, _) in enumerate(named)}
        positions: dict[tuple[Any, ...], dict[int, int]] = {}
        for position, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(self._user_state)[0]):
            owned = owner(path, leaf_by_path)
            if owned is not None:
                start, leaf = owned
                positions.setdefault(start, {})[leaf] = position
        return [
            (slot, held)
            for copy in positions.values()
            for slot in self.slots
            if (held := tuple(copy[leaf] for leaf in slot.leaves if leaf in copy))
        ]

    def _is_like(self, slot: Slot, leaf: Any) -> bool:
        """A moment of the parameter's shape lives where zero 1 says; anything else (factored moments) is whole."""
        return bool(leaf.shape == jax.tree.leaves(self.parameters)[slot.leaves[0]].shape)


def owner(path: Sequence[Any], parameters: Mapping[tuple[Any, ...], int]) -> tuple[tuple[Any, ...], int] | None:
    """Return (start of the path, parameter) of the parameter whose whole path ends ``path``, None when none does."""
    for k in range(len(path)):
        if (end := tuple(path[k:])) in parameters:
            return tuple(path[:k]), parameters[end]
    return None


def _in_turn(parts: Sequence[Sequence[_Stored]]) -> list[Group]:
    """Return the groups of several trees, numbered as the leaves of all of them one after another."""
    shifted, start = [], 0
    for part in parts:
        shifted += [Group(tuple(start + p for p in group.positions), group.is_stacked) for group, _ in part]
        start += sum(len(group.positions) for group, _ in part)
    return shifted


def _views(parts: Sequence[Sequence[_Stored]]) -> list[View | None]:
    """Return the view of each leaf of several trees, one after another."""
    by_tree = [{position: view for group, view in part for position in group.positions} for part in parts]
    return [views[position] for views in by_tree for position in sorted(views)]

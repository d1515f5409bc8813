"""Any optax transformation over stored arrays, with the numbers that it would give on the user's own tree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from ._slots import Slot, to_stored, to_user


@dataclasses.dataclass(frozen=True)
class StoredOptimizer:
    """An optimizer over the arrays of a stage's slots."""

    optimizer: optax.GradientTransformation
    parameters: Any
    """The user's parameters, abstract."""
    slots: tuple[Slot, ...]

    @functools.cached_property
    def abstract_user_state(self) -> Any:
        """Shape, dtype and place of each leaf of the optax state over the user's own tree."""
        state = jax.eval_shape(self.optimizer.init, self.parameters)
        leaf_places = {leaf: slot.leaf_sharding("optimizer") for slot in self.slots for leaf in slot.leaves}
        named = jax.tree_util.tree_flatten_with_path(self.parameters)[0]
        paths = {tuple(path): index for index, (path, _) in enumerate(named)}
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.parameters)]
        whole = self.slots[0].mesh.replicated

        def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            index = owner(path, paths)
            place: NamedSharding = whole if index is None or leaf.shape != shapes[index] else leaf_places[index]
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree_util.tree_map_with_path(placed, state)

    @property
    def abstract_state(self) -> Any:
        """Shape, dtype and place of each leaf of the stored state."""
        return self.abstract_user_state

    def init(self, parameters: Sequence[Any]) -> Any:
        """Return the fresh state for stored ``parameters``."""
        return self.optimizer.init(self._tree(parameters))

    def update(self, gradients: Sequence[Any], state: Any, parameters: Sequence[Any]) -> tuple[list[Any], Any]:
        """Return (new parameters, new state), all stored."""
        tree = self._tree(parameters)
        updates, state = self.optimizer.update(self._tree(gradients), state, tree)
        leaves = jax.tree.leaves(optax.apply_updates(tree, updates))
        return to_stored(self.slots, dict(enumerate(leaves))), state

    def to_user(self, state: Any) -> Any:
        """Return the optax state over the user's own tree."""
        return state

    def to_stored(self, state: Any) -> Any:
        """Return the stored form of an optax state over the user's own tree."""
        return state

    def _tree(self, arrays: Sequence[Any]) -> Any:
        leaves = to_user(self.slots, arrays)
        return jax.tree.unflatten(jax.tree.structure(self.parameters), [leaves[i] for i in range(len(leaves))])


def owner(path: Sequence[Any], parameters: Mapping[tuple[Any, ...], int]) -> int | None:
    """Return which parameter a leaf of an optax state belongs to: the one whose whole path ends the leaf's path."""
    return next((parameters[end] for k in range(len(path)) if (end := tuple(path[k:])) in parameters), None)

"""Rows: stacks of layers, taken apart.

``nnx.scan`` and ``nn.scan`` keep the parameters of n equal layers in arrays with a leading (or other) dimension n. The
cut program runs layer by layer, so it takes each layer's part as a leaf of its own, exactly as if the author had
written a list of layers. ``Rows`` says which leaves of the user's trees are taken apart, and goes both ways.

    user      {"blocks": {"kernel": [n, E, F]}}         program   {"blocks": {"kernel": ([E, F], ..., [E, F])}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._pure_model import PureModel, Role


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """A leaf that holds one row per layer."""

    axis: int
    """Dimension that counts the layers."""
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Which leaves of the user's parameters and state the program takes apart."""

    model: PureModel
    stacks: Mapping[int, Stack]
    """By position among the leaves of (parameters, state)."""
    parameters: Any
    """Abstract trained leaves of the program; a tuple of rows stands in the place of a stack."""
    state: Any
    """The same for all other leaves."""
    paths: tuple[str, ...]
    """Path of each leaf of ``parameters``: ``blocks.kernel[3]`` is row 3."""
    roles: tuple[Role, ...]
    """Role of each leaf of ``state``."""

    @classmethod
    def whole(cls, model: PureModel) -> Rows:
        """Take nothing apart."""
        return cls(model, {}, model.parameters, model.state, model.paths, model.roles)

    @classmethod
    def of(cls, model: PureModel, stacks: Mapping[int, Stack]) -> Rows:
        """Take ``stacks`` apart."""
        count = len(model.paths)
        row_paths = [
            [f"{path}[{row}]" for row in range(stacks[i].count)] if i in stacks else [path]
            for i, path in enumerate(model.paths)
        ]
        repeats = [stacks[count + i].count if count + i in stacks else 1 for i in range(len(model.roles))]
        row_roles = [[role] * times for role, times in zip(model.roles, repeats, strict=True)]
        bare = cls(model, stacks, None, None, (), ())
        parameters, state = jax.eval_shape(bare.apart, model.parameters, model.state)
        return cls(model, stacks, parameters, state, _flat(row_paths), _flat(row_roles))

    def apart(self, parameters: Any, state: Any) -> tuple[Any, Any]:
        """Return the program's (parameters, state) from the user's; runs under ``jax.jit``."""
        first = len(self.model.paths)
        return self._apart(parameters, 0), self._apart(state, first)

    def fresh_state(self) -> Any:
        """Return what the program keeps beside its parameters, as the model makes it; its parameters are not made."""
        if self.model.is_built:
            return self.apart(*self.model.build())[1]
        return jax.jit(lambda: self.apart(*self.model.build())[1])()

    def together(self, parameters: Any, state: Any) -> tuple[Any, Any]:
        """Return the user's (parameters, state) from the program's; runs under ``jax.jit``."""
        first = len(self.model.paths)
        structures = jax.tree.structure(self.model.parameters), jax.tree.structure(self.model.state)
        return self._together(parameters, structures[0], 0), self._together(state, structures[1], first)

    def _apart(self, tree: Any, first: int) -> Any:
        if not self.stacks:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, [self._rows(leaf, first + i) for i, leaf in enumerate(leaves)])

    def _rows(self, leaf: Any, position: int) -> Any:
        stack = self.stacks.get(position)
        return leaf if stack is None else tuple(row_of(leaf, stack.axis, row) for row in range(stack.count))

    def _together(self, tree: Any, structure: Any, first: int) -> Any:
        if not self.stacks:
            return tree
        parts = structure.flatten_up_to(tree)
        whole = [
            jnp.stack(part, axis=self.stacks[first + i].axis) if first + i in self.stacks else part
            for i, part in enumerate(parts)
        ]
        return jax.tree.unflatten(structure, whole)


def row_of(stack: Any, axis: int, row: int) -> Any:
    """Return one row of a stack of layers."""
    index: Sequence[Any] = (slice(None),) * axis + (row,)
    return stack[tuple(index)]


def _flat(nested: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(item for part in nested for item in part)

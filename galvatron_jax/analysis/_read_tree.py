"""Read a plain tree of parameters, the model of a pure ``loss(parameters, batch)``.

Floating-point arrays are trained; integer arrays, masks and random keys are state that no step changes; anything else
in the tree (functions, numbers, names: an Equinox module has such leaves) is part of the program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ._jaxpr import abstract, is_differentiable
from ._pure_model import Loss, PureModel, dotted


def read_tree(tree: Any, loss: Loss, recipe: Callable[[], Any] | None = None) -> PureModel:
    """Return a tree of parameters as a ``PureModel``.

    Args:
        tree: Concrete or abstract arrays in any pytree.
        loss: The user's loss.
        recipe: What builds it; None when ``tree`` itself has the values.
    """
    leaves: list[Any] = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    is_trained = [is_array(leaf) and is_differentiable(leaf.dtype) for leaf in leaves]
    is_kept = [is_array(leaf) and not trained for leaf, trained in zip(leaves, is_trained, strict=True)]

    def part(leaves: list[Any], chosen: list[bool]) -> Any:
        return jax.tree.unflatten(structure, [x if c else None for x, c in zip(leaves, chosen, strict=True)])

    def join(parameters: Any, state: Any) -> Any:
        trained, kept = (structure.flatten_up_to(half) for half in (parameters, state))
        parts = zip(leaves, trained, kept, is_trained, is_kept, strict=True)
        return jax.tree.unflatten(structure, [t if is_t else k if is_k else leaf for leaf, t, k, is_t, is_k in parts])

    def split(tree: Any) -> tuple[Any, Any]:
        found = structure.flatten_up_to(tree)
        return part(found, is_trained), part(found, is_kept)

    parameters, state = jax.tree.map(abstract, split(tree))
    return PureModel(
        name="model" if isinstance(tree, (dict, list, tuple)) else type(tree).__name__,
        parameters=parameters,
        state=state,
        paths=tuple(dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(parameters)[0]),
        roles=tuple("other" for _ in jax.tree.leaves(state)),
        run=lambda parameters, state, batch: (loss(join(parameters, state), batch), state),
        build=(lambda: split(tree)) if recipe is None else lambda: split(recipe()),
        is_built=recipe is None,
        restore=join,
    )


def is_array(value: Any) -> bool:
    """Tell whether ``value`` is an array, concrete or abstract."""
    return isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct, np.generic))

"""The state as a flat table of named arrays: what a checkpoint holds, whatever plan the state was under.

``parameters/layers/0/attention/query/kernel/value`` is the user's array in the user's shape. Random keys are stored as
their integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ...errors import ConfigError, UnsupportedError
from ...runtime import TrainState
from ._document import Checkpoint, Leaf

Leaves = dict[str, Any]

KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
"""Those of ``jax.random.key``."""

MOST_SHOWN = 8
"""Differences in a message."""


def name_leaves(state: TrainState) -> Leaves:
    """Return the leaves of ``state`` by path; abstract ones too."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def storable(leaves: Mapping[str, Any]) -> Leaves:
    """Return ``leaves`` (arrays or abstract ones) with random keys as integers."""
    return {name: _key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}


def rebuild(stored: Mapping[str, Any], abstract: TrainState) -> TrainState:
    """Return the state of the structure of ``abstract`` from stored leaves."""
    names = name_leaves(abstract)
    leaves = [_as_key(stored[name], leaf) if _is_key(leaf) else stored[name] for name, leaf in names.items()]
    state: TrainState = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return state


def describe_leaves(leaves: Mapping[str, Any]) -> dict[str, Leaf]:
    """Return shape and dtype of each stored leaf."""
    return {name: Leaf(shape=tuple(leaf.shape), dtype=str(leaf.dtype)) for name, leaf in leaves.items()}


def check_leaves(checkpoint: Checkpoint, wanted: Mapping[str, Leaf], *, where: str) -> None:
    """Check that a checkpoint holds the arrays of this model and optimizer.

    Raises:
        ConfigError: it does not; the message names the differences.
    """
    found = checkpoint.leaves
    differences = [f"{name}: missing in the checkpoint" for name in wanted if name not in found]
    differences += [f"{name}: not in this model or optimizer" for name in found if name not in wanted]
    differences += [
        f"{name}: {_text(found[name])} in the checkpoint, {_text(wanted[name])} in this model"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if differences:
        more = [f"and {len(differences) - MOST_SHOWN} more"] if len(differences) > MOST_SHOWN else []
        raise ConfigError(
            "it is of another model or optimizer:\n  - " + "\n  - ".join(differences[:MOST_SHOWN] + more),
            where=where,
            action="resume with the model and optimizer of the run, or start in another folder",
        )


def _text(leaf: Leaf) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _as_key(data: Any, abstract: jax.ShapeDtypeStruct) -> Any:
    """Return integers as random keys of the implementation that ``abstract`` has (its dtype alone does not name it)."""
    for name in KEY_IMPLEMENTATIONS:
        if jax.random.key(0, impl=name).dtype == abstract.dtype:
            return jax.random.wrap_key_data(data, impl=name)
    raise UnsupportedError(f"random keys of dtype {abstract.dtype}", expected=", ".join(KEY_IMPLEMENTATIONS))


def _key_data(leaf: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

"""Zero 1 and 2 gather updated parameters: layer by layer, into the arrays that held them before.

Gathered at once, a second copy of all parameters stands beside the (donated) old one: XLA gathers into a buffer of its
own, in another layout, and copies. In a loop over the layers of a run it is one layer's. Each row is pinned to the
order in which it is stored: the loop would else take the gather's layout for all rows, and be transposed behind it.
See docs/design/0055 and 0084.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding

from ._slots import Slot


def regather(slots: Sequence[Slot], updated: Sequence[Any], before: Sequence[Any]) -> list[Any]:
    """Return the updated parameters where parameters live.

    Args:
        slots: Of each stored array.
        updated: New values, where the optimizer state is.
        before: Old values, where parameters live: their memory is used again.
    """
    found = list(updated)
    runs: dict[tuple[int, int], list[int]] = {}
    for i, slot in enumerate(slots):
        if slot.is_stacked and slot.sharding("parameter") != slot.sharding("optimizer"):
            runs.setdefault((id(slot.layout), len(slot.leaves)), []).append(i)
    for (_, layers), members in runs.items():
        whole = _by_layer(
            [slots[i] for i in members], layers, [updated[i] for i in members], [before[i] for i in members]
        )
        for i, array in zip(members, whole, strict=True):
            found[i] = array
    return found


def _by_layer(slots: Sequence[Slot], layers: int, updated: Sequence[Any], before: Sequence[Any]) -> list[Any]:
    def layer(row: Any, whole: list[Any]) -> list[Any]:
        parts = [jax.lax.dynamic_index_in_dim(array, row, keepdims=False) for array in updated]
        parts = jax.lax.with_sharding_constraint(parts, [slot.leaf_sharding("parameter") for slot in slots])
        parts = [_in_order(part, slot.leaf_sharding("parameter")) for part, slot in zip(parts, slots, strict=True)]
        arrays = [
            jax.lax.dynamic_update_index_in_dim(array, part, row, 0) for array, part in zip(whole, parts, strict=True)
        ]
        return list(jax.lax.with_sharding_constraint(arrays, [slot.sharding("parameter") for slot in slots]))

    whole: list[Any] = jax.lax.fori_loop(0, layers, layer, list(before))
    return whole


def _in_order(array: Any, place: NamedSharding) -> Any:
    """Pin an array to row-major order: on every device for itself, for the partitioner would gather it whole first."""
    pinned: Any = jax.shard_map(
        lambda own: with_layout_constraint(own, Layout(tuple(range(own.ndim)))),
        mesh=place.mesh,
        in_specs=place.spec,
        out_specs=place.spec,
        check_vma=False,
    )
    return pinned(array)

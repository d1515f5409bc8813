"""Sums of gradients are reduced once a step, layer by layer.

Zero 1 scatters what all microbatches summed up (``_sums``) by a dimension of the layer's array that is not the first of
the stack. XLA scatters by the first one only: it transposes a copy of what it scatters, and reduces all stacks at once,
so that copies of the largest weights of *all* layers stood beside the sums. Zero 0 reduces into new arrays, all of them
beside the sums. In a loop over the layers of a run both are one layer's, and zero 0 reduces where the sums are: every
rank's copy (``_copies``) becomes the total, and stays a copy until ``united``. See docs/design/0084.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ._copies import Copies
from ._slots import Slot

SCOPE = "reduce_sums"
"""In the ``op_name`` of what runs layer by layer."""


def reduce_sums(slots: Sequence[Slot], sums: Sequence[Any], copies: Sequence[Copies | None]) -> list[Any]:
    """Return the reduced gradients, placed as ``reduced_shardings`` says.

    Args:
        slots: Of each stored array.
        sums: Gradients of what ``StageLayers.spread`` makes of the arrays.
        copies: Of each slot; None where there is one array for all ranks.
    """
    found = list(sums)
    runs: dict[tuple[int, int], list[int]] = {}
    for i, (slot, copy) in enumerate(zip(slots, copies, strict=True)):
        if copy is not None and slot.is_stacked:
            runs.setdefault((id(slot.layout), len(slot.leaves)), []).append(i)
        elif copy is not None:
            found[i] = copy.sum(sums[i], slot.leaf_sharding("optimizer"))
    for (_, layers), members in runs.items():
        stacks = [_Stack(slots[i], copy, slots[i].by_row(sums[i])) for i in members if (copy := copies[i]) is not None]
        for i, stack, array in zip(members, stacks, _by_layer(stacks, layers), strict=True):
            found[i] = slots[i].by_turn(array) if stack.stays else array
    return list(jax.lax.with_sharding_constraint(found, reduced_shardings(slots, copies)))


def reduced_shardings(slots: Sequence[Slot], copies: Sequence[Copies | None]) -> list[NamedSharding]:
    """Return where reduced gradients live: where the optimizer is, or (equal copies) where the sums were."""
    return [
        copy.place(slot.leaf_sharding("gradient"), lead=len(slot.lead))
        if copy is not None and _stays(slot)
        else slot.sharding("optimizer")
        for slot, copy in zip(slots, copies, strict=True)
    ]


def united(slots: Sequence[Slot], reduced: Sequence[Any], copies: Sequence[Copies | None]) -> list[Any]:
    """Return one array where there are equal copies: no bytes move."""
    return [
        _one_of_equal(slot, copy, array) if copy is not None and _stays(slot) else array
        for slot, array, copy in zip(slots, reduced, copies, strict=True)
    ]


def _stays(slot: Slot) -> bool:
    """Tell whether a slot is reduced where its sums are."""
    return slot.is_stacked and slot.leaf_sharding("optimizer") == slot.leaf_sharding("gradient")


def _one_of_equal(slot: Slot, copies: Copies, array: Any) -> Any:
    row = slot.leaf_sharding("gradient")
    one: Any = jax.shard_map(
        lambda own: jnp.squeeze(own, 1),
        mesh=row.mesh,
        in_specs=copies.place(row, lead=1).spec,
        out_specs=PartitionSpec(None, *row.spec),
        check_vma=False,  # that the copies are equal is ours to know
    )
    return one(slot.by_row(array))


class _Stack:
    """The sums of one parameter of all layers of a run."""

    def __init__(self, slot: Slot, copies: Copies, rows: Any) -> None:
        self.slot, self.copies, self.rows, self.stays = slot, copies, rows, _stays(slot)
        self.place = copies.place(slot.leaf_sharding("gradient"), lead=1) if self.stays else slot.sharding("optimizer")

    @property
    def start(self) -> Any:
        """What the rows are written to."""
        rows = self.rows if self.stays else jnp.zeros((self.rows.shape[0], *self.rows.shape[2:]), self.rows.dtype)
        return jax.lax.with_sharding_constraint(rows, self.place)

    def reduced(self, row: Any, so_far: Any) -> Any:
        """Return the reduced gradient of one layer."""
        place = self.slot.leaf_sharding("optimizer")
        source = so_far if self.stays else self.rows
        total = self.copies.sum(jax.lax.dynamic_index_in_dim(source, row, keepdims=False), place)
        return self.copies.spread(total, place) if self.stays else total


def _by_layer(stacks: Sequence[_Stack], layers: int) -> list[Any]:
    def layer(row: Any, so_far: list[Any]) -> list[Any]:
        parts = [stack.reduced(row, array) for stack, array in zip(stacks, so_far, strict=True)]
        arrays = [
            jax.lax.dynamic_update_index_in_dim(array, part, row, 0) for array, part in zip(so_far, parts, strict=True)
        ]
        return list(jax.lax.with_sharding_constraint(arrays, [stack.place for stack in stacks]))

    with jax.named_scope(SCOPE):
        found: list[Any] = jax.lax.fori_loop(0, layers, layer, [stack.start for stack in stacks])
    return found

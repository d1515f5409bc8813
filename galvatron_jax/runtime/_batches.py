"""How a global batch gets onto the devices: by microbatch, and only the rows that a process's devices read.

Row ``m * size + i`` of the global batch is sample ``i`` of microbatch ``m``. On the devices a leaf is
[microbatches, size, ...], sharded along dimension 1 as the layer that reads it first wants; where a step has one
microbatch and no loop over them, it is [size, ...]. A leaf without samples (class weights, a temperature) goes whole to
every microbatch; a random key too, but for microbatch m > 0 with m folded in, so that no two draw the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The rows of a global batch."""

    global_batch: int
    microbatches: int
    stacked: bool
    """Leaves have a leading dimension for the microbatches."""
    has_samples: tuple[bool, ...]
    """Which batch leaves have the batch as their dimension 0."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Leading dimensions of a leaf on the devices."""
        size = self.global_batch // self.microbatches
        return (self.microbatches, size) if self.stacked else (size,)

    def read_by(self, places: Iterable[tuple[int, NamedSharding]]) -> tuple[int, ...]:
        """Return the global rows that this process's devices read, ascending.

        Args:
            places: Position of each batch leaf, and where it lives.
        """
        rows = np.arange(self.global_batch).reshape(self.grid)
        read: set[int] = set()
        for place in (place for leaf, place in places if self.has_samples[leaf]):
            leading = NamedSharding(place.mesh, jax.sharding.PartitionSpec(*place.spec[: rows.ndim]))
            for index in leading.addressable_devices_indices_map(rows.shape).values():
                read.update(rows[index].ravel().tolist())
        return tuple(sorted(read))

    def place(self, number: int, leaf: Any, place: NamedSharding, rows: Sequence[int]) -> jax.Array:
        """Put one leaf on the devices.

        Args:
            number: Its position among the batch leaves.
            leaf: The whole batch, or only ``rows`` of it, along dimension 0; a leaf without samples as it is.
            place: Where it is to live.
            rows: The rows that this process's devices read (``read_by``).
        """
        if not self.has_samples[number]:
            return self._place_whole(leaf, place)
        shape = (*self.grid, *leaf.shape[1:])
        if place.is_fully_addressable and leaf.shape[0] == self.global_batch:
            placed: jax.Array = jax.device_put(leaf.reshape(shape), place)
            return placed
        given, position = np.asarray(leaf), np.full(self.global_batch, -1)
        position[list(rows) if len(given) < self.global_batch else slice(None)] = np.arange(len(given))
        position = position.reshape(self.grid)

        def shard(index: Any) -> np.ndarray[Any, Any]:
            found = position[index[: position.ndim]]
            assert found.min(initial=0) >= 0, "read_by names every row that a device reads"
            part: np.ndarray[Any, Any] = given[found][(*[slice(None)] * position.ndim, *index[position.ndim :])]
            return part

        return jax.make_array_from_callback(shape, place, shard)

    def _place_whole(self, leaf: Any, place: NamedSharding) -> jax.Array:
        """Put a leaf without samples on the devices: once, or once per microbatch."""
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys = [jax.random.fold_in(leaf, m) if m else leaf for m in range(self.microbatches)]
            placed: jax.Array = jax.device_put(jnp.stack(keys) if self.stacked else keys[0], place)
            return placed
        whole = np.broadcast_to(np.asarray(leaf), (*self.grid[:-1], *np.shape(leaf)))
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

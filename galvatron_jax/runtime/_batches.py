"""How a global batch gets onto the devices: by microbatch, and only the rows that a process's devices read.

Row ``m * size + i`` of the global batch is sample ``i`` of microbatch ``m``. On the devices a leaf is
[microbatches, size, ...], sharded along dimension 1 as the layer that reads it first wants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The rows of a global batch."""

    global_batch: int
    microbatches: int

    @property
    def size(self) -> int:
        """Samples of one microbatch."""
        return self.global_batch // self.microbatches

    def read_by(self, places: Iterable[NamedSharding]) -> tuple[int, ...]:
        """Return the global rows that this process's devices read, ascending.

        Args:
            places: Where batch leaves, [microbatches, size, ...], live.
        """
        samples: set[int] = set()
        for place in places:
            for index in place.addressable_devices_indices_map(
                (self.microbatches, self.size)[: len(place.spec)]
            ).values():
                samples.update(range(self.size)[index[1]] if index is not None and len(index) > 1 else range(self.size))
        return tuple(m * self.size + i for m in range(self.microbatches) for i in sorted(samples))

    def place(self, leaf: Any, place: NamedSharding, rows: Sequence[int]) -> jax.Array:
        """Put one leaf on the devices.

        Args:
            leaf: The whole batch, or only ``rows`` of it, along dimension 0; a scalar is put everywhere.
            place: Where [microbatches, size, ...] lives.
            rows: The rows that this process's devices read (``read_by``).
        """
        shape = (self.microbatches, self.size, *leaf.shape[1:])
        if place.is_fully_addressable and leaf.shape[0] == self.global_batch:
            placed: jax.Array = jax.device_put(leaf.reshape(shape), place)
            return placed
        given = np.asarray(leaf)
        number = np.arange(self.global_batch) if given.shape[0] == self.global_batch else np.asarray(rows)
        position = np.full(self.global_batch, -1)
        position[number] = np.arange(len(number))

        def shard(index: Any) -> np.ndarray[Any, Any]:
            found = position.reshape(self.microbatches, self.size)[index[:2]]
            assert found.min(initial=0) >= 0, "read_by names every row that a device reads"
            part: np.ndarray[Any, Any] = given[found][(slice(None), slice(None), *index[2:])]
            return part

        return jax.make_array_from_callback(shape, place, shard)

"""The exchange of small vectors between all stages: every stage gives one, every stage gets all.

One all-gather over the mesh of the whole cluster, in which each slice of devices is a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._links import PIPE
from ._mesh import StageMesh
from ._placing import is_here, restrict

Vectors = list[Any]


class Exchange:
    """All slices of a pipeline."""

    def __init__(self, slices: Sequence[StageMesh]) -> None:
        """Build the mesh of all slices."""
        self._slices = list(slices)
        names = (PIPE, *slices[0].mesh.axis_names)
        grid = np.stack([stage.mesh.devices for stage in slices])
        self._mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding that puts a whole copy on every device of every slice."""
        return NamedSharding(self._mesh, PartitionSpec())

    def gather(self, vectors: Sequence[Any]) -> list[Vectors | None]:
        """Return, for each slice of this process (None for others), the vectors of all stages.

        Args:
            vectors: One of shape [1, n] for each stage, replicated on its slice; None for stages of other processes.
                Stages at the same place of their slices (one chunk) have equal n.

        Returns:
            One array [slices, n] for each chunk.
        """
        count = len(self._slices)
        rows = NamedSharding(self._mesh, PartitionSpec(PIPE))
        chunks = [vectors[first : first + count] for first in range(0, len(vectors), count)]
        joined = []
        for chunk in chunks:
            local = [vector for vector in chunk if vector is not None]
            shards = [shard.data for vector in local for shard in vector.addressable_shards]
            joined.append(jax.make_array_from_single_device_arrays((count, *local[0].shape[1:]), rows, shards))
        everywhere = self._gather(joined)
        return [self._on_slice(stage, everywhere) for stage in self._slices]

    @functools.cached_property
    def _gather(self) -> Callable[[Vectors], Vectors]:
        return jax.jit(lambda arrays: arrays, out_shardings=self.everywhere)

    def _on_slice(self, stage: StageMesh, arrays: Vectors) -> Vectors | None:
        place = stage.replicated
        return [restrict(array, place) for array in arrays] if is_here(place) else None

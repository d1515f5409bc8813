"""The exchange of small vectors between all stages: every stage gives one, every stage gets all.

One all-gather over the mesh of the whole cluster, in which each slice of devices is a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._links import PIPE
from ._mesh import StageMesh
from ._placing import is_here, key_data, named, restrict

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

    def spread(self, leaf: jax.Array) -> jax.Array:
        """Return a copy of an array of one slice that is spread over the devices of all slices.

        Its first dimension that the number of slices still divides is sharded over them too, so that a device holds no
        more than its part of the model; an array without one is copied to every slice. All processes call it.
        """
        place = NamedSharding(self._mesh, self._over_slices(leaf.shape, named(leaf)))
        if place.is_fully_addressable:
            moved: jax.Array = jax.device_put(leaf, place, may_alias=False)
            return moved
        return self._from_slice(leaf, place)

    def _over_slices(self, shape: tuple[int, ...], place: Any) -> PartitionSpec:
        spec = [*place.spec, *[None] * (len(shape) - len(place.spec))]
        for dim, size in enumerate(place.shard_shape(shape)):
            if size % len(self._slices) == 0:
                axes = () if spec[dim] is None else (spec[dim],) if isinstance(spec[dim], str) else spec[dim]
                return PartitionSpec(*spec[:dim], (*axes, PIPE), *spec[dim + 1 :])
        return PartitionSpec(*spec)

    def _from_slice(self, leaf: jax.Array, place: NamedSharding) -> jax.Array:
        """Spread across processes: stacked over the slices, of which all but one bring zeros, and summed."""
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if is_key:
            data = self._from_slice(key_data(leaf), NamedSharding(self._mesh, PartitionSpec()))
            key: jax.Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            return key
        stacked = NamedSharding(self._mesh, PartitionSpec(PIPE, *named(leaf).spec))
        shards = [shard.data[None] for shard in leaf.addressable_shards]
        own = leaf.sharding.shard_shape(leaf.shape)
        for stage in self._slices:
            if stage.mesh != named(leaf).mesh:
                here = stage.replicated.addressable_devices
                shards += [jax.device_put(jnp.zeros((1, *own), leaf.dtype), device) for device in here]
        joined = jax.make_array_from_single_device_arrays((len(self._slices), *leaf.shape), stacked, shards)
        whole: jax.Array = jax.jit(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), out_shardings=place)(joined)
        return whole

    @functools.cached_property
    def _gather(self) -> Callable[[Vectors], Vectors]:
        return jax.jit(lambda arrays: arrays, out_shardings=self.everywhere)

    def _on_slice(self, stage: StageMesh, arrays: Vectors) -> Vectors | None:
        place = stage.replicated
        return [restrict(array, place) for array in arrays] if is_here(place) else None

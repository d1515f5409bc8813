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

from ._links import PIPE, LinkName, connect
from ._mesh import StageMesh
from ._placing import is_here, key_data, named, remote_array, restrict
from ._turns import in_turn

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
        everywhere = [in_turn(self._gather(array)) for array in joined]  # one by one: see _links._permute
        return [self._on_slice(stage, everywhere) for stage in self._slices]

    def spread_place(self, leaf: Any) -> NamedSharding:
        """Return where ``spread`` puts an array of one slice.

        Its first whole dimension that the number of slices divides is sharded over them, so that a device holds no more
        than its part of the model; an array without one, and random keys, are copied to every slice.

        Args:
            leaf: Its shape, dtype and sharding.
        """
        if _is_key(leaf):
            return self.everywhere
        spec = [*leaf.sharding.spec, *[None] * (len(leaf.shape) - len(leaf.sharding.spec))]
        count = len(self._slices)
        cut = next((d for d, size in enumerate(leaf.shape) if spec[d] is None and size % count == 0), None)
        if cut is not None:
            spec[cut] = PIPE
        return NamedSharding(self._mesh, PartitionSpec(*spec))

    def spread(self, leaf: jax.Array, link: LinkName) -> jax.Array:
        """Return a copy of an array of one slice that is spread over the devices of all slices; all processes call it.

        An array that is on all of them already is returned as it is.
        """
        if named(leaf).mesh == self._mesh:
            return leaf
        if _is_key(leaf):
            words = self._spread(key_data(leaf), None, self.everywhere, link)
            keys: jax.Array = jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
            return keys
        place = self.spread_place(leaf)
        cut = next((d for d, axis in enumerate(place.spec) if axis == PIPE), None)
        return self._spread(leaf, cut, place, link)

    def collect(self, leaf: jax.Array, place: NamedSharding) -> jax.Array:
        """Return a spread array on the slice of ``place``, a handle in a process without it; all processes call it.

        For a moment every slice holds the whole of this one array, as ``place`` shards it.
        """
        if named(leaf).mesh != self._mesh or place.mesh == self._mesh:
            return leaf
        if _is_key(leaf):
            words = self.collect(key_data(leaf), NamedSharding(place.mesh, PartitionSpec()))
            keys: jax.Array = jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
            return keys
        whole = in_turn(_copier(NamedSharding(self._mesh, place.spec))(leaf))
        if is_here(place):
            return restrict(whole, place)
        return remote_array(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))

    def _spread(self, leaf: jax.Array, cut: int | None, place: NamedSharding, link: LinkName) -> jax.Array:
        parts = [self._part(leaf, number, cut, link) for number in range(len(self._slices))]
        shards = [shard.data for part in parts if part is not None for shard in part.addressable_shards]
        spread: jax.Array = jax.make_array_from_single_device_arrays(leaf.shape, place, shards)
        return spread

    def _part(self, leaf: jax.Array, slice_: int, cut: int | None, link: LinkName) -> jax.Array | None:
        """Send a slice its part of an array of another one; None in a process without the slice."""
        place, count = named(leaf), len(self._slices)
        shape = [size // count if d == cut else size for d, size in enumerate(leaf.shape)]
        source = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
        target = self._slices[slice_].sharding(place.spec)
        part = in_turn(_take(place)(leaf, slice_, cut, shape)) if is_here(place) else None
        if target == place:
            return part
        wanted = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=target)
        arrived = connect([source], [wanted], link).send(None if part is None else [part])
        return None if arrived is None else arrived[0]

    @functools.cached_property
    def _gather(self) -> Callable[[jax.Array], jax.Array]:
        return _copier(self.everywhere)

    def _on_slice(self, stage: StageMesh, arrays: Vectors) -> Vectors | None:
        place = stage.replicated
        return [restrict(array, place) for array in arrays] if is_here(place) else None


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


@functools.cache
def _copier(place: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=place)


@functools.cache
def _take(place: NamedSharding) -> Callable[..., jax.Array]:
    """Return the compiled function that copies a part of an array along one dimension (the whole for None)."""

    def take(array: jax.Array, number: int, cut: int | None, shape: tuple[int, ...]) -> jax.Array:
        start = [number * shape[d] if d == cut else 0 for d in range(array.ndim)]
        return jax.lax.dynamic_slice(array, start, shape)

    program = jax.jit(take, static_argnums=(2, 3), out_shardings=place)
    return lambda array, number, cut, shape: program(array, number, cut, tuple(shape))

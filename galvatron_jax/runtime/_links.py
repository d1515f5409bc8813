"""Links: how arrays get from the devices of one stage to those of its neighbour.

Both ends have equal meshes and equal specs, so every device hands its shard to the device in the same place; layouts
change inside the stages' programs, never on the way.

* ``PutLink``: ``jax.device_put``, the link inside a process. Across processes it is a choice for GPUs, where the CUDA
  plugin has its own transfers (not tried on GPUs; CPU refuses it).
* ``UnionLink``: one compiled ``ppermute`` over the union of both meshes, the link across processes, with no more than
  the collectives that XLA has anyway (gloo on CPU, NCCL on GPU). It is a rendezvous: every process of either stage
  calls it, in the global order (see ``_events``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._placing import is_here, remote_array
from ._turns import in_turn

Arrays = list[Any]

LinkName = Literal["union", "device_put"]
"""Which link crosses processes."""

PIPE = "pipe"
"""Mesh axis over which stages are stacked."""


class Link(Protocol):
    """A one-way connection between two stages for a fixed list of arrays."""

    def send(self, arrays: Arrays | None) -> Arrays | None:
        """Move arrays; both ends call it.

        Args:
            arrays: On the source, None in a process that has none of its devices.

        Returns:
            The arrays on the target, None in a process that has none of its devices.
        """


def connect(source: Sequence[Any], target: Sequence[Any], across: LinkName = "union") -> Link:
    """Return the link for arrays like ``source`` to places like ``target``.

    Args:
        source: ``jax.ShapeDtypeStruct`` with shardings on the source's mesh.
        target: The same shapes and specs on the target's mesh.
        across: The link to take when the two have devices in several processes.
    """
    if not source or source[0].sharding.mesh == target[0].sharding.mesh:
        return _Same()
    processes = {d.process_index for array in (source[0], target[0]) for d in array.sharding.device_set}
    if len(processes) > 1 and across == "device_put":
        return PutLink(source, target)
    if jax.process_index() not in processes:
        return _Elsewhere()
    return PutLink(source, target) if len(processes) == 1 else UnionLink(source, target)


class _Same:
    """Both stages are on the same devices (or nothing moves)."""

    def send(self, arrays: Arrays | None) -> Arrays | None:
        """Hand the arrays on."""
        return arrays


class _Elsewhere:
    """Neither stage has a device in this process."""

    def send(self, arrays: Arrays | None) -> Arrays | None:
        """Have no part in it."""
        return None


class PutLink:
    """``jax.device_put``."""

    def __init__(self, source: Sequence[Any], target: Sequence[Any]) -> None:
        """Keep the places of ``target``, and how arrays of other processes look."""
        self._source = list(source)
        self._places = [array.sharding for array in target]
        self._receives = is_here(self._places[0])

    def send(self, arrays: Arrays | None) -> Arrays | None:
        """Move the arrays; the call returns before they are there."""
        if arrays is None:
            arrays = [remote_array(array) for array in self._source]
        moved: Arrays = jax.device_put(arrays, self._places)
        return moved if self._receives else None


class UnionLink:
    """A ``ppermute`` over the union of two meshes.

    The union array has twice the rows: the first half is the source's, the second the target's. A device's shard of it
    is its shard of the sent array, so nothing is copied on the way in or out.
    """

    def __init__(self, source: Sequence[Any], target: Sequence[Any]) -> None:
        """Build the program (compiled at the first call) and the rows that the target brings to it."""
        meshes = [arrays[0].sharding.mesh for arrays in (source, target)]
        names = (PIPE, *meshes[0].axis_names)
        union = Mesh(np.stack([m.devices for m in meshes]), names, axis_types=(AxisType.Auto,) * len(names))
        self._source, self._target = [_with_rows(a) for a in source], [_with_rows(a) for a in target]
        self._scalars = [not array.shape for array in source]
        specs = [_stacked(array.sharding.spec) for array in self._source]
        self._union = [
            jax.ShapeDtypeStruct((2 * a.shape[0], *a.shape[1:]), a.dtype, sharding=NamedSharding(union, spec))
            for a, spec in zip(self._source, specs, strict=True)
        ]
        self._move = _mover(union, tuple(specs))
        self._empty = [_zero_shards(array) for array in self._target]

    def send(self, arrays: Arrays | None) -> Arrays | None:
        """Move the arrays; returns before they are there, but the devices wait for each other."""
        joined = []
        for position, union in enumerate(self._union):
            shards = list(self._empty[position])
            if arrays is not None:
                array = arrays[position][None] if self._scalars[position] else arrays[position]
                shards += _shards(array)
            joined.append(jax.make_array_from_single_device_arrays(union.shape, union.sharding, shards))
        moved = in_turn(self._move(joined))
        if not self._empty[0]:
            return None
        received = [_target_rows(array, target) for array, target in zip(moved, self._target, strict=True)]
        return [array[0] if scalar else array for array, scalar in zip(received, self._scalars, strict=True)]


@functools.cache
def _mover(union: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[[Arrays], Arrays]:
    """Return the program of a link; links of equal ends share one."""
    parts = list(specs)
    return jax.jit(jax.shard_map(_permute, mesh=union, in_specs=(parts,), out_specs=parts, check_vma=False))


def _permute(shards: Arrays) -> Arrays:
    """Send the shards of one device to its partner, in one message.

    Several permutes in one program need not start in the same order on all devices: gloo then takes one for another.
    """
    if len(shards) == 1:
        return [jax.lax.ppermute(shards[0], PIPE, [(0, 1)])]
    moved = jax.lax.ppermute(jnp.concatenate([_to_bytes(shard) for shard in shards]), PIPE, [(0, 1)])
    ends = np.cumsum([shard.size * shard.dtype.itemsize for shard in shards])
    return [_from_bytes(part, shard) for part, shard in zip(jnp.split(moved, ends[:-1]), shards, strict=True)]


def _to_bytes(shard: Any) -> Any:
    if shard.dtype == jnp.bool_:
        return jnp.ravel(shard.astype(jnp.uint8))
    return jnp.ravel(jax.lax.bitcast_convert_type(shard, jnp.uint8))


def _from_bytes(data: Any, like: Any) -> Any:
    if like.dtype == jnp.bool_:
        return data.reshape(like.shape).astype(jnp.bool_)
    width = like.dtype.itemsize
    return jax.lax.bitcast_convert_type(data.reshape(*like.shape, *([width] if width > 1 else [])), like.dtype)


def _with_rows(array: Any) -> jax.ShapeDtypeStruct:
    """Give a scalar a dimension to be stacked along."""
    shape, place = array.shape or (1,), array.sharding
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=place)


def _stacked(spec: PartitionSpec) -> PartitionSpec:
    """Return ``spec`` with the stages before all other axes of dimension 0."""
    first, rest = (spec[0], spec[1:]) if len(spec) else (None, ())
    axes = () if first is None else (first,) if isinstance(first, str) else tuple(first)
    return PartitionSpec((PIPE, *axes), *rest)


def _zero_shards(array: Any) -> Arrays:
    """Return zeros for the shards of this process's devices."""
    shape = array.sharding.shard_shape(array.shape)
    return [jax.device_put(jnp.zeros(shape, array.dtype), d) for d in _local_devices(array.sharding)]


def _local_devices(place: NamedSharding) -> list[Any]:
    return sorted(place.addressable_devices, key=lambda device: device.id)


def _shards(array: jax.Array) -> Arrays:
    return [shard.data for shard in array.addressable_shards]


def _target_rows(array: jax.Array, target: Any) -> jax.Array:
    """Return the target's rows of a union array."""
    here = target.sharding.addressable_devices
    shards = [shard.data for shard in array.addressable_shards if shard.device in here]
    part: jax.Array = jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)
    return part

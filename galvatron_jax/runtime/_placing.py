"""Arrays of a model whose parts live on different devices, in one or many processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True, slots=True)
class UnreadArray:
    """An array whose values are somewhere else (on disk): each device is given its own part, nobody holds the whole."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[Any], np.ndarray[Any, Any]]
    """Returns the part that a tuple of slices names."""


def adopt_leaf(value: Any, place: NamedSharding) -> jax.Array:
    """Copy a value that every process has whole to where it belongs; the caller's buffer is never shared.

    Args:
        value: A host array, a device array that this process can read, or an ``UnreadArray``.
        place: Of a sharding with at least one device in this process.
    """
    if isinstance(value, UnreadArray):
        return jax.make_array_from_callback(value.shape, place, value.read)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = adopt_leaf(jax.random.key_data(value), place)
        key: jax.Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
        return key
    if place.is_fully_addressable:
        # The copy comes first: device_put makes the caller's buffer a shard of the result where the caller's device
        # holds the whole array, whatever ``may_alias`` says (jax 0.10.2), and donating the result would delete it.
        copy: jax.Array = jax.device_put(jnp.copy(value), place)
        return copy
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def everywhere(parts: Sequence[jax.Array], place: NamedSharding) -> jax.Array:
    """Return a replicated array from equal ones on parts of its devices.

    Args:
        parts: Replicated arrays of equal value; together they have all devices of ``place`` in this process.
        place: Replicated over all devices.
    """
    shards = {shard.device: shard.data for part in parts for shard in part.addressable_shards}
    whole: jax.Array = jax.make_array_from_single_device_arrays(parts[0].shape, place, list(shards.values()))
    return whole


def restrict(array: jax.Array, place: NamedSharding) -> jax.Array:
    """Return the shards of ``array`` on the devices of ``place`` as an array of their own; no copy is made."""
    here = place.addressable_devices
    shards = [shard.data for shard in array.addressable_shards if shard.device in here]
    part: jax.Array = jax.make_array_from_single_device_arrays(array.shape, place, shards)
    return part


def remote_array(array: Any) -> jax.Array:
    """Return a handle of an array none of whose devices this process has.

    Args:
        array: Its shape, dtype and sharding.
    """
    handle: jax.Array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, [], dtype=array.dtype)
    return handle


def key_data(keys: jax.Array) -> jax.Array:
    """Return the words of random keys, where the keys are."""
    place = NamedSharding(named(keys).mesh, PartitionSpec())
    if not is_here(place):
        words = jax.eval_shape(jax.random.key_data, keys)
        return remote_array(jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=place))
    data: jax.Array = jax.jit(jax.random.key_data, out_shardings=place)(keys)
    return data


def named(array: jax.Array) -> NamedSharding:
    """Return where an array of ours lives: always a named sharding."""
    place = array.sharding
    assert isinstance(place, NamedSharding), "the runtime places arrays on meshes"
    return place


def is_here(place: NamedSharding) -> bool:
    """Tell whether this process has a device of ``place``."""
    return bool(place.addressable_devices)


def process_indexes(place: NamedSharding) -> frozenset[int]:
    """Return which processes have a device of ``place``."""
    devices: set[Any] = place.device_set
    return frozenset(device.process_index for device in devices)

"""Programs that repeat a step on all devices at once, as often as their first argument says.

The loop is a ``fori_loop`` inside ``shard_map``, each device with its own arrays. The state of one step is the input of
the next, with an ``optimization_barrier`` between them, so no step can be dropped, moved out or merged.

On GPUs the trip count is read back by the host before each trip (10 to 20 us); several operations in one trip share
that cost, and what is left is measured with a loop of one tiny kernel and subtracted. An even number of them also
spares the copy that carries a result back to where the next trip reads it (programs compiled for H200, jax 0.10.2:
none for two or more).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from ._timing import MeasurementError

BEFORE, GROUP, AFTER = "before", "group", "after"
"""Mesh axes: which of the groups, which member, and again which of the groups (the devices between two members)."""

LOCAL = PartitionSpec((BEFORE, GROUP, AFTER))
"""Each device holds its own part of the first dimension."""

_STEPS, _SMALL_STEPS = 2, 8
"""Steps in one trip: two spare a copy, eight share the 10 to 20 us that a GPU's host takes for each trip. A CPU's loop
costs nothing: there longer programs only take longer to compile, and one large collective over its network is long."""

State = tuple[jax.Array, ...]
Step = Callable[..., State]
"""From the arrays of one device to arrays of the same shapes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """An array that every device has one of."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    noise: bool = False
    """Varied values, not zeros: a product of zeros draws less power, so a GPU runs it faster than any real one."""
    below: int = 0
    """Of integers: scattered from 0 to below this, as rows of a table are looked up; booleans are true."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A compiled loop with its arrays in place."""

    run: Callable[[int], None]
    """Call it with a number of trips, return when all local devices are done."""
    text: str
    """The compiled module."""
    operations: int = 1
    """Operations in one trip."""
    glue: int = 0
    """Tiny kernels that each operation brings along to feed its result to the next."""
    products: int = 0
    """Products beside each all-reduce (overlap only)."""
    flops: float = 0.0
    """Of one trip on one device, as the compiler counts them (the body of a loop once)."""


def group_mesh(devices: Sequence[jax.Device], size: int, stride: int) -> Mesh:
    """Return a mesh whose ``GROUP`` axis holds every ``stride``-th device, ``size`` of them."""
    grid = np.array(devices, dtype=object).reshape(len(devices) // (size * stride), size, stride)
    return Mesh(grid, (BEFORE, GROUP, AFTER), axis_types=(AxisType.Auto,) * 3)


def steps_in_trip(devices: Sequence[jax.Device], *, small: bool) -> int:
    """Return how many steps one trip should have; ``small``: so quick that the loop itself would be felt."""
    if platform_of(devices) == "cpu":
        return _STEPS if small else 1
    return _SMALL_STEPS if small else _STEPS


def platform_of(devices: Sequence[jax.Device]) -> str:
    """Return ``"cpu"`` or ``"gpu"``."""
    return "cpu" if devices[0].platform == "cpu" else "gpu"


def compile_loop(step: Step, operands: Sequence[Operand], mesh: Mesh, *, unroll: int = 1) -> Loop:
    """Return the loop of ``step``, compiled, its arrays on the devices.

    Args:
        step: Traced inside ``shard_map``; sees one device's arrays and the axes of ``mesh``.
        operands: Arrays that ``step`` takes and returns.
        mesh: From ``group_mesh``.
        unroll: Steps in one trip.

    Raises:
        MeasurementError: the devices have not enough memory.
    """
    specs = (LOCAL,) * len(operands)
    program = jax.shard_map(
        _repeat(step, unroll), mesh=mesh, in_specs=(PartitionSpec(), *specs), out_specs=specs, check_vma=False
    )
    try:
        arrays = jax.block_until_ready(_fill(operands, mesh))
        compiled = jax.jit(program).lower(np.int32(0), *arrays).compile()
    except jax.errors.JaxRuntimeError as error:
        raise _device_error(error) from None

    def run(trips: int) -> None:
        try:
            jax.block_until_ready(compiled(np.int32(trips), *arrays))
        except jax.errors.JaxRuntimeError as error:
            raise _device_error(error) from None

    return Loop(run=run, text=compiled.as_text() or "", operations=unroll, flops=_flops(compiled))


def _repeat(step: Step, unroll: int) -> Callable[..., State]:
    def trip(_: jax.Array, state: State) -> State:
        for _step in range(unroll):
            state = lax.optimization_barrier(step(*state))
        return state

    def program(trips: jax.Array, *state: jax.Array) -> State:
        result: State = lax.fori_loop(0, trips, trip, state)
        return result

    return program


def _fill(operands: Sequence[Operand], mesh: Mesh) -> State:
    """Create the arrays on their devices, without a copy on the host."""

    def create() -> State:
        return tuple(_values(operand) for operand in operands)

    program = jax.shard_map(create, mesh=mesh, in_specs=(), out_specs=(LOCAL,) * len(operands), check_vma=False)
    created: State = jax.jit(program)()
    return created


def _values(operand: Operand) -> jax.Array:
    if not (operand.noise or operand.below):
        return jnp.zeros(operand.shape, operand.dtype)
    if operand.dtype == "bool":
        return jnp.ones(operand.shape, bool)
    bits = _hash(operand.shape)
    if operand.below:
        return (bits % np.uint32(operand.below)).astype(operand.dtype)
    # variance 1/2; scaled so that products keep their size
    uniform = bits.astype(jnp.float32) * (2 / 2**32) - 1
    return (uniform * math.sqrt(1.5 / max(1, operand.shape[0]))).astype(operand.dtype)


def _hash(shape: Sequence[int]) -> jax.Array:
    """32 scattered bits for each place: the finaliser of MurmurHash3 (Appleby) over the place's number."""
    bits = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        bits = bits * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))


def _flops(compiled: Any) -> float:
    """Return what the compiler's own cost analysis counts, 0 where it has none."""
    counted = compiled.cost_analysis() or {}
    return max(0.0, float(counted.get("flops", 0.0)))


def _device_error(error: Exception) -> MeasurementError:
    reason = str(error).strip().splitlines()[0][:200]
    return MeasurementError(f"the devices refused the program: {reason}", action="skipped")

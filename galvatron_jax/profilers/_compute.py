"""Kernels as steps of a loop: a launch, a copy, a product, products beside an all-reduce.

All devices work at the same time, as in training: virtual devices of one host share its cores, GPUs share power.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax import lax

from ._hlo import count_in_loop, kernels_in_loop
from ._loop import GROUP, Loop, Operand, State, compile_loop, group_mesh, steps_in_trip
from ._timing import MeasurementError

_TINY = 128
_SMALL_SIDE = 1024

_ITEM_BYTES = 4


def launch_loop(devices: Sequence[jax.Device], kernels: int) -> Loop:
    """Return a loop of kernels that add 1 to a few numbers: one to time the loop itself, many to time a kernel.

    XLA:GPU keeps one kernel for each, XLA:CPU fuses them into one: ``operations`` is what the compiled program has.
    """
    mesh = group_mesh(devices, len(devices), 1)
    loop = compile_loop(lambda x: (x + 1,), [Operand(shape=(_TINY,))], mesh, unroll=kernels)
    counting = 1
    return dataclasses.replace(loop, operations=max(1, kernels_in_loop(loop.text) - counting))


def copy_loop(size_bytes: int, devices: Sequence[jax.Device]) -> Loop:
    """Return a loop of x + 1 over ``size_bytes`` on each device: that many bytes read and as many written."""
    operand = Operand(shape=(size_bytes // _ITEM_BYTES,))
    return compile_loop(lambda x: (x + 1,), [operand], group_mesh(devices, len(devices), 1))


def product_loop(side: int, dtype: str, devices: Sequence[jax.Device]) -> Loop:
    """Return a loop of products of two square matrices, each with a kernel that feeds one element of it to the next."""
    operands = [Operand(shape=(side, side), dtype=dtype, noise=True)] * 2
    unroll = steps_in_trip(devices, small=side <= _SMALL_SIDE)
    loop = compile_loop(product, operands, group_mesh(devices, len(devices), 1), unroll=unroll)
    return dataclasses.replace(loop, glue=1)


def overlap_loop(
    size_bytes: int, side: int, dtype: str, devices: Sequence[jax.Device], *, group: int, products: int
) -> Loop:
    """Return a loop of all-reduces, each beside ``products`` products that do not need it.

    Raises:
        MeasurementError: the compiler took the all-reduces out of the loop.
    """

    def step(x: jax.Array, w: jax.Array, gradient: jax.Array) -> State:
        for _ in range(products):
            x, w = product(x, w)
        return x, w, lax.psum(gradient, GROUP)

    matrix = Operand(shape=(side, side), dtype=dtype, noise=True)
    operands = [matrix, matrix, Operand(shape=(size_bytes // _ITEM_BYTES,))]
    loop = compile_loop(step, operands, group_mesh(devices, group, 1), unroll=2)
    if count_in_loop(loop.text, "all-reduce") != loop.operations:
        raise MeasurementError("the compiler moved the all-reduce out of the loop", action="skipped")
    return dataclasses.replace(loop, products=products)


def product(x: jax.Array, w: jax.Array) -> State:
    """Multiply, and write one element of the result into ``x``: the values stay as they are but for that one."""
    y = lax.optimization_barrier(x @ w)
    return lax.dynamic_update_slice(x, y[-1:, -1:], (0, 0)), w

"""Messages between stages on different nodes, as steps of a loop; and how long they hold their senders.

All devices of a node send to their partners on the next one at the same time, as a stage hands a microbatch on, and
what has come goes back. Neither can begin before the other has ended, so half of a step is a message from the moment
both sides have come to it, its latency included. (A collective over the same link tells less: its traffic in both
directions, several messages under way, and how they meet.)

A sender may go on before its message is there, since buffers take the rest. No loop of messages alone shows that: the
next one waits for the link. So the sender has products to do when it is free, longer than the message takes, and the
receiver answers when it has the message: the sender was held for what a step takes beyond products and answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ._compute import product
from ._hlo import count_in_loop
from ._loop import AFTER, GROUP, Loop, Operand, State, compile_loop, group_mesh
from ._timing import MeasurementError

_WAYS = 2
"""There and back."""

_ITEM_BYTES = 4
"""float32."""


def message_loop(size_bytes: int, devices: Sequence[jax.Device], *, nodes: int, per_node: int) -> Loop:
    """Return a loop of messages between every second node and the next one.

    Args:
        size_bytes: Of one device.
        devices: Node-major.
        nodes: At least two.
        per_node: Devices of a node.

    Raises:
        MeasurementError: the compiler took messages out of the loop, or the devices refused the program.
    """
    there, back = _ways(nodes)

    def step(x: jax.Array) -> State:
        for way in (there, back):
            come = lax.ppermute(x, GROUP, way)
            x = _together(come, come)
        return (x,)

    operand = Operand(shape=(max(1, size_bytes // _ITEM_BYTES),))
    loop = compile_loop(step, [operand], group_mesh(devices, nodes, per_node))
    return dataclasses.replace(_checked(loop), operations=_WAYS)


def sender_loop(
    size_bytes: int, side: int, dtype: str, devices: Sequence[jax.Device], *, nodes: int, per_node: int, products: int
) -> Loop:
    """Return a loop of messages, ``products`` products of the senders after each, and an answer of one element.

    Args:
        size_bytes: Of one device.
        side: Of the matrices.
        dtype: Of the matrices.
        devices: Node-major.
        nodes: At least two.
        per_node: Devices of a node.
        products: After one message.

    Raises:
        MeasurementError: as ``message_loop``.
    """
    there, back = _ways(nodes)

    def step(x: jax.Array, w: jax.Array, message: jax.Array) -> State:
        come = lax.ppermute(message, GROUP, there)
        x = _fed(x, come)  # so products stand after the message, and the answer after both
        is_sender = lax.axis_index(GROUP) % 2 == 0
        trips = jnp.where(is_sender, products, 0)
        x, w = lax.fori_loop(0, trips, lambda _, state: product(*state), (x, w))
        answer = lax.ppermute(x[:1, :1], GROUP, back)
        return x, w, _together(message, answer)

    matrix = Operand(shape=(side, side), dtype=dtype, noise=True)
    operands = [matrix, matrix, Operand(shape=(max(1, size_bytes // _ITEM_BYTES),))]
    loop = compile_loop(step, operands, group_mesh(devices, nodes, per_node))
    return dataclasses.replace(_checked(loop), products=products)


def _together(x: jax.Array, result: jax.Array) -> jax.Array:
    """Return ``x`` when all devices of a node have their ``result``.

    Else some would send while others receive, and the link would be each one's alone. The latency includes it: an
    all-reduce of one number inside a node.
    """
    return _fed(x, lax.psum(result.reshape(-1)[-1:], AFTER))


def _fed(x: jax.Array, result: jax.Array) -> jax.Array:
    """Return ``x`` with an element of ``result`` in its first place (behind a barrier: all of it is needed)."""
    element = lax.optimization_barrier(result).reshape(-1)[-1:].astype(x.dtype).reshape((1,) * x.ndim)
    return lax.dynamic_update_slice(x, element, (0,) * x.ndim)


def _ways(nodes: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From every second node to the next one, and back."""
    there = [(node, node + 1) for node in range(0, nodes - 1, 2)]
    return there, [(target, source) for source, target in there]


def _checked(loop: Loop) -> Loop:
    found = count_in_loop(loop.text, "collective-permute")
    if found != _WAYS:
        raise MeasurementError(f"the compiler left {found} of {_WAYS} messages in the loop", action="skipped")
    return loop

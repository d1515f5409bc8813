"""Messages between stages on different nodes, as steps of a loop.

All devices of a node send to their partners on the next one at the same time, as a stage hands a microbatch on, and
what has come goes back. Neither can begin before the other has ended, so half of a step is a message from the moment
both sides have come to it, its latency included. (A collective over the same link tells less: its traffic in both
directions, several messages under way, and how they meet.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax import lax

from ._hlo import count_in_loop
from ._loop import GROUP, Loop, Operand, State, compile_loop, group_mesh
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
    there = [(node, node + 1) for node in range(0, nodes - 1, 2)]
    back = [(target, source) for source, target in there]

    def step(x: jax.Array) -> State:
        return (lax.ppermute(lax.ppermute(x, GROUP, there), GROUP, back),)

    operand = Operand(shape=(max(1, size_bytes // _ITEM_BYTES),))
    loop = compile_loop(step, [operand], group_mesh(devices, nodes, per_node))
    found = count_in_loop(loop.text, "collective-permute")
    if found != _WAYS:
        raise MeasurementError(f"the compiler left {found} of {_WAYS} messages in the loop", action="skipped")
    return dataclasses.replace(loop, operations=_WAYS)

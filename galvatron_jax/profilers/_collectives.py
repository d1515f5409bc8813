"""Collectives as steps of a loop: the data of each depends on the one before, at the least possible cost.

All-reduce, all-to-all and permute return what they take, so the result simply goes into the next; the arrays are zeros,
whose sums stay zero. All-gather and reduce-scatter change the size: one element of the result is written into the
operand (a kernel with next to nothing to do, whose time is subtracted afterwards). Compiled for H200 by jax 0.10.2 the
loops hold the collectives, that kernel, and no copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax import lax

from ..profile import CollectiveKind
from ..units import MIB
from ._hlo import count_in_loop
from ._loop import GROUP, Loop, Operand, State, compile_loop, group_mesh, platform_of, steps_in_trip
from ._timing import MeasurementError

_SMALL_BYTES = MIB

_GLUE: dict[CollectiveKind, int] = {"all-gather": 1, "reduce-scatter": 1}

_ITEM_BYTES = 4
"""float32."""


def collective_loop(
    kind: CollectiveKind, size_bytes: int, devices: Sequence[jax.Device], *, group: int, stride: int
) -> Loop:
    """Return a loop of ``kind`` over all groups of the devices at once.

    Args:
        kind: The collective.
        size_bytes: The whole array of the group (all-to-all, permute: the local array); rounded up to whole elements.
        devices: Node-major.
        group: Members of a group.
        stride: Distance of members in ``devices``.

    Raises:
        MeasurementError: the compiler took collectives out of the loop, or the devices refused the program.
    """
    unroll = steps_in_trip(devices, small=size_bytes <= _SMALL_BYTES)
    elements = -(-size_bytes // (_ITEM_BYTES * group)) * group
    local = elements // group if kind == "all-gather" else elements
    mesh = group_mesh(devices, group, stride)
    spelled = spelling(kind, platform_of(devices))
    loop = compile_loop(_step(kind, group, spelled), [Operand(shape=(local,))], mesh, unroll=unroll)
    found = count_in_loop(loop.text, spelled)
    if found != unroll:
        raise MeasurementError(f"the compiler left {found} of {unroll} {spelled} in the loop", action="skipped")
    return Loop(run=loop.run, text=loop.text, operations=unroll, glue=_GLUE.get(kind, 0))


def spelling(kind: CollectiveKind, platform: str) -> CollectiveKind:
    """Return the collective that XLA's partitioner makes of a planned ``kind``.

    XLA:CPU has no pass that makes a reduce-scatter: what GSPMD emits there is an all-reduce and a slice (compiled train
    steps of jax 0.10.2), so that is what a reduce-scatter of a plan costs.
    """
    return "all-reduce" if platform == "cpu" and kind == "reduce-scatter" else kind


def _step(kind: CollectiveKind, group: int, spelled: CollectiveKind) -> Callable[[jax.Array], State]:
    ring = [(member, (member + 1) % group) for member in range(group)]
    steps: dict[CollectiveKind, Callable[[jax.Array], jax.Array]] = {
        "all-reduce": lambda x: lax.psum(x, GROUP),
        "all-gather": lambda x: _feed(x, lax.all_gather(x, GROUP, tiled=True)),
        "reduce-scatter": lambda x: _feed(x, _scattered(x, group, spelled)),
        "all-to-all": lambda x: lax.all_to_all(x, GROUP, 0, 0, tiled=True),
        "collective-permute": lambda x: lax.ppermute(x, GROUP, ring),
    }
    return lambda x: (steps[kind](x),)


def _scattered(x: jax.Array, group: int, spelled: CollectiveKind) -> jax.Array:
    size = x.shape[0] // group
    if spelled == "reduce-scatter":
        scattered: jax.Array = lax.psum_scatter(x, GROUP, tiled=True)
        return scattered
    return lax.dynamic_slice(lax.psum(x, GROUP), (lax.axis_index(GROUP) * size,), (size,))


def _feed(x: jax.Array, result: jax.Array) -> jax.Array:
    """Return ``x`` with the last element of ``result`` in its first place (behind a barrier: all of it is needed)."""
    return lax.dynamic_update_slice(x, lax.optimization_barrier(result)[-1:], (0,))

"""One program after the other, where devices do not see to it themselves.

Programs of one GPU run in the order in which they are given to its stream. A CPU device runs each program as soon as
its inputs are there, several at once; and between processes its collectives (gloo) take messages in the order in which
they come, so that one program takes another's. There, and nowhere else, every program is waited for. It costs the
overlap of stages within a process; between processes they still overlap.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import jax

T = TypeVar("T")


def in_turn(values: T) -> T:
    """Return ``values``, the results of a program; on CPU devices in several processes when they are there."""
    if _may_overtake():
        jax.block_until_ready(values)
    return values


@functools.cache
def _may_overtake() -> bool:
    return jax.process_count() > 1 and jax.default_backend() == "cpu"

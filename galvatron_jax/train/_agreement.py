"""Agreement: what one process noticed, all act upon, and at the same step.

Processes must take the same branch before the same step (one that saves while another trains is a deadlock), so each
step carries a few flags through a tiny program over all devices: the maximum over the processes of each flag. Its
result is read one step later, with the loss, so nobody waits for it. In one process it is the flags themselves.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Flag(enum.IntEnum):
    """What a process may have noticed."""

    TERMINATED = 0
    """It got SIGTERM: save, stop, exit 75."""
    INTERRUPTED = 1
    """It got SIGINT: save, stop, exit 130."""
    SAVE_FAILED = 2
    """The last save failed here."""


class Agreement:
    """The maximum over all processes of each flag."""

    def propose(self, flags: frozenset[Flag]) -> Any:
        """Send this process's flags on their way; give the result to ``read`` later."""
        if jax.process_count() == 1:
            return flags
        own = np.zeros((1, len(Flag)), np.int32)
        own[0, list(flags)] = 1
        devices = jax.device_count()
        spread = jax.make_array_from_callback((devices, len(Flag)), self._spread, lambda _: own)
        return self._maximum(spread)

    def read(self, proposed: Any) -> frozenset[Flag]:
        """Wait for the flags that any process proposed."""
        if isinstance(proposed, frozenset):
            return proposed
        return frozenset(flag for flag in Flag if np.asarray(proposed.addressable_data(0))[flag])

    @functools.cached_property
    def _spread(self) -> NamedSharding:
        mesh = Mesh(np.array(jax.devices(), dtype=object), ("all",), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec("all"))

    @functools.cached_property
    def _maximum(self) -> Any:
        whole = NamedSharding(self._spread.mesh, PartitionSpec())
        return jax.jit(lambda flags: jnp.max(flags, axis=0), out_shardings=whole)

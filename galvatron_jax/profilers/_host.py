"""Programs one after the other, each waited for: what the host takes beside them.

Devices of a kind that queues programs ahead (GPUs) have the next one when one ends. CPU devices are waited for between
the programs of a pipeline (docs/design/0025), and there the host hands over every array of the next program first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from ..units import format_seconds
from ._loop import LOCAL, Loop, group_mesh
from ._parts import NOTHING, Part
from ._readings import PROGRAM, Reading, Subject

_ARRAYS = 32
"""Weights, sums of gradients and residuals of a stage: some dozens."""


def program_loop(devices: Sequence[jax.Device]) -> Loop:
    """Return programs that do next to nothing with some dozens of arrays, as many as there are trips.

    On the devices of this process alone: those of a stage.
    """
    own = [device for device in devices if device.process_index == jax.process_index()]
    place = jax.sharding.NamedSharding(group_mesh(own, len(own), 1), LOCAL)
    arrays = [jax.device_put(jnp.zeros(len(own)), place) for _ in range(_ARRAYS)]
    program = jax.jit(lambda arrays: [array + 1 for array in arrays])
    text = program.lower(arrays).compile().as_text() or ""

    def run(trips: int) -> None:
        found = arrays
        for _ in range(trips):
            found = jax.block_until_ready(program(found))

    return Loop(run=run, text=text)


def program_fields(known: Mapping[Subject, Reading]) -> Part:
    """Return the seconds that the host takes for a program."""
    reading = known.get(Subject(what=PROGRAM))
    if reading is None:
        return NOTHING
    how = f"programs of {_ARRAYS} small arrays, each waited for: {format_seconds(reading.seconds)}"
    return Part({"program_s": reading.seconds}, {"program_s": how}, [])

"""From readings to a hardware profile: what was measured takes the place of what the base profile says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ..cluster import Cluster
from ..profile import HardwareProfile
from ._agenda import MAIN_DTYPE, OVERLAP_SIDE
from ._collective_parts import collective_fields
from ._compute_parts import copy_fields, launch_fields, overlap_fields, product_fields
from ._host import program_fields
from ._link_parts import eager_fields, link_fields
from ._machine import provenance_of
from ._parts import UNSTEADY_SPREAD, Part, find_overheads
from ._readings import Machine, Reading
from ._text import summarize


class Assembly(NamedTuple):
    """A profile and what its reader should know about it."""

    profile: HardwareProfile
    notes: tuple[str, ...]


def assemble_profile(
    readings: Sequence[Reading], base: HardwareProfile, cluster: Cluster, machine: Machine, *, date: str
) -> Assembly:
    """Return ``base`` with everything that was measured in its place, and a source for each field.

    Args:
        readings: Of any subset of the agenda; what is missing stays as in ``base``.
        base: Bundled profile of the same kind of device.
        cluster: The mesh that was measured.
        machine: Named in the sources.
        date: Of the measurement.
    """
    known = {reading.subject: reading for reading in readings}
    overheads = find_overheads(known)
    measured, how, notes = _merge(
        launch_fields(known, overheads),
        program_fields(known),
        copy_fields(known, overheads),
        product_fields(known, overheads, base, MAIN_DTYPE[machine.platform]),
        overlap_fields(known, overheads, OVERLAP_SIDE[machine.platform]),
        collective_fields(known, overheads, cluster),
        link_fields(known, overheads, cluster),
        eager_fields(known, overheads, OVERLAP_SIDE[machine.platform], cluster),
    )
    unsteady = sorted((r for r in readings if r.spread > UNSTEADY_SPREAD), key=lambda r: -r.spread)
    notes += summarize("unsteady", [f"{r.subject.text} (spread {r.spread:.0%})" for r in unsteady])
    if machine.processes < cluster.nodes:
        notes.append(f"{machine.processes} process stands for {cluster.nodes} nodes: no network was measured")
    stamp = (
        f"measured {date} on {machine.devices} x {machine.device_kind} ({machine.mesh}, {_software(machine, cluster)})"
    )
    sources = {field: f"from {base.name}: {text}" for field, text in base.sources.items()}
    sources |= {field: f"{stamp}: {text}" for field, text in how.items()}
    profile = msgspec.structs.replace(
        base,
        name=f"{base.name}-{cluster.mesh}-measured",
        description=f"{machine.devices} x {machine.device_kind} as {cluster.mesh}, {stamp.split(' on ')[0]}",
        measured=True,
        sources=sources,
        provenance=provenance_of(machine, base.device, date),
        **measured,
    )
    return Assembly(profile, tuple(notes))


def _merge(*parts: Part) -> Part:
    merged = Part({}, {}, [])
    for part in parts:
        merged.fields.update(part.fields)
        merged.how.update(part.how)
        merged.notes.extend(part.notes)
    return merged


def _software(machine: Machine, cluster: Cluster) -> str:
    driver = f", driver {machine.driver}" if machine.driver else ""
    several = machine.processes > 1 or cluster.nodes > 1
    processes = f", processes: {machine.processes}" if several else ""
    return f"jax {machine.jax_version}{driver}{processes}"

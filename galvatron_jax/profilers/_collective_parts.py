"""Tables: from readings of collectives to a field of a hardware profile."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..cluster import Cluster
from ..cost import device_group
from ..profile import CollectiveTable
from ._agenda import KINDS
from ._fit import Point, monotone_fit
from ._parts import Overheads, Part, outlier_notes, without_unsteady
from ._readings import Reading, Subject


def collective_fields(known: Mapping[Subject, Reading], overheads: Overheads, cluster: Cluster) -> Part:
    """Return the tables of collectives, in seconds by bytes."""
    seconds = {s: overheads.corrected(r) for s, r in without_unsteady(known).items() if s.what in KINDS}
    places: dict[tuple[str, int, bool, int], dict[int, list[float]]] = {}
    for subject, taken_s in seconds.items():
        members = device_group(subject.group, subject.stride, cluster.gpus_per_node)
        key = (subject.what, subject.group, members.nodes == 1, members.per_node)
        places.setdefault(key, {}).setdefault(subject.size, []).append(taken_s)
    tables, notes = [], []
    for (kind, group, inside, per_node), sizes in sorted(places.items()):
        fit = monotone_fit([Point(size, max(times)) for size, times in sorted(sizes.items())])
        label = f"{kind} over {group} devices, {'inside a node' if inside else f'{per_node} on each node'}"
        notes += outlier_notes(label, fit, "B")
        if len(fit.points) < 2:
            notes.append(f"{label}: no table, fewer than two sizes that rise")
            continue
        columns = {"sizes_bytes": [p.size for p in fit.points], "times_s": [p.seconds for p in fit.points]}
        place = {"kind": kind, "group": group, "inside_node": inside, "per_node": per_node}
        tables.append(msgspec.convert({**place, **columns}, CollectiveTable))
    if not tables:
        return Part({}, {}, notes)
    ratios = [max(times) / min(times) for sizes in places.values() for times in sizes.values()]
    how = (
        "all groups of the mesh at once; slope of loops, loop and glue subtracted; "
        f"the slowest where groups of one size lie differently (largest ratio {max(ratios):.2f}); made monotone"
    )
    return Part({"collectives": tuple(tables)}, {"collectives": how}, notes)

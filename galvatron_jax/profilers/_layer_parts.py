"""From readings of layer passes to what a model profile holds: tables, monotone, with the error of interpolation.

Recomputation is the difference of two measured backward passes, so it is as noisy as both together. It runs the forward
pass again, or less of it: a difference below ``_LEAST_SHARE`` or above ``_MOST_SHARE`` of the measured forward pass is
noise, and recomputation is left to the formula there.

Interpolation error: each point that has two neighbours is predicted from them as the cost model would (linear in the
samples) and held against the clock; the largest relative difference is stated with the tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..measured import Measured, Pass, PassTable, Provenance
from ..profile import ModelProfile
from ._fit import isotonic
from ._layer_passes import ADDED_BY
from ._parts import UNSTEADY_SPREAD, Overheads, find_overheads
from ._readings import Reading
from ._text import summarize

_LEAST_SHARE, _MOST_SHARE = 0.05, 1.5

Times = dict[int, float]
"""Seconds by samples."""


class LayerAssembly(NamedTuple):
    """A model profile with what was measured in it, and what its reader should know."""

    profile: ModelProfile
    notes: tuple[str, ...]


def assemble_layers(
    model: ModelProfile,
    readings: Sequence[Reading],
    provenance: Provenance,
    *,
    fused_attention: bool = False,
) -> LayerAssembly:
    """Return ``model`` with what was measured of each kind.

    Args:
        model: As the analysis found it.
        readings: Of any part of the agenda.
        provenance: Where and when.
        fused_attention: Attention ran by a kernel.
    """
    overheads = find_overheads({reading.subject: reading for reading in readings})
    unsteady = sorted((r for r in readings if r.spread > UNSTEADY_SPREAD), key=lambda r: -r.spread)
    notes = summarize("unsteady", [f"{r.subject.text} (spread {r.spread:.0%})" for r in unsteady])
    measured: dict[str, Measured] = {}
    for kind in model.kinds:
        own = [reading for reading in readings if reading.subject.layer == kind.name]
        tables, lost = _tables(own, overheads)
        notes += [f"{kind.name}: {text}" for text in lost]
        if tables:
            measured[kind.name] = Measured(
                provenance=provenance,
                fused_attention=fused_attention,
                passes=tuple(tables),
                interpolation_error=max(map(interpolation_error, tables)),
            )
    return LayerAssembly(model.with_measured(measured), tuple(notes))


def interpolation_error(table: PassTable) -> float:
    """Return the largest relative error of a point as interpolated from its neighbours, 0 with fewer than three."""
    n, t = table.samples, table.times_s
    middle = range(1, len(n) - 1)
    found = [t[i - 1] + (t[i + 1] - t[i - 1]) * (n[i] - n[i - 1]) / (n[i + 1] - n[i - 1]) for i in middle]
    return max((abs(guess / t[i] - 1) for i, guess in zip(middle, found, strict=True)), default=0.0)


def _tables(readings: Sequence[Reading], overheads: Overheads) -> tuple[list[PassTable], list[str]]:
    times: dict[tuple[str, int], Times] = {}
    for reading in readings:
        subject = reading.subject
        times.setdefault((subject.what, subject.group), {})[subject.size] = overheads.corrected(reading)
    tables, lost = [], []
    for (what, tp), found in sorted(times.items()):
        if what in ("forward", "backward"):
            tables.append(_table("forward" if what == "forward" else "backward", tp, found))
    for full, added in ADDED_BY.items():
        for tp in sorted(tp for what, tp in times if what == full):
            backward, forward = times.get(("backward", tp), {}), times.get(("forward", tp), {})
            both = sorted(set(times[full, tp]) & set(backward) & set(forward))
            more = {n: times[full, tp][n] - backward[n] for n in both}
            kept = {n: s for n, s in more.items() if _LEAST_SHARE <= s / forward[n] <= _MOST_SHARE}
            lost += [f"{added}, tp {tp}, {n} samples: lost in the noise of two passes" for n in both if n not in kept]
            if kept:
                tables.append(_table(added, tp, kept))
    return tables, lost


def _table(what: Pass, tp: int, times: Times) -> PassTable:
    samples = sorted(times)
    rising = isotonic([math.log(times[n]) for n in samples])
    return PassTable(what=what, tp=tp, samples=tuple(samples), times_s=tuple(math.exp(log) for log in rising))

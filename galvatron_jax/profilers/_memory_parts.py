"""From compiled peaks to what a model profile holds: kept bytes per layer and workspace, by strategy and samples.

A probe's peak is, with S the states of a layer (formulas, exact) and K what it keeps,

    peak(d layers) = d * (S + K) + workspace + (S + K of all other layers of the probe)

so K is the slope over two depths less S, and the workspace is the rest. The other layers (everything before and after
the probed ones) stand in both depths, so only their own K, by formula, rests on nothing measured.

A strategy that was compiled with few samples only takes what grows with the samples from its family (the same spread
and remat at another zero level): activations do not depend on zero. Everything that is not a layer in a row (embedding,
head) gets the workspace of the program without layers.

Left out are sizes of which one depth only is known (the budget ended there) and, by name, probes that did not compile,
or in which the compiler rematerialised on its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from ..cost import estimate_layer, stage_setting
from ..measured import MeasuredMemory, MemoryTable, Provenance
from ..profile import HardwareProfile, ModelProfile
from ..strategy import Strategy
from ._memory_probe import (
    MemoryProbe,
    MemoryReading,
    ProbeSession,
    probe_layers,
    probe_plan,
    repeated_kinds,
    short_profile,
)

_STATE = ("parameters", "gradients", "optimizer")


class MemoryAssembly(NamedTuple):
    """A model profile with what was compiled of it, and what its reader should know."""

    profile: ModelProfile
    notes: tuple[str, ...]


class _Bytes(NamedTuple):
    """What one strategy takes at one number of samples."""

    kept: float
    workspace: float


_Points = dict[int, _Bytes]
"""By samples."""


def assemble_memory(
    model: ModelProfile,
    readings: Sequence[MemoryReading],
    session: ProbeSession,
    hardware: HardwareProfile,
    provenance: Provenance,
) -> MemoryAssembly:
    """Return ``model`` with what compiled programs said of each kind.

    Args:
        model: As the analysis found it.
        readings: Of any part of the agenda.
        session: What the probes have in common.
        hardware: Compiled for, with attention run as it was compiled.
        provenance: Its name, and where and when.
    """
    bare = model.with_memory({})
    formulas = _Formulas(bare, session, hardware)
    good = {r.probe: r.peak_bytes for r in readings if r.peak_bytes and not r.rematerialised}
    notes = [f"{r.probe.text}: {r.problem}" for r in readings if r.problem]
    notes += [f"{r.probe.text}: the compiler rematerialised on its own" for r in readings if r.rematerialised]
    found: dict[str, MeasuredMemory] = {}
    for kind in repeated_kinds(bare):
        points, error = _kind_points({p: b for p, b in good.items() if p.layer == kind}, formulas)
        if points:
            tables = tuple(_table(strategy, accumulates, at) for (strategy, accumulates), at in points.items())
            found[kind] = _measured(tables, provenance, hardware, error)
    found |= {
        kind: _measured(tables, provenance, hardware, 0.0)
        for kind, tables in _edge_tables({p: b for p, b in good.items() if not p.layer}, formulas).items()
    }
    return MemoryAssembly(model.with_memory(found), tuple(notes))


class _Formulas:
    """The estimate's own bytes of what a probe is made of."""

    def __init__(self, model: ModelProfile, session: ProbeSession, hardware: HardwareProfile) -> None:
        self.model, self._session, self._hardware = model, session, hardware

    def layer(self, kind: str, strategy: Strategy, probe: MemoryProbe) -> tuple[float, float, float]:
        """Return (states, kept, workspace) of one layer of ``kind`` in the setting of ``probe``."""
        short = short_profile(self.model, probe)
        plan = probe_plan(short, probe, self._session)
        setting = stage_setting(plan, plan.stages[0], short, self._hardware)
        memory = estimate_layer(self.model.kind(kind), strategy, setting).memory
        return sum(memory[name] for name in _STATE), memory["residuals"], memory["live"]

    def others(self, probe: MemoryProbe) -> float:
        """Return states and kept bytes of all layers but the probed ones."""
        total = 0.0
        for run, strategy in probe_layers(self.model, probe):
            if run.kind != probe.layer:
                states, kept, _ = self.layer(run.kind, strategy, probe)
                total += run.count * (states + kept)
        return total


_Key = tuple[Strategy, bool]
"""A strategy, and whether gradients accumulate."""


def _kind_points(peaks: Mapping[MemoryProbe, int], formulas: _Formulas) -> tuple[dict[_Key, _Points], float]:
    """Return the points of each strategy of a kind, and the largest error of a point between two others."""
    by_key: dict[_Key, dict[int, dict[int, MemoryProbe]]] = defaultdict(lambda: defaultdict(dict))
    for probe in peaks:
        by_key[probe.strategy, probe.microbatches > 1][probe.samples][probe.layers] = probe
    slopes = {key: _slopes(depths, peaks, formulas) for key, depths in by_key.items()}
    points: dict[_Key, _Points] = {}
    for key, depths in by_key.items():
        points[key] = {}
        for samples, probes in sorted(depths.items()):
            deepest = probes[max(probes)]
            kept = _slope(key, samples, slopes)
            if kept is not None:
                states, _, _ = formulas.layer(deepest.layer, key[0], deepest)
                rest = peaks[deepest] - formulas.others(deepest) - deepest.layers * (states + kept)
                points[key][samples] = _Bytes(kept, rest)
    points = {key: at for key, at in points.items() if at}
    error = max((_error(at) for at in points.values()), default=0.0)
    return {key: _completed(key, points) for key in points}, error


def _slopes(
    depths: Mapping[int, Mapping[int, MemoryProbe]], peaks: Mapping[MemoryProbe, int], formulas: _Formulas
) -> dict[int, float]:
    """Return kept bytes by samples, where two depths were compiled."""
    found = {}
    for samples, probes in depths.items():
        if len(probes) > 1:
            few, many = probes[min(probes)], probes[max(probes)]
            states, _, _ = formulas.layer(many.layer, many.strategy, many)
            found[samples] = (peaks[many] - peaks[few]) / (many.layers - few.layers) - states
    return found


def _slope(key: _Key, samples: int, slopes: Mapping[_Key, Mapping[int, float]]) -> float | None:
    """Return the kept bytes of a strategy, its own or those of its family; None where no second depth was compiled."""
    own = slopes[key]
    if samples in own:
        return own[samples]
    if len(own) > 1:
        (x, y), (x2, y2) = min(own.items()), max(own.items())
        return y + (samples - x) * (y2 - y) / (x2 - x)
    family = [at[samples] for other, at in slopes.items() if _family(other) == _family(key) and samples in at]
    return family[0] if family else None


def _completed(key: _Key, points: Mapping[_Key, _Points]) -> _Points:
    """Return the points of a strategy with those sizes that only its family has."""
    own = points[key]
    at = min(own)
    for other, theirs in points.items():
        if _family(other) == _family(key) and at in theirs:
            more = {n: _shifted(own[at], theirs[at], theirs[n]) for n in theirs if n not in own}
            own = dict(sorted((own | more).items()))
    return own


def _shifted(own: _Bytes, start: _Bytes, end: _Bytes) -> _Bytes:
    return _Bytes(own.kept + end.kept - start.kept, own.workspace + end.workspace - start.workspace)


def _family(key: _Key) -> Strategy:
    return msgspec.structs.replace(key[0], zero=0, replicas=1)


def _error(points: _Points) -> float:
    """Largest relative error of workspace and kept bytes together, of points between two others."""
    sizes = sorted(points)
    found = [0.0]
    for left, n, right in zip(sizes, sizes[1:], sizes[2:], strict=False):
        line = [a + (b - a) * (n - left) / (right - left) for a, b in zip(points[left], points[right], strict=True)]
        found.append(abs(sum(line) / sum(points[n]) - 1))
    return max(found)


def _edge_tables(peaks: Mapping[MemoryProbe, int], formulas: _Formulas) -> dict[str, tuple[MemoryTable, ...]]:
    """Return tables of the kinds that stand in no row: kept bytes by formula, the workspace of all of them together."""
    points: dict[str, dict[Strategy, _Points]] = defaultdict(lambda: defaultdict(dict))
    for probe, peak in sorted(peaks.items(), key=lambda item: item[0].samples):
        workspace = peak - formulas.others(probe)
        for run, strategy in probe_layers(formulas.model, probe):
            _, kept, _ = formulas.layer(run.kind, strategy, probe)
            points[run.kind][strategy][probe.samples] = _Bytes(kept, workspace)
    return {
        kind: tuple(_table(strategy, False, at) for strategy, at in strategies.items())
        for kind, strategies in points.items()
    }


def _table(strategy: Strategy, accumulates: bool, points: _Points) -> MemoryTable:
    return MemoryTable(
        tp=strategy.tp,
        sp=strategy.sp,
        ulysses=strategy.ulysses,
        dp=strategy.dp,
        zero=strategy.zero,
        replicas=strategy.replicas,
        remat=strategy.remat,
        accumulates=accumulates,
        samples=tuple(points),
        kept_bytes=tuple(round(at.kept) for at in points.values()),
        workspace_bytes=tuple(round(at.workspace) for at in points.values()),
    )


def _measured(
    tables: Iterable[MemoryTable], provenance: Provenance, hardware: HardwareProfile, error: float
) -> MeasuredMemory:
    return MeasuredMemory(
        provenance=provenance,
        fused_attention=hardware.fused_attention,
        tables=tuple(tables),
        interpolation_error=error,
    )

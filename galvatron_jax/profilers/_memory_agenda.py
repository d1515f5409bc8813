"""Which probes tell what layers keep and need, and at which sizes.

Of a strategy (spread, zero, remat, with or without accumulation) the profiler wants

    kept(n)         the slope of the peak over the number of layers, at n samples on the device
    workspace(n)    the rest of the peak

Both are affine in the samples: activations grow with them, copies of weights do not. What grows does not depend on what
zero and accumulation do. So four programs per (spread, remat) do, one more for each other zero level, and two where
gradients accumulate, since accumulators are kept per layer:

    few samples, many layers      few samples, half as many layers
    many samples, many layers     many samples, half as many layers

The first strategy is also compiled with a number of samples between: the error of its interpolation stands for all.

Sizes are chosen by the formulas: as many samples and layers as a device holds with room to spare, since the compiler
rematerialises on its own when it runs short, and since a line is best read far from its origin. Depth costs no compile
time, layers of one kind are a loop. An odd loop is peeled, an even one is not, so both depths are odd or both even.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from ..cost import estimate_plan
from ..plan import Plan, strategy_violations
from ..profile import HardwareProfile, ModelProfile
from ..strategy import Strategy
from ._memory_probe import (
    MemoryProbe,
    ProbeSession,
    probe_layers,
    probe_plan,
    repeated_kinds,
    short_profile,
    without_remat,
)

MOST_SHARE = 0.45
"""Of a device's memory, by formula, that a probe may take."""

MOST_LAYERS, FEWEST_LAYERS = 32, 3
"""The runtime runs three and more layers as a loop."""

USUAL_LAYERS = (16, 8, 4)
"""How many layers the largest number of samples must leave room for; fewer where that is none."""

MOST_SAMPLES = 64


class Wanted(NamedTuple):
    """What is to be known: a strategy of a layer kind."""

    layer: str
    strategy: Strategy
    accumulates: bool = False


def usual_strategies(model: ModelProfile, devices: int, gpus_per_node: int) -> list[Wanted]:
    """Return the strategies that searches choose from, most usual first, for each repeated kind."""
    degrees = [n for n in (8, 2, 4) if n <= gpus_per_node and devices % n == 0]
    spreads = [Strategy(dp=devices)]
    spreads += [Strategy(tp=n, sp=True, dp=devices // n) for n in degrees]
    late = [Strategy(tp=n, dp=devices // n) for n in degrees]
    late += [Strategy(ulysses=n, dp=devices // n) for n in degrees]
    first: list[tuple[Strategy, bool]] = [
        (msgspec.structs.replace(spread, zero=zero, remat=remat), False)
        for spread in spreads
        for remat in ("full", "none")
        for zero in (3, 1)
    ]
    first += [(msgspec.structs.replace(spreads[0], zero=zero, remat="full"), True) for zero in (3, 1)]
    second: list[tuple[Strategy, bool]] = [
        (msgspec.structs.replace(spread, zero=3, remat=remat), False) for spread in late for remat in ("full", "none")
    ]
    second += [(msgspec.structs.replace(spread, zero=3, remat="dots"), False) for spread in spreads]
    kinds = repeated_kinds(model)
    return [Wanted(kind, s, accumulates) for some in (first, second) for kind in kinds for s, accumulates in some]


def planned_strategies(model: ModelProfile, plans: Iterable[Plan], devices: int) -> list[Wanted]:
    """Return what ``plans`` use of each repeated kind, on all ``devices``; hsdp is left to the formulas."""
    kinds = repeated_kinds(model)
    found = [
        Wanted(
            run.kind,
            msgspec.structs.replace(run.strategy, replicas=1, dp=devices // run.strategy.inner),
            plan.microbatches > 1,
        )
        for plan in plans
        for stage in plan.stages
        for run in stage.runs
        if run.kind in kinds
    ]
    return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAgenda:
    """Chooses probes."""

    model: ModelProfile
    session: ProbeSession
    hardware: HardwareProfile
    """With attention run as the programs are compiled."""

    def probes(self, wanted: Iterable[Wanted]) -> tuple[MemoryProbe, ...]:
        """Return the probes of ``wanted``, in its order, those of the edges first."""
        wanted = list(dict.fromkeys(_canonical(w) for w in wanted))
        leads = {_family(w): w for w in sorted(wanted, key=lambda w: (not w.accumulates, w.strategy.zero))}
        edges = [self._edges(w.strategy) for w in wanted[:1]]
        layers = [self._layers(w, is_lead=leads[_family(w)] == w) for w in wanted]
        between = [self._between(found) for found in layers[:1] if found]
        return tuple(dict.fromkeys(probe for some in (*edges, *layers[:1], *between, *layers[1:]) for probe in some))

    def _layers(self, wanted: Wanted, *, is_lead: bool) -> list[MemoryProbe]:
        """Probes of one strategy; ``is_lead``: it shows for its family what grows with the samples."""
        most = max(run.count for run in self.model.layers if run.kind == wanted.layer)
        empty = MemoryProbe(
            layer=wanted.layer,
            layers=1,
            strategy=wanted.strategy,
            samples=1,
            microbatches=2 if wanted.accumulates else 1,
        )
        found: list[MemoryProbe] = []
        sizes = self._samples(empty, most)
        for samples in sizes if is_lead else sizes[:1]:
            some = msgspec.structs.replace(empty, samples=samples)
            deep = self._deepest(some, most)
            half = _even_with(most, max(FEWEST_LAYERS, (deep + 1) // 2), up=True)
            both = is_lead or wanted.accumulates
            depths = (deep, half) if both and half < deep else (deep,)
            found += [msgspec.structs.replace(some, layers=depth) for depth in depths]
        return found

    def _between(self, probes: Sequence[MemoryProbe]) -> list[MemoryProbe]:
        """A probe with samples between those of ``probes``, nearest their geometric mean."""
        few, many = min(p.samples for p in probes), max(p.samples for p in probes)
        middle = 2 ** round((math.log2(few) + math.log2(many)) / 2)
        shallow = min(p.layers for p in probes if p.samples == many)
        lead = next(p for p in probes if p.samples == many)
        return [msgspec.structs.replace(lead, samples=middle, layers=shallow)] if few < middle < many else []

    def _edges(self, strategy: Strategy) -> list[MemoryProbe]:
        empty = MemoryProbe(layers=0, strategy=without_remat(strategy), samples=1)
        return [msgspec.structs.replace(empty, samples=n) for n in self._samples(empty, 0)]

    def _samples(self, probe: MemoryProbe, most: int) -> tuple[int, ...]:
        """Few and many samples: the fewest that are legal, and the most that leave room for the usual depth."""
        sizes = [2**k for k in range(MOST_SAMPLES.bit_length())]
        for usual in USUAL_LAYERS:
            depth = _even_with(most, usual) if probe.layer else 0
            some = msgspec.structs.replace(probe, layers=depth)
            fitting = [n for n in sizes if self._is_possible(msgspec.structs.replace(some, samples=n))]
            if fitting:
                return tuple(dict.fromkeys((fitting[0], fitting[-1])))
        return ()

    def _deepest(self, probe: MemoryProbe, most: int) -> int:
        depths = range(_even_with(most, MOST_LAYERS), 0, -2)
        return next((d for d in depths if self._is_possible(msgspec.structs.replace(probe, layers=d))), depths[-1])

    def _is_possible(self, probe: MemoryProbe) -> bool:
        """Tell whether a probe is a legal plan of more than one sample that fits with room to spare."""
        microbatch = probe.samples * probe.strategy.dp
        legal = not any(
            strategy_violations(self.model.kind(run.kind), strategy, microbatch)
            for run, strategy in probe_layers(self.model, probe)
        )
        return legal and microbatch > 1 and self.estimate(probe) <= MOST_SHARE * self.hardware.memory_bytes

    def estimate(self, probe: MemoryProbe) -> int:
        """Return the peak of a probe by formula."""
        model = short_profile(self.model, probe)
        (stage,) = estimate_plan(probe_plan(model, probe, self.session), model, self.hardware).stages
        return stage.peak_bytes


def _canonical(wanted: Wanted) -> Wanted:
    """Zero 1 for zero 2 without accumulation: their programs have the same peak (``cost._memory``)."""
    if wanted.strategy.zero != 2 or wanted.accumulates:
        return wanted
    return wanted._replace(strategy=msgspec.structs.replace(wanted.strategy, zero=1))


def _family(wanted: Wanted) -> tuple[str, Strategy]:
    """What strategies share that differ in zero and accumulation only."""
    return wanted.layer, msgspec.structs.replace(wanted.strategy, zero=0, replicas=1)


def _even_with(depth: int, most: int, *, up: bool = False) -> int:
    """Return the number nearest ``most``, not above (``up``: not below), odd if ``depth`` is; at most ``depth``."""
    wanted = most if most % 2 == depth % 2 else most + (1 if up else -1)
    return min(depth, max(wanted, 1))

"""Lower bounds on the step time of a pipeline with one stage on each slice, for all boundaries at once.

A *cut* belongs to a path of the schedule: ``phi[s](i, j)``, the least contribution to the path of stage ``s`` when it
holds the layers ``i`` to ``j`` (its Lagrangian bound, ``_relaxation``), and ``rest[s](i)``, the least of the stages
from ``s`` on when stage ``s`` begins at layer ``i`` (dynamic programming). A beginning ``c[0] ... c[s]`` takes at least
the sum of its ``phi`` and ``rest[s](c[s])``. The bottleneck paths count together, by the recursion

    V[s](i) = min over j of max(m g[s](i, j) + own, g[s](i, j) + 2 transfer + V[s + 1](j))

with ``g`` the least forward and backward seconds, and ``own`` the messages that hold the slice (``_paths``), but for
the two before it, which are on every path that passes it.

A stage that takes the limit for its microbatches alone, even with the fastest strategies, is part of no solution: what
stages can hold is a band, the narrower the more stages there are.

Complexity: O(stages * layers * longest stage) for each cut.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from ._assignment import Assigner
from ._knapsack import Floats, Ints
from ._paths import Path
from ._pricing import Prices, message_buffers
from ._slices import fills_on
from ._space import Shape
from ._stage import Weights, normalised
from ._whole import fastest_seconds

MAX_CUTS = 24
"""Cuts kept for the boundaries; further ones serve only the partition that they come from."""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One path as a bound for every position of the boundaries."""

    path: Path
    least: list[Floats]
    """``phi`` by stage, by what it holds (``Band``)."""
    rest: list[Floats]
    """Least contribution of the stages from ``k`` on, by their first layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """What a stage can hold within the limit, by its first layer and its number of layers."""

    counts_HK: Floats
    """All distinct layer counts by kind."""
    held_LW: Ints
    """Row of ``counts_HK`` by (first layer, layers - 1); -1 past the end of the model."""
    stop_LW: Ints
    """Where such a stage ends, at most at the end of the model."""

    @classmethod
    def of(cls, prices: Prices, most_s: float) -> Band:
        """Return the stages whose layers take less than ``most_s`` a microbatch with the fastest strategies."""
        layers = len(prices.order)
        spent = np.array(fastest_seconds(prices))
        longest = np.searchsorted(spent, spent[:-1] + most_s, side="right") - np.arange(layers)
        width = int(max(1, min(layers, longest.max(initial=1))))
        stop = np.arange(layers)[:, None] + np.arange(1, width + 1)
        held = np.where(
            stop <= layers, prices.contents.of_interval[np.arange(layers)[:, None], np.minimum(stop, layers)], -1
        )
        rows, of_band = np.unique(held, return_inverse=True)
        outside = int(rows[0] == -1)
        return cls(
            prices.contents.counts_SK[rows[outside:]], of_band.reshape(held.shape) - outside, np.minimum(stop, layers)
        )

    def ends(self, values: Floats, at: int) -> Floats:
        """Spread ``values``, by the number of layers of a stage that begins at ``at``, over where it ends."""
        ends = np.full(len(self.held_LW) + 1, np.inf)
        inside = self.held_LW[at] >= 0
        ends[self.stop_LW[at][inside]] = values[inside]
        return ends

    def count(self, at: int, stop: int) -> int:
        """Return the row of what a stage from ``at`` to ``stop`` holds; -1 outside of the band."""
        return int(self.held_LW[at, stop - at - 1]) if stop - at <= self.held_LW.shape[1] else -1


@dataclass(slots=True, eq=False)
class Bounds:
    """All cuts of one pipeline."""

    prices: Prices
    assigner: Assigner
    shape: Shape
    microbatches: int
    in_flight: tuple[int, ...]
    """By stage."""
    limit: float
    """Solutions take less."""
    cuts: list[Cut] = field(default_factory=list)
    band: Band = field(init=False)
    _joint: _Joint = field(init=False)

    def __post_init__(self) -> None:
        """Bound the bottleneck paths."""
        self.band = Band.of(self.prices, self.limit / self.microbatches)
        self._joint = _Joint.make(self)

    @property
    def paths(self) -> list[Path]:
        """The paths of all cuts."""
        return [cut.path for cut in self.cuts]

    @property
    def whole_s(self) -> float:
        """No choice of boundaries and strategies takes less."""
        return max([float(self._joint.rest[0][0])] + [float(cut.rest[0][0]) for cut in self.cuts])

    def learn(self, path: Path) -> None:
        """Use a path as a bound for all boundaries."""
        if len(self.cuts) < MAX_CUTS and all(cut.path != path for cut in self.cuts):
            least = [self.least(s, weights) for s, weights in enumerate(path.weights)]
            rest = [end_of(len(self.prices.order))]
            for s in range(self.shape.slices - 1, -1, -1):
                after = rest[0] + self._crossing(path, s)
                rest.insert(0, np.append((least[s][self.band.held_LW] + after[self.band.stop_LW]).min(axis=1), np.inf))
            self.cuts.append(Cut(path, least, rest))

    def after(self, cuts: tuple[int, ...]) -> Floats:
        """Return the bound by the end of the next stage, when the stages before begin at ``cuts``."""
        stage, at = len(cuts) - 1, cuts[-1]
        bounds = self._joint.after(cuts)
        held = [self.band.count(*pair) for pair in itertools.pairwise(cuts)]
        for cut in self.cuts:
            before = sum(
                float(cut.least[k][held[k]]) + float(self._crossing(cut.path, k)[cuts[k + 1]]) for k in range(stage)
            )
            own = self.band.ends(cut.least[stage][self.band.held_LW[at]], at)
            np.maximum(bounds, before + own + self._crossing(cut.path, stage) + cut.rest[stage + 1], out=bounds)
        return bounds

    def least(self, stage: int, weights: Weights) -> Floats:
        """Return a lower bound on what a stage adds, by what it holds; the last entry, of nothing, is infinite."""
        (unit,), scale = normalised((weights,))
        bounds = self.assigner.bounds(unit, self.in_flight[stage], self.band.counts_HK, self._least_buffers(stage))
        bounds[np.isfinite(bounds)] *= scale
        return np.append(bounds, np.inf)

    def _crossing(self, path: Path, stage: int) -> Floats:
        if stage == self.shape.slices - 1:
            return np.zeros(len(self.prices.order) + 1)
        received, sent = path.crossings[stage]
        return received * self.transfer(stage) + sent * self._sender(stage)

    def transfer(self, stage: int) -> Floats:
        """Return the seconds of a message from ``stage`` to the next one, by the first layer of the next one."""
        return np.asarray(self.prices.transfer_BJ[stage])

    def _sender(self, stage: int) -> Floats:
        """Return those for which it holds its sender."""
        return np.asarray(self.prices.sender_BJ[stage])

    def messages_behind(self, stage: int) -> Floats:
        """Return the seconds of the messages behind a stage that hold it, by the first layer of the next one."""
        if stage == self.shape.slices - 1 or not self.prices.meets_B[stage]:
            return np.zeros(len(self.prices.order) + 1)
        return self.microbatches * (self.transfer(stage) + self._sender(stage))

    def messages_before(self, stage: int) -> Floats:
        """Return those before it, but for the two on every path, by its own first layer."""
        if stage == 0 or not self.prices.meets_B[stage - 1]:
            return np.zeros(len(self.prices.order) + 1)
        return (self.microbatches - 1) * (self.transfer(stage - 1) + self._sender(stage - 1))

    def _least_buffers(self, stage: int) -> float:
        first = self.prices.message_bytes_J[1:-1]
        if not len(first):
            return 0.0
        at = 1 + int(first.argmin())
        more = fills_on(self.shape, self.microbatches, stage)
        return message_buffers(self.prices, self.shape.slices, stage, (at, at), goes_on=more)


@dataclass(frozen=True, slots=True, eq=False)
class _Joint:
    """The bottleneck paths together, with one stage on each slice."""

    bounds: Bounds
    first: tuple[Floats, Floats]
    """Of stage 0, with its step end: all microbatches, one microbatch."""
    pairs: list[Floats]
    """``g`` by stage, by what it holds."""
    rest: list[Floats]
    """``V`` by stage, by its first layer; stage 0 with its step end."""

    @classmethod
    def make(cls, bounds: Bounds) -> _Joint:
        m, stages = float(bounds.microbatches), bounds.shape.slices
        first = bounds.least(0, Weights(m, m, 1.0)), bounds.least(0, Weights(1.0, 1.0, 1.0))
        pairs = [bounds.least(s, Weights(1.0, 1.0, 0.0)) for s in range(stages)]
        joint = cls(bounds, first, pairs, [end_of(len(bounds.prices.order))])
        for s in range(stages - 1, -1, -1):
            one = first[1] if s == 0 else pairs[s]
            busy = first[0] if s == 0 else m * pairs[s]
            band, following = bounds.band, joint._following(s, joint.rest[0])
            own = bounds.messages_before(s)[:-1, None] + bounds.messages_behind(s)[band.stop_LW]
            least = np.maximum(busy[band.held_LW] + own, one[band.held_LW] + following[band.stop_LW]).min(axis=1)
            joint.rest.insert(0, np.append(least, np.inf))
        return joint

    def after(self, cuts: tuple[int, ...]) -> Floats:
        """Return the bound by the end of the next stage, when the stages before begin at ``cuts``."""
        m, stage, at = float(self.bounds.microbatches), len(cuts) - 1, cuts[-1]
        band, following = self.bounds.band, self._following(stage, self.rest[stage + 1])
        behind = self.bounds.messages_behind(stage)
        if stage == 0:
            busy, one = (band.ends(first[band.held_LW[0]], 0) for first in self.first)
            return np.asarray(np.maximum(busy + behind, one + following))
        held = [band.count(*pair) for pair in itertools.pairwise(cuts)]
        bounds = np.full(len(following), float(self.first[0][held[0]]) + float(self.bounds.messages_behind(0)[cuts[1]]))
        spent = float(self.first[1][held[0]] + 2 * self.bounds.transfer(0)[cuts[1]])
        for s in range(1, stage):
            pair = float(self.pairs[s][held[s]])
            own = self.bounds.messages_before(s)[cuts[s]] + self.bounds.messages_behind(s)[cuts[s + 1]]
            np.maximum(bounds, spent + m * pair + float(own), out=bounds)
            spent += pair + 2 * float(self.bounds.transfer(s)[cuts[s + 1]])
        pairs = band.ends(self.pairs[stage][band.held_LW[at]], at)
        own = float(self.bounds.messages_before(stage)[at]) + behind
        return np.asarray(np.maximum(bounds, spent + np.maximum(m * pairs + own, pairs + following)))

    def _following(self, stage: int, rest: Floats) -> Floats:
        """What follows a stage's own pair on the way to a later bottleneck, by the stage's end."""
        if stage == self.bounds.shape.slices - 1:
            return np.where(np.isinf(rest), np.inf, 0.0)
        return np.asarray(rest + 2 * self.bounds.transfer(stage))


def end_of(layers: int) -> Floats:
    """Return what the stages after the last one add, by their first layer: nothing, at the end of the model only."""
    rest = np.full(layers + 1, np.inf)
    rest[layers] = 0.0
    return rest

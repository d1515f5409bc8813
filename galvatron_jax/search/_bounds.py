"""Lower bounds on the step time of a pipeline with one stage on each slice, for all boundaries at once.

A *cut* belongs to a path of the schedule: ``phi[s](i, j)``, the least contribution to the path of stage ``s`` when it
holds the layers ``i`` to ``j`` (its Lagrangian bound, ``_relaxation``), and ``rest[s](i)``, the least of the stages
from ``s`` on when stage ``s`` begins at layer ``i`` (dynamic programming). A beginning ``c[0] ... c[s]`` takes at least
the sum of its ``phi`` and ``rest[s](c[s])``. The bottleneck paths count together, by the recursion

    V[s](i) = min over j of max(m g[s](i, j), g[s](i, j) + 2 transfer + V[s + 1](j)),   g = least forward + backward

Complexity: O(stages * layers^2) for each cut.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from ._assignment import Assigner
from ._knapsack import Floats
from ._paths import Path
from ._pricing import Prices, message_buffers
from ._space import Shape
from ._stage import Weights, normalised

MAX_CUTS = 24
"""Cuts kept for the boundaries; further ones serve only the partition that they come from."""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One path as a bound for every position of the boundaries."""

    path: Path
    least: list[Floats]
    """``phi`` by stage, by what it holds (``Contents``)."""
    rest: list[Floats]
    """Least contribution of the stages from ``k`` on, by their first layer."""


@dataclass(slots=True, eq=False)
class Bounds:
    """All cuts of one pipeline."""

    prices: Prices
    assigner: Assigner
    shape: Shape
    microbatches: int
    in_flight: tuple[int, ...]
    """By stage."""
    cuts: list[Cut] = field(default_factory=list)
    _joint: _Joint = field(init=False)

    def __post_init__(self) -> None:
        """Bound the bottleneck paths."""
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
                rest.insert(0, (least[s][self.prices.contents.of_interval] + after).min(axis=1))
            self.cuts.append(Cut(path, least, rest))

    def after(self, cuts: tuple[int, ...]) -> Floats:
        """Return the bound by the end of the next stage, when the stages before begin at ``cuts``."""
        stage, at = len(cuts) - 1, cuts[-1]
        bounds = self._joint.after(cuts)
        held = self.prices.contents.of_interval
        for cut in self.cuts:
            before = sum(
                float(cut.least[k][held[cuts[k], cuts[k + 1]]]) + float(self._crossing(cut.path, k)[cuts[k + 1]])
                for k in range(stage)
            )
            ends = cut.least[stage][held[at]] + self._crossing(cut.path, stage) + cut.rest[stage + 1]
            np.maximum(bounds, before + ends, out=bounds)
        return bounds

    def least(self, stage: int, weights: Weights) -> Floats:
        """Return a lower bound on what a stage adds, by what it holds; the last entry, of nothing, is infinite."""
        (unit,), scale = normalised((weights,))
        counts = self.prices.contents.counts_SK
        bounds = self.assigner.bounds(unit, self.in_flight[stage], counts, self._least_buffers(stage))
        bounds[np.isfinite(bounds)] *= scale
        return np.append(bounds, np.inf)

    def _crossing(self, path: Path, stage: int) -> Floats:
        if stage == self.shape.slices - 1:
            return np.zeros(len(self.prices.order) + 1)
        return np.asarray(path.crossings[stage] * self.transfer(stage))

    def transfer(self, stage: int) -> Floats:
        """Return the seconds of a message from ``stage`` to the next one, by the first layer of the next one."""
        return np.asarray(self.prices.transfer_BJ[stage])

    def _least_buffers(self, stage: int) -> float:
        first = self.prices.message_bytes_J[1:-1]
        if not len(first):
            return 0.0
        at = 1 + int(first.argmin())
        return message_buffers(self.prices, self.shape.slices, stage, (at, at))


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
            held = bounds.prices.contents.of_interval
            joint.rest.insert(0, np.maximum(busy[held], one[held] + joint._following(s, joint.rest[0])).min(axis=1))
        return joint

    def after(self, cuts: tuple[int, ...]) -> Floats:
        """Return the bound by the end of the next stage, when the stages before begin at ``cuts``."""
        m, stage, at = float(self.bounds.microbatches), len(cuts) - 1, cuts[-1]
        following, held = self._following(stage, self.rest[stage + 1]), self.bounds.prices.contents.of_interval
        if stage == 0:
            return np.asarray(np.maximum(self.first[0][held[at]], self.first[1][held[at]] + following))
        bounds = np.full(len(following), float(self.first[0][held[0, cuts[1]]]))
        spent = float(self.first[1][held[0, cuts[1]]] + 2 * self.bounds.transfer(0)[cuts[1]])
        for s in range(1, stage):
            pair = float(self.pairs[s][held[cuts[s], cuts[s + 1]]])
            np.maximum(bounds, spent + m * pair, out=bounds)
            spent += pair + 2 * float(self.bounds.transfer(s)[cuts[s + 1]])
        pairs = self.pairs[stage][held[at]]
        return np.asarray(np.maximum(bounds, spent + np.maximum(m * pairs, pairs + following)))

    def _following(self, stage: int, rest: Floats) -> Floats:
        """What follows a stage's own pair on the way to a later bottleneck, by the stage's end."""
        if stage == self.bounds.shape.slices - 1:
            return np.where(np.isinf(rest), np.inf, 0.0)
        return np.asarray(rest + 2 * self.bounds.transfer(stage))


def whole_seconds(prices: Prices, assigner: Assigner, shape: Shape, microbatches: int) -> list[float]:
    """Return the least seconds of one microbatch's passes through the first ``n`` layers, at index ``n``.

    The last one with the memory of all slices in one, for layers in fractions and layouts for free; the others without
    any limit. At one of its fullest moments a slice holds at least one microbatch of each of its stages (gpipe: all).
    """
    board = assigner.board(Weights(1.0, 1.0, 0.0), microbatches if shape.schedule == "gpipe" else 1)
    found = fastest_seconds(prices)
    smallest = min(float(live.min()) for live in board.live if len(live))
    counts = np.bincount(prices.order, minlength=len(prices.kinds)).astype(np.float64)
    room = shape.slices * (assigner.capacity_bytes - smallest)
    found[-1] = board.relaxation.whole_bound(counts, room)
    return found


def fastest_seconds(prices: Prices) -> list[float]:
    """Return the least seconds of one microbatch through the first ``n`` layers, at index ``n``."""
    kinds = [float((kind.forward_s + kind.backward_s).min()) if len(kind.layout) else 0.0 for kind in prices.kinds]
    return list(itertools.accumulate((kinds[kind] for kind in prices.order.tolist()), initial=0.0))


def end_of(layers: int) -> Floats:
    """Return what the stages after the last one add, by their first layer: nothing, at the end of the model only."""
    rest = np.full(layers + 1, np.inf)
    rest[layers] = 0.0
    return rest

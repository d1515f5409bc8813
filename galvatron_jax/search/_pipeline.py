"""A pipeline of given stage count, microbatches and batch: where to cut it, and how to spread each stage.

    minimise the longest path of the schedule over boundaries and strategies, every stage within the memory budget

The longest path is a maximum of linear functions (``_paths``), and for one linear function a stage's best strategies
are known exactly (``_assignment``). So every path seen gives a *cut*: with ``phi[s](i, j)`` the least contribution of
stage ``s`` when it holds the layers ``i`` to ``j``, any plan with boundaries ``c`` takes at least ``sum_s
phi[s](c[s], c[s + 1])``.

**Boundaries** are searched depth first, from the first stage on. ``phi`` is bounded from below for all ``(i, j)`` at
once (``_relaxation``), and so is what the remaining stages add, by dynamic programming over the position: for each
cut a sum, and for the bottleneck paths together the recursion

    V[s](i) = min over j of max(m g[s](i, j), g[s](i, j) + 2 transfer + V[s + 1](j)),   g = least forward + backward

A beginning whose bound reaches the best step time known is left.

**Strategies** for complete boundaries: ``_partition``.

Complexity: the bounds take O(stages * layers^2) for each cut; the search visits the boundaries that the bounds leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..plan import ScheduleName
from ..schedule import Schedule, build_schedule, in_flight_microbatches
from ._assignment import Assigner
from ._knapsack import Floats
from ._partition import Partition, Solution
from ._paths import Path
from ._pricing import Prices, message_buffers
from ._stage import ROUNDING, Span, Weights

SCHEDULE: ScheduleName = "1f1b"
MAX_CUTS = 24
"""Cuts kept for the boundaries; further ones serve only the partition that they come from."""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One path as a bound for every position of the boundaries."""

    path: Path
    least: list[Floats]
    """``phi`` by stage: (first layer, end)."""
    rest: list[Floats]
    """Least contribution of the stages from ``s`` on, by their first layer."""


@dataclass(slots=True, eq=False)
class Pipeline:
    """One (global batch, microbatches, stages); holds the bounds that it learns."""

    prices: Prices
    assigner: Assigner
    stages: int
    microbatches: int
    report: Callable[[Solution | None], None] = lambda best: None
    """Called between steps of the search with the best solution so far; may raise to stop it."""
    limit: float = np.inf
    """Step time that a solution must stay below."""
    _layers: int = field(init=False)
    _schedule: Schedule = ()
    cuts: list[Cut] = field(default_factory=list)
    _pairs: list[Floats] = field(init=False)
    _joint: list[Floats] = field(init=False)
    _first: tuple[Floats, Floats] = field(init=False)

    def __post_init__(self) -> None:
        """Bound all bottleneck paths for all boundaries."""
        self._layers = len(self.prices.order)
        m = float(self.microbatches)
        self._first = (self._least(0, Weights(m, m, 1.0)), self._least(0, Weights(1.0, 1.0, 1.0)))
        self._pairs = [self._least(s, Weights(1.0, 1.0, 0.0)) for s in range(self.stages)]
        self._joint = self._joint_rest()

    @property
    def bound_s(self) -> float:
        """No choice of boundaries and strategies takes less."""
        return max([float(self._joint[0][0])] + [float(cut.rest[0][0]) for cut in self.cuts])

    @property
    def schedule(self) -> Schedule:
        """The action lists, made when they are first needed: they are long."""
        if not self._schedule:
            self._schedule = build_schedule(SCHEDULE, self.stages, self.microbatches)
        return self._schedule

    def solve(self, limit: float) -> Solution | None:
        """Return the best solution if it takes less than ``limit`` seconds, else None."""
        self.limit, best = limit, None
        for boundaries in self._boundaries():
            self.report(best)
            found = Partition(self, boundaries).solve(best)
            if found is not None:
                self.limit, best = found.step_time_s, found
        return best

    def transfers(self, boundaries: tuple[int, ...]) -> list[float]:
        """Return the seconds of a message over each boundary."""
        return [float(self._transfer(s)[boundaries[s + 1]]) for s in range(self.stages - 1)]

    def span(self, stage: int, boundaries: tuple[int, ...]) -> Span:
        """Return what ``stage`` holds."""
        start, stop = boundaries[stage], boundaries[stage + 1]
        runs: list[tuple[int, int]] = []
        for kind in self.prices.order[start:stop].tolist():
            last = runs.pop() if runs and runs[-1][0] == kind else (kind, 0)
            runs.append((kind, last[1] + 1))
        return Span(
            tuple(runs),
            in_flight_microbatches(SCHEDULE, stage, self.stages, self.microbatches),
            stage > 0,
            int(self.prices.order[stop]) if stop < self._layers else -1,
            message_buffers(self.prices, self.stages, stage, (start, stop)),
        )

    def learn(self, path: Path) -> None:
        """Use a path as a bound for all boundaries."""
        if len(self.cuts) < MAX_CUTS and all(cut.path != path for cut in self.cuts):
            least = [self._least(s, weights) for s, weights in enumerate(path.weights)]
            for s, crossings in enumerate(path.crossings):
                least[s] = least[s] + crossings * self._transfer(s)
            rest = [_end(self._layers)]
            for phi in reversed(least):
                rest.insert(0, (phi + rest[0]).min(axis=1))
            self.cuts.append(Cut(path, least, rest))

    def _boundaries(self) -> Iterator[tuple[int, ...]]:
        """Yield boundaries whose bound is below the limit, depth first, the most promising next stage first."""
        stack: list[tuple[float, tuple[int, ...]]] = [(self.bound_s, (0,))]
        while stack:
            _, cuts = stack.pop()
            bound = self._bound(cuts)
            if bound >= self.limit * (1 - ROUNDING):
                continue
            if len(cuts) == self.stages + 1:
                yield cuts
                continue
            ends = self._bounds_after(cuts)
            order = np.argsort(-ends, kind="stable")
            stack += [(float(ends[j]), (*cuts, int(j))) for j in order if ends[j] < self.limit * (1 - ROUNDING)]

    def _bound(self, cuts: tuple[int, ...]) -> float:
        if len(cuts) == 1:
            return self.bound_s
        return float(self._bounds_after(cuts[:-1])[cuts[-1]])

    def _bounds_after(self, cuts: tuple[int, ...]) -> Floats:
        """Bound by the end of the next stage, when the stages before begin at ``cuts``."""
        stage, at = len(cuts) - 1, cuts[-1]
        bounds = self._joint_bounds(cuts, stage, at)
        for cut in self.cuts:
            before = sum(cut.least[s][cuts[s], cuts[s + 1]] for s in range(stage))
            np.maximum(bounds, before + cut.least[stage][at] + cut.rest[stage + 1], out=bounds)
        return bounds

    def _joint_bounds(self, cuts: tuple[int, ...], stage: int, at: int) -> Floats:
        """The bottleneck paths together."""
        m = float(self.microbatches)
        after = self._after(stage, self._joint[stage + 1])
        if stage == 0:
            return np.asarray(np.maximum(self._first[0][at], self._first[1][at] + after))
        bounds = np.full(self._layers + 1, float(self._first[0][0, cuts[1]]))
        spent = float(self._first[1][0, cuts[1]] + 2 * self._transfer(0)[cuts[1]])
        for s in range(1, stage):
            pair = float(self._pairs[s][cuts[s], cuts[s + 1]])
            np.maximum(bounds, spent + m * pair, out=bounds)
            spent += pair + 2 * float(self._transfer(s)[cuts[s + 1]])
        pairs = self._pairs[stage][at]
        return np.asarray(np.maximum(bounds, spent + np.maximum(m * pairs, pairs + after)))

    def _joint_rest(self) -> list[Floats]:
        """``V`` of the module's docstring by stage; stage 0 with its step end."""
        rest = [_end(self._layers)]
        for s in range(self.stages - 1, -1, -1):
            pairs = self._first[1] if s == 0 else self._pairs[s]
            busy = self._first[0] if s == 0 else self.microbatches * self._pairs[s]
            rest.insert(0, np.maximum(busy, pairs + self._after(s, rest[0])).min(axis=1))
        return rest

    def _after(self, stage: int, rest: Floats) -> Floats:
        """What follows a stage's own pair on the way to a later bottleneck, by the stage's end."""
        if stage == self.stages - 1:
            return np.where(np.isinf(rest), np.inf, 0.0)
        return np.asarray(rest + 2 * self._transfer(stage))

    def _transfer(self, stage: int) -> Floats:
        """Seconds of a message from ``stage`` to the next one, by the first layer of the next one."""
        seconds = [float(relayouts.transfer_s[stage]) for relayouts in self.prices.relayouts]
        return np.array([seconds[kind] for kind in self.prices.order] + [0.0])

    def _least(self, stage: int, weights: Weights) -> Floats:
        """Lower bound on the contribution of a stage by (first layer, end); infinite where nothing fits."""
        unit, scale = weights.normalised()
        in_flight = in_flight_microbatches(SCHEDULE, stage, self.stages, self.microbatches)
        first = [self.prices.order.tolist().index(kind) for kind in set(self.prices.order.tolist())]
        buffers = min(message_buffers(self.prices, self.stages, stage, (layer, layer)) for layer in first)
        bounds = self.assigner.bounds(unit, in_flight, self.prices.contents.counts_SK, buffers)
        bounds[np.isfinite(bounds)] *= scale
        return np.append(bounds, np.inf)[self.prices.contents.of_interval]


def _end(layers: int) -> Floats:
    rest = np.full(layers + 1, np.inf)
    rest[layers] = 0.0
    return rest

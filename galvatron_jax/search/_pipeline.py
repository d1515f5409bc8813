"""A pipeline of given stage count, microbatches and batch: where to cut it, and how to spread each stage.

    minimise the longest path of the schedule over boundaries and strategies, every stage within the memory budget

The longest path is a maximum of linear functions (``_paths``), and for one linear function a stage's best strategies are known
exactly (``_assignment``). So every path seen gives a *cut*: with ``phi[s](i, j)`` the least contribution of stage ``s`` when it
holds the layers ``i`` to ``j``, any plan with boundaries ``c`` takes at least ``sum_s phi[s](c[s], c[s + 1])``.

**Boundaries** are searched depth first, from the first stage on. ``phi`` is bounded from below for all ``(i, j)`` at once
(``_relaxation``), and so is what the remaining stages add, by dynamic programming over the position: for each cut a sum, and
for the bottleneck paths together the recursion

    V[s](i) = min over j of max(m g[s](i, j), g[s](i, j) + 2 transfer + V[s + 1](j)),   g = least forward + backward

A beginning whose bound reaches the best step time known is left.

**Strategies** for complete boundaries (``_Partition``): take the best choice of each stage for the cut with the highest bound, play
the schedule, add its longest path as a new cut, and repeat until a bound meets the best time or nothing new appears. Then
branch: list all choices of one stage that no known bound excludes, fix each in turn, and go on. Every leaf is played exactly,
so the result is the optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..plan import ScheduleName
from ..schedule import Schedule, build_schedule, in_flight_microbatches
from ._assignment import Assigner
from ._knapsack import Floats
from ._paths import Path, bottleneck_path, longest_path
from ._pricing import Prices, message_buffers
from ._stage import ROUNDING, Span, StageChoice, Weights

SCHEDULE: ScheduleName = "1f1b"
MAX_CUTS = 24
"""Cuts kept for the boundaries; further ones serve only the partition that they come from."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Boundaries and strategies of one pipeline."""

    step_time_s: float
    boundaries: tuple[int, ...]
    """First layer of each stage, then the number of layers."""
    choices: tuple[StageChoice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
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
    _cuts: list[_Cut] = field(default_factory=list)
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
        return max([float(self._joint[0][0])] + [float(cut.rest[0][0]) for cut in self._cuts])

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
            found = _Partition(self, boundaries).solve(best)
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
        if len(self._cuts) < MAX_CUTS and all(cut.path != path for cut in self._cuts):
            least = [self._least(s, weights) for s, weights in enumerate(path.weights)]
            for s, crossings in enumerate(path.crossings):
                least[s] = least[s] + crossings * self._transfer(s)
            rest = [_end(self._layers)]
            for phi in reversed(least):
                rest.insert(0, (phi + rest[0]).min(axis=1))
            self._cuts.append(_Cut(path, least, rest))

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
        for cut in self._cuts:
            before = sum(cut.least[s][cuts[s], cuts[s + 1]] for s in range(stage))
            np.maximum(bounds, before + cut.least[stage][at] + cut.rest[stage + 1], out=bounds)
        return bounds

    def _joint_bounds(self, cuts: tuple[int, ...], stage: int, at: int) -> Floats:
        """The bottleneck paths together."""
        m = float(self.microbatches)
        after = self._after(stage, self._joint[stage + 1])
        if stage == 0:
            return np.maximum(self._first[0][at], self._first[1][at] + after)
        bounds = np.full(self._layers + 1, float(self._first[0][0, cuts[1]]))
        spent = float(self._first[1][0, cuts[1]] + 2 * self._transfer(0)[cuts[1]])
        for s in range(1, stage):
            pair = float(self._pairs[s][cuts[s], cuts[s + 1]])
            np.maximum(bounds, spent + m * pair, out=bounds)
            spent += pair + 2 * float(self._transfer(s)[cuts[s + 1]])
        pairs = self._pairs[stage][at]
        return np.maximum(bounds, spent + np.maximum(m * pairs, pairs + after))

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
        return rest + 2 * self._transfer(stage)

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
        bounds = np.where(np.isinf(bounds), np.inf, bounds * scale)
        return np.append(bounds, np.inf)[self.prices.contents.of_interval]


def _end(layers: int) -> Floats:
    rest = np.full(layers + 1, np.inf)
    rest[layers] = 0.0
    return rest


@dataclass(slots=True, eq=False)
class _Partition:
    """Fixed boundaries: the best strategies of all stages together."""

    pipeline: Pipeline
    boundaries: tuple[int, ...]
    spans: list[Span] = field(init=False)
    transfer_s: list[float] = field(init=False)
    paths: list[Path] = field(init=False)
    best: Solution | None = None

    def __post_init__(self) -> None:
        """Begin with the bottleneck paths, and with the cuts known for all boundaries."""
        stages, m = self.pipeline.stages, self.pipeline.microbatches
        self.spans = [self.pipeline.span(s, self.boundaries) for s in range(stages)]
        self.transfer_s = self.pipeline.transfers(self.boundaries)
        self.paths = [bottleneck_path(stages, m, s) for s in range(stages)]
        self.paths += [cut.path for cut in self.pipeline._cuts]

    def solve(self, known: Solution | None) -> Solution | None:
        """Return the best solution below the pipeline's limit, which ``known`` has set, or None."""
        self.best = known
        self._search({})
        return self.best if self.best is not known else None

    def _search(self, fixed: dict[int, StageChoice]) -> None:
        """Close the gap between bound and best time by new cuts, then branch over the choices of one stage."""
        seen: set[tuple[StageChoice, ...]] = set()
        while True:
            self.pipeline.report(self.best)
            bounds = [self._bound(path, fixed) for path in self.paths]
            leader = max(range(len(bounds)), key=bounds.__getitem__)
            if bounds[leader] >= self.pipeline.limit * (1 - ROUNDING):
                return
            chosen = [self._choice(s, self.paths[leader], fixed) for s in range(len(self.spans))]
            choices = tuple(choice for choice in chosen if choice is not None)
            path = self._play(choices)
            if choices in seen or path in self.paths:
                break
            seen.add(choices)
            self.paths.append(path)
            self.pipeline.learn(path)
        if len(fixed) < len(self.spans) and bounds[leader] < self.pipeline.limit * (1 - ROUNDING):
            self._branch(fixed, choices, path)

    def _branch(self, fixed: dict[int, StageChoice], choices: tuple[StageChoice, ...], path: Path) -> None:
        """Fix every choice of one stage that may be part of a better solution, the most promising first."""
        free = [s for s in range(len(self.spans)) if s not in fixed]
        stage = max(free, key=lambda s: choices[s].cost(path.weights[s]) - self._least(s, path, fixed))
        options = self._options(stage, fixed)
        ranked = sorted(
            ((max(self._bound(p, {**fixed, stage: option}) for p in self.paths), i) for i, option in enumerate(options))
        )
        for bound, i in ranked:
            if bound < self.pipeline.limit * (1 - ROUNDING):
                self._search({**fixed, stage: options[i]})

    def _options(self, stage: int, fixed: dict[int, StageChoice]) -> list[StageChoice]:
        """All choices of a stage that no known path excludes."""
        allowed = []
        for path in self.paths:
            if max(path.weights[stage]) > 0:
                least = self._least(stage, path, {})
                spare = self.pipeline.limit - self._bound(path, fixed)
                allowed.append((spare / least if least else np.inf, path.weights[stage], least + spare))
        _, weights, most = min(allowed)
        found = self.pipeline.assigner.within(self.spans[stage], weights, most)
        return [c for c in found if all(c.cost(w) <= top * (1 + ROUNDING) for _, w, top in allowed)]

    def _play(self, choices: tuple[StageChoice, ...]) -> Path:
        """Run the schedule, keep the solution if it is better, and return its longest path."""
        time_s, path = longest_path(self.pipeline.schedule, choices, self.transfer_s)
        if time_s < self.pipeline.limit:
            self.pipeline.limit = time_s
            self.best = Solution(time_s, self.boundaries, choices)
        return path

    def _bound(self, path: Path, fixed: dict[int, StageChoice]) -> float:
        stages = sum(self._least(s, path, fixed) for s in range(len(self.spans)))
        return stages + sum(k * t for k, t in zip(path.crossings, self.transfer_s, strict=True))

    def _least(self, stage: int, path: Path, fixed: dict[int, StageChoice]) -> float:
        """Least contribution of a stage to a path; infinite when nothing fits."""
        choice = self._choice(stage, path, fixed)
        return np.inf if choice is None else choice.cost(path.weights[stage])

    def _choice(self, stage: int, path: Path, fixed: dict[int, StageChoice]) -> StageChoice | None:
        if stage in fixed:
            return fixed[stage]
        unit, _ = path.weights[stage].normalised()
        return self.pipeline.assigner.cheapest(self.spans[stage], unit)

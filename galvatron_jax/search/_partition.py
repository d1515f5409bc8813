"""Fixed boundaries: the best strategies of all slices of a pipeline together, exactly.

The step time is the longest path of the schedule, a maximum of linear functions of the stages' times (``_paths``).
For one linear function each slice's best choice is known (``_assignment``), so every path is a lower bound:

    step time >= sum over slices of the least contribution to the path + its transfers

**Cuts.** Take the best choices for the path with the highest bound, play the schedule, add its longest path, and
repeat until a bound meets the best time known, or nothing new appears (a gap is left when paths ask one slice for
different choices).

**Branching.** Then list all choices of one slice that no known path excludes, fix each in turn, and go on with the
others. When all slices are fixed the schedule is played, so the best time found is the optimum.

Complexity: one play, O(stages * microbatches), for each cut; a few cuts and no branching in most problems, and never
more than ``MOST_BRANCHES`` branches (``TooHard``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..cost import Crossing
from ._bounds import Bounds
from ._knapsack import TooHard
from ._paths import Path, bottleneck_path, longest_path
from ._slices import Slices
from ._stage import ROUNDING, SliceChoice, SliceWeights, StageChoice, normalised

MOST_BRANCHES = 2000
"""Choices fixed for one set of boundaries."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Boundaries and strategies of one pipeline."""

    step_time_s: float
    boundaries: tuple[int, ...]
    """First layer of each stage, then the number of layers."""
    choices: tuple[StageChoice, ...]


@dataclass(slots=True, eq=False)
class Partition:
    """Fixed boundaries: the best strategies of all slices together."""

    line: Slices
    bounds: Bounds | None
    """Of all boundaries; learns the paths found here."""
    boundaries: tuple[int, ...]
    limit: float
    """Step time that a solution must stay below."""
    report: Callable[[Solution | None], None]
    """Called between steps with the best solution so far; may raise to stop the search."""
    crossings: list[Crossing] = field(init=False)
    paths: list[Path] = field(default_factory=list)
    """Known paths: the bottleneck paths and the cuts known for all boundaries, once it is solved."""
    best: Solution | None = None
    branches: int = 0

    def __post_init__(self) -> None:
        """Price the messages."""
        self.crossings = self.line.crossings(self.boundaries)

    @property
    def slices(self) -> int:
        """Number of device slices."""
        return self.line.shape.slices

    def _bottleneck(self, s: int) -> Path:
        return bottleneck_path(self.line.microbatches, s, self.line.prices.meets_B, self.line.shape.chunks)

    def solve(self, known: Solution | None) -> Solution | None:
        """Return the best solution below the limit, which ``known`` has set, or None."""
        self.best = known
        self.paths = [self._bottleneck(s) for s in range(self.slices)] + (
            self.bounds.paths if self.bounds is not None else []
        )
        self._search({})
        return self.best if self.best is not known else None

    def _search(self, fixed: dict[int, SliceChoice]) -> None:
        """Close the gap between bound and best time by new cuts, then branch over the choices of one slice."""
        seen: set[tuple[SliceChoice, ...]] = set()
        while True:
            self.report(self.best)
            bounds = [self._bound(path, fixed) for path in self.paths]
            leader = max(range(len(bounds)), key=bounds.__getitem__)
            if bounds[leader] >= self.limit * (1 - ROUNDING):
                return
            chosen = [self._choice(s, self.paths[leader], fixed) for s in range(self.slices)]
            choices = tuple(choice for choice in chosen if choice is not None)
            path = self._play(choices)
            if choices in seen or path in self.paths:
                break
            seen.add(choices)
            self.paths.append(path)
            if self.bounds is not None:
                self.bounds.learn(path)
        if len(fixed) < self.slices and bounds[leader] < self.limit * (1 - ROUNDING):
            self._branch(fixed, choices, path)

    def _branch(self, fixed: dict[int, SliceChoice], choices: tuple[SliceChoice, ...], path: Path) -> None:
        """Fix every choice of one slice that may be part of a better solution, the most promising first."""
        free = [s for s in range(self.slices) if s not in fixed]
        chosen = max(free, key=lambda s: choices[s].cost(self._weights(path, s)) - self._least(s, path, fixed))
        options = self._options(chosen, fixed)
        ranked = sorted(
            (
                (max(self._bound(p, {**fixed, chosen: option}) for p in self.paths), i)
                for i, option in enumerate(options)
            )
        )
        for bound, i in ranked:
            if bound < self.limit * (1 - ROUNDING):
                self.branches += 1
                if self.branches > MOST_BRANCHES:
                    raise TooHard
                self._search({**fixed, chosen: options[i]})

    def _options(self, chosen: int, fixed: dict[int, SliceChoice]) -> list[SliceChoice]:
        """All choices of a slice that no known path excludes."""
        allowed = []
        for path in self.paths:
            weights = self._weights(path, chosen)
            if max(map(max, weights)) > 0:
                least = self._least(chosen, path, {})
                spare = self.limit - self._bound(path, fixed)
                allowed.append((spare / least if least else np.inf, weights, least + spare))
        _, weights, most = min(allowed)
        found = self.line.assigner.within(self.line.span(chosen, self.boundaries), weights, most)
        return [c for c in found if all(c.cost(w) <= top * (1 + ROUNDING) for _, w, top in allowed)]

    def _play(self, choices: tuple[SliceChoice, ...]) -> Path:
        """Run the schedule, keep the solution if it is better, and return its longest path."""
        stages = tuple(choice.stages[c] for c in range(self.line.shape.chunks) for choice in choices)
        time_s, path = longest_path(self.line.order, self.slices, stages, self.crossings)
        if time_s < self.limit:
            self.limit = time_s
            self.best = Solution(time_s, self.boundaries, stages)
        return path

    def _bound(self, path: Path, fixed: dict[int, SliceChoice]) -> float:
        stages = sum(self._least(s, path, fixed) for s in range(self.slices))
        return stages + sum(k.seconds(c) for k, c in zip(path.crossings, self.crossings, strict=True))

    def _least(self, chosen: int, path: Path, fixed: dict[int, SliceChoice]) -> float:
        """Least contribution of a slice to a path; infinite when nothing fits."""
        if not any(map(any, self._weights(path, chosen))):
            return 0.0  # whether anything fits, its own bottleneck path tells
        choice = self._choice(chosen, path, fixed)
        return np.inf if choice is None else choice.cost(self._weights(path, chosen))

    def _choice(self, chosen: int, path: Path, fixed: dict[int, SliceChoice]) -> SliceChoice | None:
        if chosen in fixed:
            return fixed[chosen]
        unit, _ = normalised(self._weights(path, chosen))
        return self.line.assigner.cheapest(self.line.span(chosen, self.boundaries), unit)

    def _weights(self, path: Path, s: int) -> SliceWeights:
        return path.of_slice(s, self.line.shape.slices)

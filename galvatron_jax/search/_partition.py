"""Fixed boundaries: the best strategies of all stages of a pipeline together, exactly.

The step time is the longest path of the schedule, a maximum of linear functions of the stages' times (``_paths``).
For one linear function each stage's best choice is known (``_assignment``), so every path is a lower bound:

    step time >= sum over stages of the least contribution to the path + its transfers

**Cuts.** Take the best choices for the path with the highest bound, play the schedule, add its longest path, and
repeat until a bound meets the best time known, or nothing new appears (a gap is left when paths ask one stage for
different choices).

**Branching.** Then list all choices of one stage that no known path excludes, fix each in turn, and go on with the
others. When all stages are fixed the schedule is played, so the best time found is the optimum.

Complexity: one play, O(stages * microbatches), for each cut; a few cuts and no branching in most problems.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ._paths import Path, bottleneck_path, longest_path
from ._stage import ROUNDING, Span, StageChoice

if TYPE_CHECKING:
    from ._pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Solution:
    """Boundaries and strategies of one pipeline."""

    step_time_s: float
    boundaries: tuple[int, ...]
    """First layer of each stage, then the number of layers."""
    choices: tuple[StageChoice, ...]


@dataclass(slots=True, eq=False)
class Partition:
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
        self.paths += [cut.path for cut in self.pipeline.cuts]

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

"""The outer loop: every global batch, microbatch count and stage count, best first, until nothing can be better.

Objective: seconds per sample, ``step time / global batch``; of equals fewer stages, then the smaller batch.

A candidate (batch B, microbatches m, stages P) passes through two bounds before it is solved:

1. **rough**, without pricing anything: the pipeline has ``G`` seconds of matrix products per microbatch, at best
   ``G = B / m * FLOP per sample / (devices per stage * highest rate)``. Stages ``g_1 ... g_P`` with sum ``G`` take at
   least ``max over s of (m g_s + g_1 + ... + g_(s-1))``, which is least when all these are equal: ``G / (1 - (1 -
   1/m)^P)``.
2. **relaxed**: ``Pipeline.bound_s``, with layers in fractions and layouts for free.

The candidate with the lowest bound is taken next, so when the lowest bound left is not below the best solution, that
solution is the optimum of the whole space: the certificate. When a time limit or a signal stops the search, the
lowest bound left is what is proven.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ..cost import sample_flops
from ._assignment import Assigner
from ._partition import Solution
from ._pipeline import Pipeline
from ._pricing import PriceList, Prices, Problem
from ._space import microbatch_counts, stage_counts
from ._stage import ROUNDING


class Candidate(NamedTuple):
    """What the outer loop chooses; ordered as ties are broken."""

    stages: int
    global_batch: int
    microbatches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the search found and proved."""

    candidate: Candidate | None
    solution: Solution | None
    prices: Prices | None
    bound_s_per_sample: float
    """No plan of the space takes less per sample."""
    stopped: bool
    """The search ended before the proof was complete."""
    solved: int
    """Candidates solved exactly."""
    candidates: int
    """Candidates in the space."""


LAST_EFFORT_S = 1.0

_Entry: TypeAlias = tuple[float, Candidate, Pipeline | None]
"""(bound in seconds per sample, candidate, its relaxed bounds once they are made)."""


class Stop(Exception):
    """Raised by a poll to end the search with what it has."""


@dataclass(slots=True)
class Engine:
    """Best-first search over candidates."""

    problem: Problem
    global_batches: Sequence[int]
    poll: Callable[[float | None], None] = lambda best: None
    """Called often with the best seconds per sample so far; raises ``Stop`` to end the search."""
    below_s_per_sample: float = float("inf")
    """Only plans faster than this are looked for: without one, the space holds none."""
    prices: PriceList = field(init=False)
    _assigners: dict[int, Assigner] = field(default_factory=dict)
    _best: tuple[float, Candidate, Solution] | None = None
    _solved: int = 0
    _last_call_s: float | None = None
    """When the effort after a stop ends, on the monotonic clock."""

    def __post_init__(self) -> None:
        """Share one price list among all candidates."""
        self.prices = PriceList(self.problem)

    def run(self) -> Outcome:
        """Search the whole space."""
        every = self.candidates()
        heap: list[_Entry] = [(self.rough_bound_s(c) / c.global_batch, c, None) for c in every]
        heapq.heapify(heap)
        stopped = False
        try:
            while heap and heap[0][0] < self._limit(1) * (1 - ROUNDING):
                self._ask()
                self._advance(heap)
        except Stop:
            stopped = True
            self._last_effort(heap)
        open_bounds = [heap[0][0]] if stopped and heap else []
        chosen = self._best[1] if self._best else None
        return Outcome(
            candidate=chosen,
            solution=self._best[2] if self._best else None,
            prices=self.prices_of(chosen) if chosen else None,
            bound_s_per_sample=min(open_bounds + ([self._best[0]] if self._best else []), default=float("inf")),
            stopped=stopped,
            solved=self._solved,
            candidates=len(every),
        )

    def candidates(self) -> list[Candidate]:
        """Return all candidates of the space."""
        return [
            Candidate(stages, batch, microbatches)
            for batch in sorted(set(self.global_batches))
            for stages in stage_counts(self.problem.cluster, self.problem.model, self.problem.limits)
            for microbatches in microbatch_counts(batch, self.problem.limits)
        ]

    def prices_of(self, candidate: Candidate) -> Prices | None:
        """Return the prices of a candidate; None when some layer has no legal strategy."""
        microbatch = candidate.global_batch // candidate.microbatches
        return self.prices.at(candidate.stages, microbatch, candidate.microbatches)

    def rough_bound_s(self, candidate: Candidate) -> float:
        """Return a lower bound on the step time by the matrix products alone."""
        hardware, model, m = self.problem.hardware, self.problem.model, candidate.microbatches
        dtypes = {dot.dtype for kind in model.kinds for dot in kind.dots}
        rate = max((hardware.matmul_flops_per_s.get(dtype, float("inf")) for dtype in dtypes), default=float("inf"))
        shares = [point.efficiency for point in hardware.matmul_efficiency] + [*hardware.attention_efficiency.values()]
        devices = self.problem.cluster.devices // candidate.stages
        work = candidate.global_batch / m * sample_flops(model) / (devices * rate * max(shares))
        return float(work / (1 - (1 - 1 / m) ** candidate.stages))

    def _advance(self, heap: list[_Entry]) -> None:
        """Bound the first candidate better, or solve it."""
        bound, candidate, pipeline = heap[0]
        if pipeline is None:
            heapq.heappop(heap)
            pipeline = self._refine(candidate)
            if pipeline is None:
                return
            heapq.heappush(heap, (max(bound, pipeline.bound_s / candidate.global_batch), candidate, pipeline))
            if self._best is not None:
                return
            # the first candidate that fits is solved at once: a search that is stopped early should have some plan
        entry = next(entry for entry in heap if entry[2] is pipeline)
        found = pipeline.solve(self._limit(candidate.global_batch))
        heap.remove(entry)  # not before: until its proof is complete its bound is part of what is proven
        heapq.heapify(heap)
        self._solved += 1
        if found is not None:
            self._keep(candidate, found)

    def _last_effort(self, heap: list[_Entry]) -> None:
        """After a stop: solve the most promising candidate of one stage, mostly some milliseconds, never long."""
        self._last_call_s = time.monotonic() + LAST_EFFORT_S
        single = [entry for entry in heap if entry[2] is not None and entry[1].stages == 1]
        with contextlib.suppress(Stop):
            for _, candidate, pipeline in sorted(single, key=lambda entry: entry[:2])[:1]:
                found = pipeline.solve(self._limit(candidate.global_batch)) if pipeline else None
                if found is not None:
                    self._keep(candidate, found)

    def _refine(self, candidate: Candidate) -> Pipeline | None:
        """Price a candidate and bound it; None when it has no legal strategies or nothing fits or is fast enough."""
        prices = self.prices_of(candidate)
        if prices is None:
            return None
        assigner = self._assigners.setdefault(id(prices), Assigner(prices, self.problem.budget_bytes, self._ask))
        pipeline = Pipeline(
            prices,
            assigner,
            candidate.stages,
            candidate.microbatches,
            lambda solution: self._report(candidate, solution),
        )
        return pipeline if pipeline.bound_s < self._limit(candidate.global_batch) else None

    def _report(self, candidate: Candidate, solution: Solution | None) -> None:
        """Keep what a pipeline has so far, so that a search that is stopped has it; then ask whether to go on."""
        if solution is not None:
            self._keep(candidate, solution)
        self._ask()

    def _ask(self) -> None:
        """Raise ``Stop`` when the search is to end."""
        if self._last_call_s is None:
            self.poll(self._best and self._best[0])
        elif time.monotonic() > self._last_call_s:
            raise Stop

    def _keep(self, candidate: Candidate, solution: Solution) -> None:
        per_sample = solution.step_time_s / candidate.global_batch
        if self._best is None or per_sample < self._best[0]:
            self._best = (per_sample, candidate, solution)

    def _limit(self, global_batch: int) -> float:
        """Step time that a better solution must stay below."""
        return (self._best[0] if self._best else self.below_s_per_sample) * global_batch

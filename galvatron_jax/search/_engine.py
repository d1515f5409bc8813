"""The outer loop: every batch, microbatch count, stage count and schedule, best first, until nothing can be better.

Objective: seconds per sample, ``step time / global batch``; of equals fewer device slices, then the smaller batch, the
fewer microbatches, 1f1b before gpipe before interleaved, the fewer chunks.

A candidate (batch B, microbatches m, S slices, schedule, v chunks) passes through three bounds before it is solved. Let
``G`` be the least seconds of one microbatch's passes through the whole model, on the devices of one slice. Slices that
take ``g_1 ... g_S`` of it, with one stage each, take at least ``max over s of (m g_s + g_1 + ... + g_(s-1))``, which is
least when all these are equal: ``G / (1 - (1 - 1/m)^S)``. With several stages each, that begin at the layers ``c``
(``_space.even_cuts``), the mean over s of the same is at least ``(m G + sum over 0 < r < S of G_(c_r)) / S``, with
``G_n`` of the first ``n`` layers.

1. **rough**, without pricing anything: ``G`` counts products and memory-bound traffic, divided by the slice's devices
   (``cost.least_seconds``);
2. **whole**: ``G`` is the Lagrangian bound of all layers together, with the memory of every slice and the microbatches
   in flight there, but with layers in fractions, layouts for free and no boundaries (``_whole``);
3. **relaxed**: ``Pipeline.bound_s``, which knows boundaries.

The candidate with the lowest bound is taken next, so when the lowest bound left is not below the best solution, that
solution is the optimum of the whole space: the certificate. When a time limit or a signal stops the search, the
lowest bound left is what is proven. So it is when a candidate was too hard to solve (``TooHard``): its bound stays.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from ..plan import ScheduleName
from ._assignment import Assigner
from ._knapsack import Ints, TooHard
from ._partition import Solution
from ._pipeline import Pipeline
from ._pricing import PriceList, Prices, Problem, least_bytes
from ._slices import Slices
from ._space import Shape, even_cuts, microbatch_counts, shapes, stage_counts
from ._stage import ROUNDING
from ._whole import whole_seconds


class Candidate(NamedTuple):
    """What the outer loop chooses; ordered as ties are broken."""

    slices: int
    global_batch: int
    microbatches: int
    schedule: ScheduleName
    chunks: int

    @property
    def shape(self) -> Shape:
        """How its pipeline runs."""
        return Shape(self.slices, self.schedule, self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the search found and proved."""

    candidate: Candidate | None
    solution: Solution | None
    prices: Prices | None
    bound_s_per_sample: float
    """No plan of the space takes less per sample."""
    stopped: bool
    """The search ended, or gave a candidate up, before the proof was complete."""
    solved: int
    """Candidates solved exactly."""
    candidates: int
    """Candidates in the space."""


LAST_EFFORT_S = 1.0

_Entry: TypeAlias = tuple[float, Candidate, bool, Pipeline | None]
"""(bound in seconds per sample, candidate, whether its whole bound is in, its relaxed bounds once they are made)."""


def all_candidates(problem: Problem, global_batches: Sequence[int]) -> list[Candidate]:
    """Return all candidates of the space."""
    limits, layers = problem.limits, problem.model.layer_count
    return [
        Candidate(slices, batch, microbatches, schedule, chunks)
        for batch in sorted(set(global_batches))
        for slices in stage_counts(problem.cluster, problem.model, limits)
        for microbatches in microbatch_counts(batch, limits)
        for _, schedule, chunks in shapes(slices, microbatches, layers, limits)
    ]


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
    _cuts: dict[int, Ints] = field(default_factory=dict)
    _best: tuple[float, Candidate, Solution] | None = None
    _solved: int = 0
    _given_up: float = float("inf")
    """Lowest bound of the candidates that were too hard to solve, in seconds per sample."""
    _last_call_s: float | None = None
    """When the effort after a stop ends, on the monotonic clock."""

    def __post_init__(self) -> None:
        """Share one price list among all candidates."""
        self.prices = PriceList(self.problem)

    def run(self) -> Outcome:
        """Search the whole space."""
        every = self.candidates()
        heap: list[_Entry] = [(self.rough_bound_s(c) / c.global_batch, c, False, None) for c in every]
        stopped = False
        try:
            self._first_plan(heap)
            while heap and heap[0][0] < self._limit(1) * (1 - ROUNDING):
                self._ask()
                self._advance(heap)
        except Stop:
            stopped = True
            self._last_effort(heap)
        open_bound = min(self._given_up, heap[0][0] if stopped and heap else float("inf"))
        best = self._best[0] if self._best else float("inf")
        chosen = self._best[1] if self._best else None
        return Outcome(
            candidate=chosen,
            solution=self._best[2] if self._best else None,
            prices=self.prices_of(chosen) if chosen else None,
            bound_s_per_sample=min(open_bound, best),
            stopped=stopped or open_bound < best,
            solved=self._solved,
            candidates=len(every),
        )

    def candidates(self) -> list[Candidate]:
        """Return all candidates of the space."""
        return all_candidates(self.problem, self.global_batches)

    def prices_of(self, candidate: Candidate) -> Prices | None:
        """Return the prices of a candidate; None when some layer has no legal strategy."""
        microbatch = candidate.global_batch // candidate.microbatches
        return self.prices.at(candidate.slices, microbatch, candidate.microbatches)

    def rough_bound_s(self, candidate: Candidate) -> float:
        """Return a lower bound on the step time by products and traffic alone."""
        samples = candidate.global_batch / candidate.microbatches
        devices = self.problem.cluster.devices // candidate.slices
        return self._filled(candidate, self.prices.least_seconds(samples / devices))

    def whole_bound_s(self, candidate: Candidate) -> float:
        """Return a lower bound on the step time by the prices of all layers together; infinite: nothing can fit."""
        prices = self.prices_of(candidate)
        if prices is None or least_bytes(prices) > candidate.slices * self.problem.budget_bytes:
            return float("inf")
        cuts = None if candidate.chunks == 1 else self._even_cuts(candidate.shape.stages)
        if cuts is not None and not len(cuts):
            return float("inf")
        least = whole_seconds(prices, self._assigner(prices), candidate.shape, candidate.microbatches, cuts)
        return self._filled(candidate, least)

    def _filled(self, candidate: Candidate, least: Sequence[float]) -> float:
        """Step time by the least seconds of one microbatch through the first ``n`` layers (at index ``n``)."""
        m, slices, total = candidate.microbatches, candidate.slices, least[-1]
        if candidate.chunks == 1:
            return total / (1 - (1 - 1 / m) ** slices)
        begins = self._even_cuts(candidate.shape.stages)[:, 1:slices].T
        fill = np.array(least)[begins].sum(axis=0).min(initial=np.inf)
        return float(m * total + fill) / slices

    def _even_cuts(self, stages: int) -> Ints:
        if stages not in self._cuts:
            self._cuts[stages] = even_cuts(stages, self.prices.work)
        return self._cuts[stages]

    def _first_plan(self, heap: list[_Entry]) -> None:
        """Solve candidates without a pipeline until one fits: quick work, and the bounds need a plan to beat."""
        single = [entry for entry in heap if entry[1].slices == 1]
        rest = [entry for entry in heap if entry[1].slices > 1]
        heapq.heapify(single)
        try:
            while single and self._best is None and single[0][0] < self.below_s_per_sample:
                self._ask()
                self._advance(single)
        finally:
            heap[:] = single + rest
            heapq.heapify(heap)

    def _advance(self, heap: list[_Entry]) -> None:
        """Bound the first candidate better, or solve it."""
        bound, candidate, _, pipeline = first = heap[0]
        try:
            if pipeline is None:
                heapq.heappop(heap)
                better = self._bounded(first)
                if better is not None:
                    heapq.heappush(heap, better)
                return
            found = pipeline.solve(self._limit(candidate.global_batch))
        except TooHard:
            self._given_up, found = min(self._given_up, bound), None
            if pipeline is None:
                return
            self._try_roughly(candidate)
        entry = next(entry for entry in heap if entry[3] is pipeline)
        heap.remove(entry)  # not before: until its proof is complete its bound is part of what is proven
        heapq.heapify(heap)
        self._solved += 1
        if found is not None:
            self._keep(candidate, found)

    def _try_roughly(self, candidate: Candidate) -> None:
        """Look for a good plan of a candidate whose best one is too hard to find."""
        prices = self.prices_of(candidate)
        assert prices is not None
        assigner = Assigner(prices, self.problem.budget_bytes, self._ask, exact=False)
        line = Slices(prices, assigner, candidate.shape, candidate.microbatches)
        limit = self._limit(candidate.global_batch)
        with contextlib.suppress(TooHard):
            found = Pipeline(line, lambda solution: self._report(candidate, solution), limit).solve(limit)
            if found is not None:
                self._keep(candidate, found)

    def _bounded(self, entry: _Entry) -> _Entry | None:
        """Return the entry with its next bound; None when that reaches the limit."""
        bound, candidate, priced, _ = entry
        if not priced:
            better = max(bound, self.whole_bound_s(candidate) / candidate.global_batch)
            below = better * candidate.global_batch < self._limit(candidate.global_batch)
            return (better, candidate, True, None) if below else None
        pipeline = self.refined(candidate)
        if pipeline is None:
            return None
        return max(bound, pipeline.bound_s / candidate.global_batch), candidate, True, pipeline

    def _last_effort(self, heap: list[_Entry]) -> None:
        """After a stop: solve the most promising candidate of one stage, mostly some milliseconds, never long."""
        self._last_call_s = time.monotonic() + LAST_EFFORT_S
        single = [entry for entry in heap if entry[3] is not None and entry[1].slices == 1]
        with contextlib.suppress(Stop, TooHard):
            for _, candidate, _, pipeline in sorted(single, key=lambda entry: entry[:2])[:1]:
                found = pipeline.solve(self._limit(candidate.global_batch)) if pipeline else None
                if found is not None:
                    self._keep(candidate, found)

    def refined(self, candidate: Candidate) -> Pipeline | None:
        """Price a candidate and bound it; None when it has no legal strategies or nothing fits or is fast enough."""
        prices = self.prices_of(candidate)
        if prices is None:
            return None
        limit = self._limit(candidate.global_batch)
        line = Slices(prices, self._assigner(prices), candidate.shape, candidate.microbatches)
        pipeline = Pipeline(line, lambda solution: self._report(candidate, solution), limit)
        return pipeline if pipeline.bound_s < limit else None

    def _assigner(self, prices: Prices) -> Assigner:
        return self._assigners.setdefault(id(prices), Assigner(prices, self.problem.budget_bytes, self._ask))

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

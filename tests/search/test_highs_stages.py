"""The search against HiGHS with several stages: the schedule itself written down as an integer program.

For each choice of boundaries: x[i, r] = 1 where layer i takes option r, y[i, a, b] = 1 where the layout changes from a
to b before layer i inside a stage, L[s] the largest live layer of stage s (in budgets), e[n] when event n ends, T the
step time. An action ends after the event before it on its slice, and after the message that it waits for, by its own
duration, which is linear in x and y; a message after its value is made, and between nodes after the events before it on
both sides. Nothing of the search's own is used but the prices of the options.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import defaultdict
from typing import TypeAlias

import msgspec
import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[attr-defined]  # scipy has no stubs here
from scipy.sparse import coo_matrix

from galvatron_jax.cluster import Cluster, parse_cluster
from galvatron_jax.events import Compute, Transfer, global_order
from galvatron_jax.plan import ScheduleName, Training
from galvatron_jax.profile import LayerRun
from galvatron_jax.schedule import build_schedule, in_flight_microbatches
from galvatron_jax.search._engine import Candidate, Engine
from galvatron_jax.search._infeasible import least_peak_bytes
from galvatron_jax.search._plan_building import outcome_plan, peak_bytes
from galvatron_jax.search._pricing import Prices, Problem, message_buffers
from galvatron_jax.search._rules import forbid
from galvatron_jax.search._space import Limits
from tests.search.problems import model_of, random_hardware, random_rules

SAME = 1e-6
Linear: TypeAlias = "defaultdict[int, float]"
"""Coefficients by variable."""


def medium_problem(seed: int) -> tuple[Problem, Candidate]:
    """Return a problem of 6 to 9 layers in 2 or 3 stages."""
    draw = random.Random(seed)
    model = model_of("e1 l1 d1 h1", draw)
    runs = (("embed", 1), ("layers.*", draw.randint(2, 4)), ("decoder.*", draw.randint(2, 3)), ("head", 1))
    model = msgspec.structs.replace(model, layers=tuple(LayerRun(kind=kind, count=n) for kind, n in runs))
    mesh, slices = draw.choice([("2x2", 2), ("2x4", 2), ("3x2", 3), ("1x4", 2), ("3x1", 3)])
    schedules: list[ScheduleName] = ["1f1b", "1f1b", "gpipe"]
    cluster, schedule = parse_cluster(mesh), draw.choice(schedules)
    microbatches = draw.choice([2, 3, 4])
    limits = Limits(
        stages=(slices,),
        microbatches=(microbatches,),
        schedules=(schedule,),
        rules=(*random_rules(draw)[:2], forbid("tp>2"), forbid("ulysses>2")),
    )
    problem = Problem(
        model=model,
        cluster=cluster,
        hardware=random_hardware(draw),
        training=Training(),
        budget_bytes=1e18,
        limits=limits,
    )
    batch = 2 * cluster.devices * microbatches
    return problem, Candidate(slices, batch, microbatches, schedule, 1)


class Program:
    """The integer program of one choice of boundaries."""

    def __init__(
        self, prices: Prices, candidate: Candidate, cluster: Cluster, cuts: tuple[int, ...], budget: float
    ) -> None:
        self.prices, self.candidate, self.cluster, self.cuts, self.budget = prices, candidate, cluster, cuts, budget
        self.size = 0
        self.whole: list[int] = []
        self.rows: list[tuple[Linear, float, float]] = []

    def variable(self, *, whole: bool = False) -> int:
        self.whole.append(int(whole))
        self.size += 1
        return self.size - 1

    def row(self, terms: Linear, low: float, high: float) -> None:
        self.rows.append((terms, low, high))

    def step_time_s(self) -> float:
        """Return the optimum; infinite when nothing fits."""
        durations = [self._stage(s) for s in range(self.candidate.slices)]
        end = self._play(durations)
        matrix = coo_matrix(  # type: ignore[no-untyped-call]
            (
                [value for terms, *_ in self.rows for value in terms.values()],
                ([n for n, (terms, *_) in enumerate(self.rows) for _ in terms], [v for t, *_ in self.rows for v in t]),
            ),
            shape=(len(self.rows), self.size),
        ).tocsr()
        low, high = ([row[k] for row in self.rows] for k in (1, 2))
        cost = np.zeros(self.size)
        cost[end] = 1.0
        found = milp(  # type: ignore[no-untyped-call]
            cost,
            constraints=LinearConstraint(matrix, low, high),  # type: ignore[no-untyped-call]
            integrality=np.array(self.whole),
            bounds=Bounds(0, np.where(np.array(self.whole) == 1, 1, np.inf)),  # type: ignore[no-untyped-call]
            options={"mip_rel_gap": 1e-9},
        )
        return float(found.fun) * self.unit_s if found.success else np.inf

    @property
    def unit_s(self) -> float:
        """Seconds of the program's unit, so that its numbers are about 1."""
        return max(float(kind.forward_s.max()) for kind in self.prices.kinds)

    def _stage(self, s: int) -> tuple[Linear, Linear, Linear]:
        """Write one stage down; return its forward, backward and step end."""
        start, stop = self.cuts[s], self.cuts[s + 1]
        forward, backward, step_end, held = (defaultdict[int, float](float) for _ in range(4))
        live, before = self.variable(), dict[int, list[int]]()
        held[live] = self.budget
        in_flight = in_flight_microbatches(
            self.candidate.schedule, s, self.candidate.slices, self.candidate.microbatches
        )
        counts = self.prices.counts((kind, 1) for kind in self.prices.order[start:stop].tolist())
        here = self.prices.holding(int(self.prices.straight_layers(counts)))
        for i in range(start, stop):
            kind = int(here.order[i])
            table, relayouts = here.kinds[kind], here.relayouts[kind]
            options: dict[int, list[int]] = defaultdict(list)
            for r, layout in enumerate(table.layout.tolist()):
                x = self.variable(whole=True)
                options[layout].append(x)
                forward[x], backward[x] = table.forward_s[r], table.backward_s[r]
                step_end[x] = table.step_end_s[r]
                held[x] = table.state_bytes[r] + in_flight * table.residual_bytes[r]
                share = float(table.live_bytes[r]) / self.budget
                self.row(defaultdict(float, {live: -1.0, x: share}), -np.inf, 0.0)
                if i == start and s > 0:
                    forward[x] += relayouts.from_wire_s[0][layout]
                    backward[x] += relayouts.from_wire_s[1][layout]
                if i == stop - 1 and stop < len(self.prices.order):
                    leaving = self.prices.relayouts[int(self.prices.order[stop])].to_wire_s
                    forward[x] += leaving[0][layout]
                    backward[x] += leaving[1][layout]
            self.row(defaultdict(float, {x: 1.0 for some in options.values() for x in some}), 1.0, 1.0)
            arriving, leaving_by = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
            for a, b in itertools.product(before, options):
                y = self.variable()
                forward[y], backward[y] = relayouts.forward_s[a, b], relayouts.backward_s[a, b]
                leaving_by[a].append(y)
                arriving[b].append(y)
            for ys, xs in ((leaving_by, before), (arriving, options)):
                for layout in ys:
                    flow = {y: 1.0 for y in ys[layout]} | {x: -1.0 for x in xs[layout]}
                    self.row(defaultdict(float, flow), 0.0, 0.0)
            before = dict(options)
        buffers = message_buffers(
            self.prices, self.candidate.slices, s, (start, stop), goes_on=in_flight < self.candidate.microbatches
        )
        self.row(divided(held, self.budget), -np.inf, 1 - buffers / self.budget)
        return divided(forward, self.unit_s), divided(backward, self.unit_s), divided(step_end, self.unit_s)

    def _play(self, durations: list[tuple[Linear, Linear, Linear]]) -> int:
        """Write the schedule down; return the variable of the step time."""
        slices, end = self.candidate.slices, self.variable()
        schedule = build_schedule(self.candidate.schedule, slices, self.candidate.microbatches)
        order = global_order(schedule, slices)
        ends = {event: self.variable() for event in order}
        last: list[int | None] = [None] * slices
        for event in order:
            if isinstance(event, Compute):
                s, backward = event.stage, event.phase == "backward"
                waits = [last[s], *(ends[t] for t in order if isinstance(t, Transfer) and t.taker == event)]
                for before in waits:
                    self._after(ends[event], before, durations[s][backward], 0.0)
                last[s] = ends[event]
                continue
            wire = float(self.prices.transfer_BJ[event.boundary, self.cuts[event.boundary + 1]]) / self.unit_s
            self._after(ends[event], ends[event.maker], defaultdict(float), wire)
            if self._leaves_node(event.boundary):
                held = float(self.prices.sender_BJ[event.boundary, self.cuts[event.boundary + 1]]) / self.unit_s
                free = self.variable()
                for s in (event.source, event.target):
                    self._after(ends[event], last[s], defaultdict(float), wire)
                    self._after(free, last[s], defaultdict(float), held)
                self._after(free, ends[event.maker], defaultdict(float), held)
                last[event.source], last[event.target] = free, ends[event]
        for s in range(slices):
            self._after(end, last[s], durations[s][2], 0.0)
        return end

    def _leaves_node(self, boundary: int) -> bool:
        """Tell whether a boundary lies between two nodes: a message over it holds both sides."""
        return (boundary + 1) * self.cluster.devices // self.candidate.slices % self.cluster.gpus_per_node == 0

    def _after(self, this: int, before: int | None, duration: Linear, wait: float) -> None:
        """``this`` comes at least ``wait + duration`` after ``before``."""
        terms = defaultdict[int, float](float, {v: -n for v, n in duration.items()})
        terms[this] += 1.0
        if before is not None:
            terms[before] -= 1.0
        self.row(terms, wait, np.inf)


def divided(terms: Linear, unit: float) -> Linear:
    return defaultdict(float, {v: value / unit for v, value in terms.items()})


@pytest.mark.parametrize("seed", range(30))
def test_search_of_several_stages_equals_highs(seed: int) -> None:
    free, candidate = medium_problem(seed)
    draw, plan = random.Random(seed), outcome_plan(free, Engine(free, (candidate.global_batch,)).run())
    assert plan is not None
    least = least_peak_bytes(Engine(free, (candidate.global_batch,)))
    assert least is not None
    budget = least + draw.choice([0.05, 0.3, 0.6]) * (peak_bytes(plan) - least)
    problem = dataclasses.replace(free, budget_bytes=budget)
    engine = Engine(problem, (candidate.global_batch,))
    outcome, prices = engine.run(), engine.prices_of(candidate)
    assert prices is not None
    layers = problem.model.layer_count
    every = [(0, *inner, layers) for inner in itertools.combinations(range(1, layers), candidate.slices - 1)]
    expected = min(Program(prices, candidate, problem.cluster, cuts, budget).step_time_s() for cuts in every)
    assert outcome.solution is not None
    assert outcome.solution.step_time_s == pytest.approx(expected, rel=SAME)

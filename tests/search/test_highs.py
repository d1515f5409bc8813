"""The search against HiGHS: medium problems of one stage as integer programs, written down from the same prices.

Variables: x[i, r] = 1 where layer i takes option r, and y[i, a, b] = 1 where the layout changes from a to b before
layer i; minimise the step time, hold the memory at each threshold of the largest live layer. Nothing of the search's
own is used but the prices of the options (which ``test_exact`` holds against ``estimate_plan``).
"""

from __future__ import annotations

import dataclasses
import random
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[attr-defined]  # scipy has no stubs here
from scipy.sparse import csr_matrix

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.plan import Training
from galvatron_jax.profile import LayerRun
from galvatron_jax.search._engine import Candidate, Engine
from galvatron_jax.search._pricing import Prices, Problem
from galvatron_jax.search._rules import forbid
from galvatron_jax.search._space import Limits
from tests.search.problems import model_of, random_hardware, random_rules

SAME = 1e-6


class Medium(NamedTuple):
    """A problem that nobody can try out."""

    problem: Problem
    batch: int
    microbatches: int


def medium_problem(seed: int) -> Medium:
    """Return a problem of 6 to 14 layers on 4 to 16 devices, one stage; in every fourth the kinds take turns."""
    draw = random.Random(seed)
    model = model_of("e1 l1 d1 h1", draw)
    a, b = draw.randint(2, 6), draw.randint(2, 6)
    inner = (("layers.*", a), ("decoder.*", b)) if seed % 4 else (("layers.*", 1), ("decoder.*", 1)) * min(a, b)
    runs = (("embed", 1), *inner, ("head", 1))
    model = msgspec.structs.replace(model, layers=tuple(LayerRun(kind=kind, count=n) for kind, n in runs))
    cluster = parse_cluster(draw.choice(["1x4", "2x4", "1x8", "2x2", "4x2", "3x2"]))
    batch = 4 * cluster.devices
    limits = Limits(max_stages=1, rules=(*random_rules(draw)[:2], forbid("tp>4"), forbid("ulysses>4")))
    problem = Problem(
        model=model,
        cluster=cluster,
        hardware=random_hardware(draw),
        training=Training(),
        budget_bytes=1e18,
        limits=limits,
    )
    return Medium(problem, batch, draw.choice([1, 2, 4]))


class Program(NamedTuple):
    """One integer program per threshold; what is common to all."""

    columns: list[tuple[int, int, float]]
    """(layer, layout, cost) of each x."""
    sizes: np.typing.NDArray[np.float64]
    live: np.typing.NDArray[np.float64]
    moves: list[tuple[int, int, int, float]]
    """(layer that takes the stream, layout before, layout after, cost) of each y."""
    layers: int
    layouts: int


def program_of(prices: Prices, microbatches: int) -> Program:
    """Write the one-stage problem down."""
    columns, sizes, live, moves, order = [], [], [], [], prices.order.tolist()
    for i, kind in enumerate(order):
        table = prices.kinds[kind]
        for r in range(len(table.layout)):
            seconds = microbatches * (table.forward_s[r] + table.backward_s[r]) + table.step_end_s[r]
            columns.append((i, int(table.layout[r]), float(seconds)))
            sizes.append(float(table.state_bytes[r] + table.residual_bytes[r]))
            live.append(float(table.live_bytes[r]))
        if i:
            relayouts = prices.relayouts[kind]
            for a in range(len(prices.layouts)):
                for b in range(len(prices.layouts)):
                    change = microbatches * float(relayouts.forward_s[a, b] + relayouts.backward_s[a, b])
                    moves.append((i, a, b, change))
    return Program(columns, np.array(sizes), np.array(live), moves, len(order), len(prices.layouts))


def solve(program: Program, budget: float) -> float:
    """Return the least step time that HiGHS finds over all thresholds; infinite when nothing fits."""
    best = np.inf
    for threshold in sorted(set(program.live.tolist())):
        found = _at_threshold(program, budget, threshold)
        best = min(best, found)
    return best


def _at_threshold(program: Program, budget: float, threshold: float) -> float:
    xs, ys = len(program.columns), len(program.moves)
    cost = np.array([c for *_, c in program.columns] + [c for *_, c in program.moves])
    scale = max(float(cost.max()), 1e-30)
    rows, low, high = [], [], []
    for i in range(program.layers):  # one option for each layer
        rows.append({k: 1.0 for k, (layer, _, _) in enumerate(program.columns) if layer == i})
        low.append(1.0)
        high.append(1.0)
    for i in range(1, program.layers):  # the change before layer i leaves the layout of i - 1 and enters that of i
        for layout in range(program.layouts):
            for at, part in ((i - 1, 1), (i, 2)):
                row = {xs + k: 1.0 for k, move in enumerate(program.moves) if move[0] == i and move[part] == layout}
                row |= {k: -1.0 for k, (j, where, _) in enumerate(program.columns) if j == at and where == layout}
                rows.append(row)
                low.append(0.0)
                high.append(0.0)
    rows.append(dict(enumerate((program.sizes / budget).tolist())))
    low.append(-np.inf)
    high.append((budget - threshold) / budget)
    matrix = csr_matrix(  # type: ignore[no-untyped-call]
        (
            [value for row in rows for value in row.values()],
            ([i for i, row in enumerate(rows) for _ in row], [k for row in rows for k in row]),
        ),
        shape=(len(rows), xs + ys),
    )
    allowed = np.append(program.live <= threshold, np.ones(ys, bool)).astype(float)
    found = milp(  # type: ignore[no-untyped-call]
        cost / scale,
        constraints=LinearConstraint(matrix, low, high),  # type: ignore[no-untyped-call]
        integrality=np.append(np.ones(xs), np.zeros(ys)),
        bounds=Bounds(0, allowed),  # type: ignore[no-untyped-call]
        options={"mip_rel_gap": 1e-9},
    )
    return float(found.fun) * scale if found.success else np.inf


@pytest.mark.parametrize("seed", range(32))
def test_search_on_a_medium_problem_equals_highs(seed: int) -> None:
    medium = medium_problem(seed)
    free = Engine(medium.problem, (medium.batch,))
    candidate = Candidate(1, medium.batch, medium.microbatches, "1f1b", 1)
    prices = free.prices_of(candidate)
    assert prices is not None
    program = program_of(prices, medium.microbatches)
    smallest = sum(
        min(size for (layer, *_), size in zip(program.columns, program.sizes, strict=True) if layer == i)
        for i in range(program.layers)
    )
    tightness = random.Random(seed).choice([1.3, 1.7, 2.5])
    budget = tightness * (smallest + float(program.live.min()))
    limits = dataclasses.replace(medium.problem.limits, microbatches=(medium.microbatches,))
    problem = dataclasses.replace(medium.problem, budget_bytes=budget, limits=limits)
    outcome = Engine(problem, (medium.batch,)).run()
    expected = solve(program, budget)
    found = outcome.solution.step_time_s if outcome.solution else np.inf
    assert found == pytest.approx(expected, rel=SAME)

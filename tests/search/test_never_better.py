"""No legal plan that the cost model prices is better than the answer: random plans, baselines, on many settings."""

from __future__ import annotations

import dataclasses
import itertools
import random

import msgspec
import pytest

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.cost import estimate_plan
from galvatron_jax.plan import Plan, PlanRun, Stage, Training, model_reference
from galvatron_jax.profile import LayerRun
from galvatron_jax.search import _knapsack, find_plan
from galvatron_jax.search._engine import Engine
from galvatron_jax.search._find import search
from galvatron_jax.search._plan_building import peak_bytes
from galvatron_jax.search._pricing import Problem
from galvatron_jax.search._space import Limits, even_cuts, legal, shapes, stage_counts, stage_strategies
from tests.search.brute_force import work
from tests.search.problems import model_of, random_hardware

MESHES = ("1x1", "1x2", "1x3", "2x2", "1x5", "1x6", "3x2", "1x8", "2x4", "3x4", "5x2", "4x4")
LAYERS = ("e1 l5 h1", "e1 l2 d2 h1", "l3 d1 l3", "e1 l1 d1 l1 d1 h1", "e1 l8 h1")
PLANS = 60
SAME = 1e-11
NEAR = 0.01
"""Largest proven gap of a good plan that is not the best."""


def random_plan(model, cluster, hardware, batch: int, draw: random.Random) -> Plan | None:  # type: ignore[no-untyped-def]
    """Return a plan of the space, drawn step by step; None when a draw leads nowhere."""
    layers = model.layer_count
    microbatches = draw.choice([m for m in range(1, batch + 1) if batch % m == 0])
    slices = draw.choice(stage_counts(cluster, model, Limits()))
    shape = draw.choice(shapes(slices, microbatches, layers, Limits()))
    if shape.chunks > 1:
        options = even_cuts(shape.stages, work(model, hardware))
        cuts = tuple(map(int, draw.choice(options))) if len(options) else None
    else:
        cuts = (0, *sorted(draw.sample(range(1, layers), slices - 1)), layers)
    devices, kinds = cluster.devices // slices, [run.kind for run in model.layers for _ in range(run.count)]
    every = stage_strategies(cluster, devices, Limits())
    menus = {kind: legal(model.kind(kind), every, batch // microbatches) for kind in set(kinds)}
    if cuts is None or not all(menus.values()):
        return None
    habits = {(s, kind): draw.choice(menus[kind]) for s in range(slices) for kind in menus}
    runs = []
    for k, (a, b) in enumerate(itertools.pairwise(cuts)):
        loyal = shape.chunks > 1 or draw.random() < 0.5  # else every layer chooses for itself
        chosen = [habits[k % slices, kind] if loyal else draw.choice(menus[kind]) for kind in kinds[a:b]]
        runs.append(tuple(PlanRun(kind=n, count=1, strategy=s) for n, s in zip(kinds[a:b], chosen, strict=True)))
    return Plan(
        model=model_reference(model),
        cluster=cluster,
        global_batch=batch,
        microbatches=microbatches,
        schedule=shape.schedule,
        chunks=shape.chunks,
        stages=tuple(Stage(devices=devices, runs=some) for some in runs),
    )


@pytest.mark.parametrize("seed", range(24))
def test_no_random_plan_and_no_baseline_is_better_than_the_answer(seed: int) -> None:
    draw = random.Random(seed)
    model, cluster = model_of(LAYERS[seed % len(LAYERS)], draw), parse_cluster(MESHES[seed % len(MESHES)])
    hardware, batch = random_hardware(draw), cluster.devices * draw.choice([1, 2, 4])
    plans = [plan for _ in range(PLANS) if (plan := random_plan(model, cluster, hardware, batch, draw))]
    priced = [msgspec.structs.replace(p, predicted=estimate_plan(p, model, hardware)) for p in plans]
    peaks = sorted(map(peak_bytes, priced))
    budget = peaks[draw.choice([0, len(peaks) // 8, len(peaks) // 2, -1])]  # tight, or not
    found = find_plan(model, cluster, hardware, global_batches=(batch,), memory_bytes=budget)
    assert found.plan.predicted is not None
    assert found.plan.certificate is not None
    assert found.plan.certificate.optimal
    assert peak_bytes(found.plan) <= budget
    best = found.plan.predicted.step_time_s
    others = [plan.predicted.step_time_s for plan in priced if plan.predicted and peak_bytes(plan) <= budget]
    others += [b.seconds_per_sample * batch for b in found.baselines if b.seconds_per_sample is not None]
    assert others
    assert min(others) >= best * (1 - SAME)
    assert estimate_plan(found.plan, model, hardware).step_time_s == best


def test_mixed_kinds_in_any_order_are_solved() -> None:
    draw = random.Random(7)
    model = model_of("e1 l1 d1 h1", draw)
    alternating = [LayerRun(kind=kind, count=1) for kind in ("layers.*", "decoder.*") * 6]
    model = msgspec.structs.replace(
        model, layers=(LayerRun(kind="embed", count=1), *alternating, LayerRun(kind="head", count=1))
    )
    found = find_plan(model, parse_cluster("2x2"), random_hardware(draw), global_batches=(8,), memory_bytes=10**12)
    assert found.plan.certificate is not None
    assert found.plan.certificate.optimal


def alternating_problem(share: float) -> Problem:
    """Return 40 layers of two kinds in turn, under a budget that is ``share`` of what the fastest plan needs."""
    draw = random.Random(7)
    model = model_of("e1 l1 d1 h1", draw)
    kinds = ("embed", *("layers.*", "decoder.*") * 20, "head")
    model = msgspec.structs.replace(model, layers=tuple(LayerRun(kind=kind, count=1) for kind in kinds))
    problem = Problem(
        model=model,
        cluster=parse_cluster("2x4"),
        hardware=random_hardware(random.Random(7)),
        training=Training(),
        budget_bytes=1e18,
        limits=Limits(max_stages=1),
    )
    _, free = search(Engine(problem, (16,)))
    assert free is not None
    return dataclasses.replace(problem, budget_bytes=int(peak_bytes(free) * share))


@pytest.mark.parametrize("share", [0.6, 0.7, 0.8, 0.9])
def test_layers_that_alternate_one_by_one_are_solved(share: float) -> None:
    """Layers of one kind and layout are one group of the knapsack, wherever they stand."""
    problem = alternating_problem(share)
    _, plan = search(Engine(problem, (16,)))
    assert plan is not None
    assert plan.certificate is not None
    assert plan.certificate.optimal
    assert peak_bytes(plan) <= problem.budget_bytes


@pytest.mark.parametrize("share", [0.6, 0.7, 0.9])
def test_problem_too_hard_to_solve_has_a_good_plan(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = alternating_problem(share)
    monkeypatch.setattr(_knapsack, "LONG_ROWS", 2000)
    monkeypatch.setattr(_knapsack, "MOST_ROWS", 2000)
    _, plan = search(Engine(problem, (16,)))
    assert plan is not None
    assert plan.certificate is not None
    assert 0 < plan.certificate.gap < NEAR
    assert peak_bytes(plan) <= problem.budget_bytes

from __future__ import annotations

import time

import pytest

from galvatron_jax.cluster import Cluster, parse_cluster
from galvatron_jax.errors import InfeasibleError
from galvatron_jax.hardware import load_hardware
from galvatron_jax.models import load_model_profile
from galvatron_jax.plan import Plan, Training
from galvatron_jax.search import find_plan
from galvatron_jax.search._engine import Engine, Stop
from galvatron_jax.search._infeasible import explain_infeasible, least_peak_bytes
from galvatron_jax.search._pricing import Problem
from galvatron_jax.search._space import Limits, default_batches
from galvatron_jax.units import GIB, format_gib
from tests.search.brute_force import every_plan
from tests.search.problems import SHAPES, small_problem
from tests.support.toy_models import llama_like_profile, toy_hardware

MODEL = llama_like_profile(layers=7, embed=512, heads=8, head_dim=64, mlp=1536, vocab=5001, seq=512)


@pytest.mark.parametrize("seed", [s for s in range(len(SHAPES)) if "1" in SHAPES[s][1] or SHAPES[s][1] == "l2"])
def test_least_peak_equals_brute_force(seed: int) -> None:
    small = small_problem(seed)
    smallest = min(tried.peak_bytes for tried in every_plan(*small))
    found = least_peak_bytes(Engine(small.problem(1.0), small.batches))
    assert found == pytest.approx(smallest, abs=8)  # every category of a stage is rounded up to whole bytes


def test_infeasible_names_the_nearest_miss_and_changes_that_fit() -> None:
    hardware, cluster = toy_hardware(), parse_cluster("1x2")
    problem = Problem(
        model=MODEL, cluster=cluster, hardware=hardware, training=Training(), budget_bytes=1.0, limits=Limits()
    )
    least = least_peak_bytes(Engine(problem, (16,)))
    assert least is not None
    budget = int(0.99 * least)
    with pytest.raises(InfeasibleError) as caught:
        find_plan(MODEL, cluster, hardware, global_batches=(16,), memory_bytes=budget)
    message = caught.value.message
    assert f"needs {format_gib(least)}, budget {format_gib(budget)}" in message
    changes = message.split("smallest changes that would fit: ")[1].split("; ")
    assert len(changes) == 3
    for change in changes:
        assert found_with(change, cluster, budget), change


def found_with(change: str, cluster: Cluster, budget: int) -> Plan:
    """Return the plan found after a change that a message names."""
    model, batches, value = MODEL, (16,), change.split("-> ")[-1]
    if change.startswith("global batch"):
        batches = (int(value),)
    elif change.startswith("more GPUs"):
        cluster = parse_cluster(change.split("--mesh ")[1].split(" ")[0])
    elif change.startswith("more memory"):
        budget = int(float(change.split("budget of ")[1].split(" GiB")[0]) * GIB)
    else:
        assert change.startswith("--seq")
        model = MODEL.at_seq(int(value))
    return find_plan(model, cluster, toy_hardware(), global_batches=batches, memory_bytes=budget).plan


def test_infeasible_by_the_users_own_limits_says_so() -> None:
    hardware, cluster = toy_hardware(), parse_cluster("1x2")
    with pytest.raises(InfeasibleError, match="leave out --microbatches"):
        find_plan(MODEL, cluster, hardware, global_batches=(512,), memory_bytes=2 * GIB, microbatches=(1,))
    with pytest.raises(InfeasibleError, match=r"microbatch counts \[5\] divides"):
        find_plan(MODEL, cluster, hardware, global_batches=(512,), microbatches=(5,))


def test_llama_7b_on_one_small_device_is_explained_quickly() -> None:
    start = time.monotonic()
    with pytest.raises(InfeasibleError, match=r"needs \d+\.\d GiB, budget 8\.0 GiB"):
        find_plan(load_model_profile("llama2-7b"), parse_cluster("1x1"), load_hardware("h100"), memory_bytes=8 * GIB)
    assert time.monotonic() - start < 10


def large_engine() -> Engine:
    """Return a problem of 82 layers on 512 devices, in which nothing fits."""
    model, cluster = load_model_profile("llama3-70b"), parse_cluster("64x8")
    problem = Problem(
        model=model,
        cluster=cluster,
        hardware=load_hardware("h100"),
        training=Training(),
        budget_bytes=GIB,
        limits=Limits(),
    )
    return Engine(problem, default_batches(cluster, model))


@pytest.mark.usefixtures("own_clock")
def test_70b_on_512_devices_is_explained_within_bounds() -> None:
    engine, start = large_engine(), time.thread_time()
    message = explain_infeasible(engine).message
    assert time.thread_time() - start < 15  # 3 on an idle machine, twice that on a full one
    assert "the nearest miss needs 4.6 GiB on stage 7 of 8" in message


@pytest.mark.usefixtures("own_clock")
@pytest.mark.parametrize("polls", [1, 20, 300])
def test_a_stop_ends_the_explanation_at_once(polls: int) -> None:
    engine, asked, stopped_s = large_engine(), 0, 0.0

    def poll(_: float | None) -> None:
        nonlocal asked, stopped_s
        asked += 1
        if asked >= polls:
            stopped_s = stopped_s or time.thread_time()
            raise Stop

    engine.poll = poll
    message = explain_infeasible(engine).message
    assert time.thread_time() - stopped_s < 0.5
    assert asked >= polls
    assert "llama3-70b does not fit 64x8" in message
    assert "stopped before" in message

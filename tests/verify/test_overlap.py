"""What the compiled schedule hides: fully sharded layers of a 7B model, whose products outlast their collectives."""

from __future__ import annotations

import pytest

from galvatron_jax.analysis import analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.verify import verify_plan
from galvatron_jax.verify._compare import CollectiveRow
from tests.verify.user_model import broad_llama

MOST_EXPOSED = 0.25
"""Of the seconds of a kind: the first gather and the last reduction of each pass have nothing to hide behind, and eight
layers are few."""


@pytest.mark.slow
def test_gathers_and_reductions_of_wide_layers_hide_behind_products(gpu_compiler: None) -> None:
    profile = analyse_model(*broad_llama(), name="broad").profile
    strategy = Strategy(dp=8, zero=3, remat="full")
    runs = tuple(PlanRun(kind=run.kind, count=run.count, strategy=strategy) for run in profile.layers)
    plan = Plan(
        model=model_reference(profile),
        cluster=Cluster(nodes=1, gpus_per_node=8, gpu="h100"),
        global_batch=32,
        stages=(Stage(devices=8, runs=runs),),
    )
    (check,) = verify_plan(plan, model="tests.verify.user_model:broad_llama").stages
    rows = {row.kind: row for row in check.collectives if row.group_size == 8}
    for kind in ("all-gather", "reduce-scatter"):
        seconds, exposed_s = of_layers(rows[kind])
        assert seconds > 0
        assert exposed_s <= MOST_EXPOSED * seconds, (kind, exposed_s, seconds)


def of_layers(row: CollectiveRow) -> tuple[float, float]:
    return sum(s.seconds for s in row.shares), sum(s.exposed_s for s in row.shares)

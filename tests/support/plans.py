"""A small valid plan, for tests of documents and checks."""

from __future__ import annotations

from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import ModelReference, Plan, PlanRun, Stage, Strategy


def small_plan() -> Plan:
    """A plan with one stage on 1x4: embed, three plain layers, one recomputed layer, head."""
    whole = Strategy(tp=1, dp=4, zero=3)
    runs = (
        PlanRun(kind="embed", count=1, strategy=Strategy(tp=1, dp=4)),
        PlanRun(kind="layers.*", count=3, strategy=whole),
        PlanRun(kind="layers.*", count=1, strategy=Strategy(tp=1, dp=4, zero=3, remat="full")),
        PlanRun(kind="head", count=1, strategy=Strategy(tp=2, sp=True, dp=2)),
    )
    return Plan(
        model=ModelReference(
            name="llama-test",
            structure="0123456789abcdef",
            dtype="bfloat16",
            seq=64,
            layer_count=6,
            parameter_count=1000,
        ),
        cluster=Cluster(nodes=1, gpus_per_node=4),
        global_batch=32,
        microbatches=2,
        stages=(Stage(devices=4, runs=runs),),
    )

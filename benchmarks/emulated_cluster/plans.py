"""The plans that the benchmark runs on two nodes of two devices: every kind of spreading that differs on the links."""

from __future__ import annotations

from collections.abc import Mapping

from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.profile import ModelProfile

Spread = tuple[tuple[Strategy, ...], int]
"""Strategy of each stage, and the microbatches."""

SPREADS: Mapping[str, Spread] = {
    "dp4": ((Strategy(dp=4),), 1),
    "dp4 zero1": ((Strategy(dp=4, zero=1),), 1),
    "dp4 zero3": ((Strategy(dp=4, zero=3),), 1),
    "dp4 zero3 remat": ((Strategy(dp=4, zero=3, remat="full"),), 1),
    "dp4 hsdp2": ((Strategy(dp=4, zero=3, replicas=2),), 1),
    "tp2 dp2": ((Strategy(tp=2, dp=2),), 1),
    "tp2+sp dp2": ((Strategy(tp=2, sp=True, dp=2),), 1),
    "tp2 dp2 zero3": ((Strategy(tp=2, dp=2, zero=3),), 1),
    "tp4": ((Strategy(tp=4),), 1),
    "dp4 in 2": ((Strategy(dp=4),), 2),
    "pp2 dp2 in 2": ((Strategy(dp=2), Strategy(dp=2)), 2),
    "pp2 dp2 in 4": ((Strategy(dp=2), Strategy(dp=2)), 4),
    "pp2 tp2 in 4": ((Strategy(tp=2), Strategy(tp=2)), 4),
}

HELD_OUT = ("dp4 hsdp2", "tp2+sp dp2", "tp2 dp2 zero3", "dp4 in 2", "pp2 dp2 in 4", "pp2 tp2 in 4")
"""Plans that nothing may be fitted to."""


def build_plan(name: str, model: ModelProfile, cluster: Cluster, batch: int) -> Plan:
    """Return the plan ``name`` of ``SPREADS`` for ``model``, layers split evenly over its stages."""
    strategies, microbatches = SPREADS[name]
    order = [run.kind for run in model.layers for _ in range(run.count)]
    each = len(order) / len(strategies)
    stages = []
    for s, strategy in enumerate(strategies):
        part = order[round(s * each) : round((s + 1) * each)]
        runs = tuple(PlanRun(kind=kind, count=part.count(kind), strategy=strategy) for kind in dict.fromkeys(part))
        stages.append(Stage(devices=cluster.devices // len(strategies), runs=runs))
    return Plan(
        model=model_reference(model),
        cluster=cluster,
        global_batch=batch,
        microbatches=microbatches,
        stages=tuple(stages),
    )

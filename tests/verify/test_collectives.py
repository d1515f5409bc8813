"""Collectives of whole steps that XLA:GPU compiles, in bfloat16, against the prediction: to the last byte.

What the CPU's programs cannot tell (tests/runtime/test_collectives.py has those): casts beside collectives, two turns
of a loop in one, passes that merge and move collectives.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from galvatron_jax.analysis import analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.verify import Verification, verify_plan
from tests.verify import user_model

SCALARS = 1024
"""Bytes of what is not predicted: losses, the norm of the gradients, one number for each parameter."""

PLANS: dict[str, tuple[str, Strategy, int]] = {
    "sp, zero 1, remat, 2 microbatches": ("bfloat16_llama", Strategy(tp=4, sp=True, dp=2, zero=1, remat="full"), 2),
    "hsdp, remat": ("bfloat16_llama", Strategy(dp=8, zero=3, replicas=2, remat="full"), 1),
    "norms after residual connections, tp": ("post_norm", Strategy(tp=4, dp=2, remat="full"), 1),
}


def verified(model: str, strategy: Strategy, microbatches: int) -> Verification:
    profile = analyse_model(*getattr(user_model, model)(), name=model).profile
    tables = Strategy(dp=8)  # learned positions are gathered under tensor parallelism: docs/collectives.md
    same = Strategy(tp=strategy.tp, sp=strategy.sp, ulysses=strategy.ulysses, dp=strategy.dp, zero=strategy.zero)
    edges = tables if model == "post_norm" else same
    runs = tuple(
        PlanRun(kind=run.kind, count=run.count, strategy=strategy if run.count > 1 else edges) for run in profile.layers
    )
    plan = Plan(
        model=model_reference(profile),
        cluster=Cluster(nodes=1, gpus_per_node=8, gpu="h100"),
        global_batch=8 * microbatches,
        microbatches=microbatches,
        stages=(Stage(devices=8, runs=runs),),
    )
    return verify_plan(plan, model=f"tests.verify.user_model:{model}")


@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize(("model", "strategy", "microbatches"), PLANS.values(), ids=PLANS)
def test_compiled_collectives_are_those_of_the_plan(model: str, strategy: Strategy, microbatches: int) -> None:
    (check,) = verified(model, strategy, microbatches).stages
    beyond: dict[tuple[str, int], int] = defaultdict(int)
    for row in check.collectives:
        kind = "all-reduce" if row.kind == "reduce-scatter" else row.kind
        beyond[kind, row.group_size] += row.compiled_bytes - row.predicted_bytes
    assert {key: size for key, size in beyond.items() if abs(size) > SCALARS} == {}

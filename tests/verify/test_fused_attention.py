"""Attention that asks for cuDNN, compiled for H100s without a GPU; needs the wheel ``nvidia-cudnn-cu12`` (716 MB)."""

from __future__ import annotations

from collections import defaultdict

import pytest

from galvatron_jax.analysis import analyse_model, has_cudnn
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.verify import StageCheck, verify_plan
from tests.verify.user_model import kernel_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_cudnn(), reason="cuDNN is not installed: pip install --no-deps nvidia-cudnn-cu12"),
]

STRATEGIES = {
    "zero 3": Strategy(dp=4, zero=3),
    "zero 3, remat": Strategy(dp=4, zero=3, remat="full"),
    "tp 2, sp": Strategy(tp=2, dp=2, sp=True),
    "ulysses 2": Strategy(ulysses=2, dp=2, zero=3),
}


def plan_of(strategy: Strategy, *, stages: int = 1) -> Plan:
    profile = analyse_model(*kernel_llama(), name="kernel_llama").profile
    whole = [("embed", 1), ("layers.*", 4), ("head", 1)]
    halves = [[("embed", 1), ("layers.*", 2)], [("layers.*", 2), ("head", 1)]]
    return Plan(
        model=model_reference(profile),
        cluster=Cluster(nodes=1, gpus_per_node=4 * stages, gpu="h100"),
        global_batch=8 * stages,
        microbatches=stages,
        stages=tuple(
            Stage(devices=4, runs=tuple(PlanRun(kind=kind, count=count, strategy=strategy) for kind, count in runs))
            for runs in ([whole] if stages == 1 else halves)
        ),
    )


SLACK = 1024 + 9 * 256 * 4
"""Bytes: losses and the norm of the gradients, not predicted; gradients of nine norms under sp, which the compiler sums
over tensor and data ranks at once."""


def beyond(check: StageCheck) -> dict[str, int]:
    """Bytes compiled beyond those predicted, by kind."""
    found: dict[str, int] = defaultdict(int)
    for row in check.collectives:
        found["all-reduce" if row.kind == "reduce-scatter" else row.kind] += row.compiled_bytes - row.predicted_bytes
    return {kind: size for kind, size in found.items() if abs(size) > SLACK}


@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize("name", STRATEGIES)
def test_kernel_is_compiled_and_nothing_unplanned_is_communicated(name: str) -> None:
    (check,) = verify_plan(plan_of(STRATEGIES[name]), model="tests.verify.user_model:kernel_llama").stages
    assert check.attention_is_fused
    assert beyond(check) == {}


@pytest.mark.usefixtures("gpu_compiler")
def test_stages_of_a_pipeline_run_the_kernel() -> None:
    plan = plan_of(Strategy(tp=2, dp=2, zero=1), stages=2)
    found = verify_plan(plan, model="tests.verify.user_model:kernel_llama")
    assert [(check.attention_is_fused, beyond(check)) for check in found.stages] == [(True, {})] * 2

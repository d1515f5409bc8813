"""One small plan compiled for H100s, once for all tests of the folder that need it."""

from __future__ import annotations

import pytest

from galvatron_jax.cluster import Cluster
from galvatron_jax.errors import ToolchainError
from galvatron_jax.models import load_model_profile
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.verify import Verification, check_toolchain, verify_plan


@pytest.fixture(scope="session")
def gpu_compiler() -> None:
    """Skip where XLA's GPU compiler is not installed."""
    try:
        check_toolchain()
    except ToolchainError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="session")
def tiny_plan() -> Plan:
    """Llama-tiny, fully sharded over 1x4 H100, with a tensor-parallel head: one change of layout."""
    runs = (
        PlanRun(kind="embed", count=1, strategy=Strategy(dp=4, zero=3)),
        PlanRun(kind="layers.*", count=4, strategy=Strategy(dp=4, zero=3)),
        PlanRun(kind="head", count=1, strategy=Strategy(tp=2, dp=2, zero=1)),
    )
    return Plan(
        model=model_reference(load_model_profile("llama-tiny")),
        cluster=Cluster(nodes=1, gpus_per_node=4, gpu="H100"),  # an alias on purpose
        global_batch=16,
        microbatches=2,
        stages=(Stage(devices=4, runs=runs),),
    )


@pytest.fixture(scope="session")
def tiny_verification(gpu_compiler: None, tiny_plan: Plan) -> Verification:
    return verify_plan(tiny_plan)

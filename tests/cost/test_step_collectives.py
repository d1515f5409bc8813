"""How often the collectives of one microbatch run in a step, and what the optimizer adds."""

from __future__ import annotations

import msgspec
import pytest

from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import PlannedCollective, plan_collectives, step_collectives
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.profile import ModelProfile
from tests.support.toy_models import llama_like_profile


def small_model() -> ModelProfile:
    return llama_like_profile(layers=2, embed=64, heads=8, head_dim=8, mlp=128, vocab=256, seq=32)


def plan_for(model: ModelProfile, zero: int, microbatches: int) -> Plan:
    runs = tuple(
        PlanRun(kind=run.kind, count=run.count, strategy=Strategy(tp=2, dp=4, zero=zero)) for run in model.layers
    )
    return Plan(
        model=model_reference(model),
        cluster=Cluster(nodes=1, gpus_per_node=8),
        global_batch=16,
        microbatches=microbatches,
        stages=(Stage(devices=8, runs=runs),),
    )


def total(found: tuple[PlannedCollective, ...], cause: str) -> tuple[int, float]:
    chosen = [item for item in found if item.cause == cause]
    return sum(item.count for item in chosen), sum(item.bytes for item in chosen)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_activations_move_once_per_microbatch(zero: int) -> None:
    model = small_model()
    plan = plan_for(model, zero, microbatches=2)
    count, size_bytes = total(plan_collectives(plan, model), "tensor")
    assert count
    assert total(step_collectives(plan, model), "tensor") == (2 * count, 2 * size_bytes)


@pytest.mark.parametrize(("zero", "times"), [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_gradients_are_reduced_once_per_step_until_they_are_sharded(zero: int, times: int) -> None:
    model = small_model()
    plan = plan_for(model, zero, microbatches=2)
    count, size_bytes = total(plan_collectives(plan, model), "gradient")
    assert count
    assert total(step_collectives(plan, model), "gradient") == (times * count, times * size_bytes)


@pytest.mark.parametrize("zero", [1, 2])
def test_updated_parameters_are_gathered_once_per_step_in_their_own_dtype(zero: int) -> None:
    """Float32 parameters computed in bfloat16: twice the bytes of the reduce-scattered gradients."""
    model = small_model()
    one, two = plan_for(model, zero, 1), plan_for(model, zero, 2)
    _, gathered = total(step_collectives(one, model), "weights")
    scattered = sum(item.bytes for item in plan_collectives(one, model) if item.kind == "reduce-scatter")
    dtypes = {(p.dtype, p.compute_dtype) for kind in model.kinds for p in kind.parameters}
    assert dtypes == {("float32", "bfloat16")}
    assert gathered == 2 * scattered
    assert total(step_collectives(two, model), "weights") == total(step_collectives(one, model), "weights")


def test_fully_sharded_parameters_are_gathered_by_every_microbatch() -> None:
    model = small_model()
    plan = plan_for(model, 3, 4)
    once, step = plan_collectives(plan, model), step_collectives(plan, model)
    assert total(step, "weights")[1] == 4 * total(once, "weights")[1]


def test_tied_table_is_reduced_and_gathered_once_per_step() -> None:
    """Several microbatches under zero 1: what embedding and head add up is one sum (GPT-2 for 8 H100: exact)."""
    model = small_model()
    embed, *others, head = model.kinds
    (table,) = embed.parameters
    own = msgspec.structs.replace(table, path=f"embed.{table.path}")
    heads = [msgspec.structs.replace(head, parameters=(msgspec.structs.replace(own, tied=t),)) for t in (False, True)]
    models = [msgspec.structs.replace(model, kinds=(embed, *others, head)) for head in heads]
    plan = plan_for(model, 1, 4)
    separate, shared = (step_collectives(plan, m) for m in models)
    stored = table.array().local_bytes(head.classes, {"vocab": 2})
    for cause in ("gradient", "weights"):
        assert total(separate, cause)[1] - total(shared, cause)[1] == stored

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import PlannedCollective, plan_collectives, relayout_steps
from galvatron_jax.plan import Plan, PlanRun, Remat, Stage, Strategy, model_reference
from tests.cost.settings import MODEL
from tests.support.toy_models import llama_like_profile

CLUSTER = Cluster(nodes=2, gpus_per_node=4, gpu="toy")
MICROBATCH = 16
STREAM = 2 * MICROBATCH * 32 * 64
"""Bytes of the whole stream: bfloat16, batch * seq * embed."""
TOKENS = 4 * MICROBATCH * 32
MATRICES = 4 * 64 * 64 + 3 * 64 * 128
"""Elements of a block's products."""
NORMS = 2 * 64


def listed(*strategies: Strategy, merged: bool = False, microbatches: int = 1) -> list[PlannedCollective]:
    """Collectives of a model with ``strategies`` for the embedding, its layers and the head."""
    model = llama_like_profile(layers=len(strategies) - 2, embed=64, heads=8, head_dim=8, mlp=128, vocab=256, seq=32)
    kinds = ["embed", *["layers.*"] * (len(strategies) - 2), "head"]
    runs = tuple(PlanRun(kind=k, count=1, strategy=s) for k, s in zip(kinds, strategies, strict=True))
    plan = Plan(
        model=model_reference(model),
        cluster=CLUSTER,
        global_batch=MICROBATCH * microbatches,
        microbatches=microbatches,
        stages=(Stage(devices=8, runs=runs),),
    )
    return list(plan_collectives(plan, model, sums_before_reducing=merged))


def of_layer(collectives: list[PlannedCollective], position: int, *causes: str) -> Counter[tuple[str, str, int, float]]:
    """(kind, phase, group, bytes) with their counts of one layer."""
    found: Counter[tuple[str, str, int, float]] = Counter()
    for c in collectives:
        if c.layer == position and c.cause in causes:
            found[c.kind, c.phase, c.group, c.bytes / c.count] += c.count
    return found


def tp(degree: int, *, sp: bool = False, remat: Remat = "none", zero: int = 0) -> Strategy:
    return Strategy(tp=degree, dp=8 // degree, sp=sp, remat=remat, zero=zero)


def test_tensor_parallel_block_lists_megatron_s_all_reduces() -> None:
    found = of_layer(listed(*[tp(8)] * 3), 1, "tensor", "data", "gradient", "weights")
    assert found == {("all-reduce", "forward", 8, STREAM): 2, ("all-reduce", "backward", 8, STREAM): 5}


def test_sums_before_reducing_leave_two_in_backward() -> None:
    found = of_layer(listed(*[tp(8)] * 3, merged=True), 1, "tensor")
    assert found == {("all-reduce", "forward", 8, STREAM): 2, ("all-reduce", "backward", 8, STREAM): 2}


def test_remat_runs_all_but_the_last_of_forward_again() -> None:
    found = of_layer(listed(*[tp(4, remat="full")] * 3), 1, "tensor")
    assert found == {("all-reduce", "forward", 4, STREAM / 2): 2, ("all-reduce", "backward", 4, STREAM / 2): 5 + 1}


def test_sequence_parallel_block_gathers_and_scatters_the_whole_stream() -> None:
    found = of_layer(listed(*[tp(8, sp=True)] * 3), 1, "tensor")
    assert {kind: n for (kind, phase, *_), n in found.items() if phase == "forward"} == {
        "all-gather": 2,
        "reduce-scatter": 2,
    }
    assert {size for *_, size in found} == {STREAM}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (tp(1), {("all-reduce", "backward", 8, 2 * (MATRICES + NORMS)): 1}),
        (tp(1, zero=1), {("reduce-scatter", "backward", 8, 2 * (MATRICES + NORMS)): 1}),
        (tp(1, zero=2), {("reduce-scatter", "backward", 8, 2 * (MATRICES + NORMS)): 1}),
        (
            tp(1, zero=3),
            {
                ("reduce-scatter", "backward", 8, 2 * (MATRICES + NORMS)): 1,
                ("all-gather", "forward", 8, 2 * (MATRICES + NORMS)): 1,
                ("all-gather", "backward", 8, 2 * (MATRICES + NORMS)): 1,
            },
        ),
        (tp(4), {("all-reduce", "backward", 2, 2 * (MATRICES / 4 + NORMS)): 1}),
        (tp(8), {}),
    ],
    ids=str,
)
def test_gradients_are_reduced_over_dp_in_the_compute_dtype(
    strategy: Strategy, expected: dict[tuple[str, str, int, float], int]
) -> None:
    assert of_layer(listed(*[strategy] * 3), 1, "gradient", "weights") == expected


def test_mean_of_the_loss_is_one_number_over_dp() -> None:
    assert of_layer(listed(*[tp(2)] * 3), 2, "data") == {("all-reduce", "forward", 4, 4.0): 1}


def test_head_sums_over_the_vocabulary_for_each_token() -> None:
    found = of_layer(listed(*[tp(2)] * 3), 2, "tensor")
    assert found["all-reduce", "forward", 2, TOKENS / 4] == 3
    assert found["all-reduce", "backward", 2, STREAM / 4] == 1


def test_relayout_is_listed_with_the_layer_that_takes_the_stream() -> None:
    found = listed(tp(1), tp(8), tp(8), tp(1))
    assert of_layer(found, 1, "relayout") == {("all-gather", "forward", 8, STREAM): 1}
    assert of_layer(found, 2, "relayout") == {}
    assert of_layer(found, 3, "relayout") == {("all-gather", "backward", 8, STREAM): 1}


def test_bytes_are_those_of_one_microbatch_but_sums_of_several_are_reduced_once_in_float32() -> None:
    one, several = (listed(*[tp(2)] * 3, microbatches=count) for count in (1, 4))
    assert [c for c in several if not c.once] == [c for c in one if c.cause != "gradient"]
    assert [c.bytes for c in several if c.once] == [2 * c.bytes for c in one if c.cause == "gradient"]


def test_stages_of_one_device_list_nothing() -> None:
    kinds = [run.kind for run in MODEL.layers for _ in range(run.count)]
    runs = [PlanRun(kind=kind, count=1, strategy=Strategy()) for kind in kinds]
    plan = Plan(
        model=model_reference(MODEL),
        cluster=Cluster(nodes=1, gpus_per_node=3, gpu="toy"),
        global_batch=MICROBATCH,
        stages=tuple(Stage(devices=1, runs=tuple(runs[first : first + 2])) for first in (0, 2, 4)),
    )
    assert plan_collectives(plan, MODEL) == ()


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_relayout_steps_of_equal_layouts_are_none(degree: int) -> None:
    assert relayout_steps(tp(degree, sp=True), tp(degree, sp=True, zero=3, remat="full")) == ()


@pytest.mark.parametrize(("compute_dtype", "gathers"), [("float32", 0), ("bfloat16", 1)])
def test_tied_parameter_is_gathered_again_by_a_layer_that_casts_it(compute_dtype: str, gathers: int) -> None:
    model = llama_like_profile(layers=1, embed=64, heads=8, head_dim=8, mlp=128, vocab=256, seq=32)
    (table,) = model.kind("embed").parameters
    path = f"embed.{table.path}"  # the head knows the table by its whole path
    tied = msgspec.structs.replace(table, path=path, dtype="float32", compute_dtype=compute_dtype, tied=True)
    kept = msgspec.structs.replace(table, dtype="float32", compute_dtype=compute_dtype)
    held = {"head": (tied,), "embed": (kept,)}
    kinds = [msgspec.structs.replace(k, parameters=held.get(k.name, k.parameters)) for k in model.kinds]
    model = msgspec.structs.replace(model, kinds=tuple(kinds))
    runs = tuple(PlanRun(kind=run.kind, count=1, strategy=Strategy(dp=8, zero=3)) for run in model.layers)
    plan = Plan(
        model=model_reference(model),
        cluster=CLUSTER,
        global_batch=MICROBATCH,
        stages=(Stage(devices=8, runs=runs),),
    )
    found = [
        c for c in plan_collectives(plan, model) if (c.layer_kind, c.cause, c.phase) == ("head", "weights", "forward")
    ]
    assert len(found) == gathers

"""What Ulysses, hsdp, remat dots, copied kv heads, tied and side values add to the price, worked out by hand."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost import (
    Crossing,
    LayerCost,
    Setting,
    collective_seconds,
    device_group,
    estimate_layer,
    estimate_plan,
    plan_collectives,
    side_values,
    simulate,
    slice_memory,
)
from galvatron_jax.cost._pipeline import StageTime
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.profile import Array, Boundary, LayerKind, LayerRun, ModelProfile
from galvatron_jax.schedule import build_schedule, in_flight_units
from tests.cost.settings import HARDWARE, MODEL, setting
from tests.search.problems import with_every_choice, with_side_value, with_tied_parameters
from tests.support.toy_models import llama_like_profile

BLOCK, HEAD = (with_every_choice(MODEL.kind(name)) for name in ("layers.*", "head"))
HERE = setting(8, microbatch=16)
STREAM_BYTES = 16 * 32 * 64 * 2
W = sum(p.array().elements(BLOCK.classes, {}) for p in BLOCK.parameters)


def price(strategy: Strategy, kind: LayerKind = BLOCK, at: Setting = HERE) -> LayerCost:
    return estimate_layer(kind, strategy, at)


# ------------------------------------------------------------------------------------------------------------ Ulysses
def test_ulysses_shares_activations_like_data_parallelism_and_keeps_weights_whole() -> None:
    data, ulysses = price(Strategy(dp=8)), price(Strategy(ulysses=4, dp=2))
    assert ulysses.residual_bytes == data.residual_bytes
    assert ulysses.memory["parameters"] == data.memory["parameters"]
    assert ulysses.times["compute"] == pytest.approx(data.times["compute"], rel=0.2)  # fewer, larger sequences


def test_ulysses_swaps_sequence_for_heads_in_all_to_alls_of_the_local_part() -> None:
    one = collective_seconds("all-to-all", STREAM_BYTES / 8, device_group(4, 1, 4), HARDWARE)
    assert price(Strategy(ulysses=4, dp=2)).times["tensor_communication"] == pytest.approx(8 * one)


def test_ulysses_reduces_and_shards_weights_over_its_ranks_too() -> None:
    assert price(Strategy(ulysses=4, dp=2, zero=3)).memory == price(Strategy(dp=8, zero=3)).memory
    assert price(Strategy(ulysses=8, zero=3)).state_bytes < price(Strategy(ulysses=8)).state_bytes


# --------------------------------------------------------------------------------------------------------------- hsdp
def test_hsdp_shards_inside_and_reduces_shards_across() -> None:
    whole, copies = (price(Strategy(dp=8, zero=2, replicas=r)) for r in (1, 2))
    assert copies.memory["optimizer"] == pytest.approx(2 * whole.memory["optimizer"], rel=0.01)
    plan = one_stage(Strategy(dp=8, zero=3, replicas=2))
    found = {
        (c.kind, c.cause, c.group): c.bytes
        for c in plan_collectives(plan, model_with(BLOCK))
        if c.layer_kind == "layers.*"
    }
    assert found["all-gather", "weights", 4] == 2 * W
    assert found["reduce-scatter", "gradient", 4] == 2 * W
    assert found["all-reduce", "gradient", 2] == 4 * W / 4  # once a step: the float32 sum of its microbatches


def test_hsdp_on_nodes_gathers_without_leaving_them() -> None:
    inside = collective_seconds("all-gather", 2 * W, device_group(4, 1, 4), HARDWARE)
    across = collective_seconds("all-gather", 2 * W, device_group(8, 1, 4), HARDWARE)
    assert inside < across / 2
    data = [price(Strategy(dp=8, zero=3, replicas=r)).times["data_communication"] for r in (1, 2)]
    assert data[1] < data[0]


# --------------------------------------------------------------------------------------------------------- remat dots
def test_remat_dots_runs_attention_again_and_no_collective_of_tensor_parallelism() -> None:
    none, dots, full = (price(Strategy(tp=4, dp=2, remat=remat)) for remat in ("none", "dots", "full"))
    assert none.times["tensor_communication"] == dots.times["tensor_communication"] < full.times["tensor_communication"]
    assert 0 == none.times["recompute"] < dots.times["recompute"] < full.times["recompute"]


def test_remat_dots_holds_what_it_keeps_and_computes_the_rest_when_it_is_needed() -> None:
    none, dots, full = (price(Strategy(dp=8, remat=remat)) for remat in ("none", "dots", "full"))
    assert full.residual_bytes < dots.residual_bytes < none.residual_bytes
    assert none.live_bytes < dots.live_bytes < full.live_bytes
    assert {cost.residual_bytes + cost.live_bytes for cost in (none, dots, full)} == {
        none.residual_bytes + none.live_bytes
    }


# ----------------------------------------------------------------------------------------------------- copied kv heads
def test_kv_heads_that_tp_exceeds_are_copied() -> None:
    model = llama_like_profile(layers=1, embed=64, heads=8, head_dim=8, mlp=128, vocab=256, seq=32, kv_heads=2)
    kind = with_every_choice(model.kind("layers.*"))
    two, four = (price(Strategy(tp=tp, dp=8 // tp), kind, setting(8)) for tp in (2, 4))
    key = 64 * 2 * 8 * 4  # embed * kv heads * head_dim, float32
    rest = 4 * sum(p.array().elements(kind.classes, {}) for p in kind.parameters) - 2 * key - 2 * 64 * 4
    assert two.memory["parameters"] == rest / 2 + 2 * key / 2 + 2 * 64 * 4
    assert four.memory["parameters"] == rest / 4 + 2 * key / 2 + 2 * 64 * 4


# -------------------------------------------------------------------------------------------------------- tied, sides
def test_tied_parameters_are_kept_once_on_a_stage_and_copied_on_a_later_one() -> None:
    tied = with_tied_parameters(HEAD)
    pipeline = dataclasses.replace(HERE, slices=2)
    kernel = 64 * 256 * 4
    here, later, own = (price(Strategy(dp=8), kind, at) for kind, at in ((tied, HERE), (tied, pipeline), (HEAD, HERE)))
    assert own.memory["parameters"] - here.memory["parameters"] == kernel
    assert own.memory["optimizer"] - here.memory["optimizer"] == 2 * kernel
    assert sum(later.memory.values()) == sum(own.memory.values())
    assert later.sync_s == pytest.approx(own.sync_s + kernel / 1e10 + 1e-5)
    assert here.update_s <= own.update_s


def test_side_value_crosses_from_its_maker_to_its_last_taker() -> None:
    (stream,) = BLOCK.inputs
    encoded = msgspec.structs.replace(stream, stream=False)
    encoder = msgspec.structs.replace(BLOCK, outputs=(stream, encoded))
    decoder = with_side_value(BLOCK, recomputed=False)
    names = (("embed", 1), ("layers.*", 2), ("decoder.*", 3), ("head", 1))
    model = msgspec.structs.replace(
        MODEL,
        layers=tuple(LayerRun(kind=name, count=n) for name, n in names),
        kinds=(MODEL.kind("embed"), encoder, decoder, MODEL.kind("head")),
    )
    (side,) = side_values(model)
    assert (side.first, side.last, side.copies) == (2, 5, 1)
    again = msgspec.structs.replace(
        model, kinds=(*model.kinds[:2], with_side_value(BLOCK, recomputed=True), model.kinds[3])
    )
    assert side_values(again) == ()


def test_batch_values_do_not_cross() -> None:
    tokens = Boundary(array=Array(dtype="int32", classes=("batch", "seq")), gradient=False)
    kind = msgspec.structs.replace(BLOCK, inputs=(*BLOCK.inputs, tokens))
    assert side_values(model_with(kind)) == ()


# -------------------------------------------------------------------------------------------------------- interleaved
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("slices", [2, 4])
def test_interleaving_equal_stages_shortens_the_bubble_by_the_chunks(slices: int, chunks: int) -> None:
    m = 4 * slices
    stages = [StageTime(forward_s=1 / chunks, backward_s=2 / chunks, step_end_s=0.0)] * (slices * chunks)
    schedule = build_schedule("interleaved-1f1b", slices, m, chunks)
    timeline = simulate(schedule, stages, [Crossing(0.0, meets=False)] * (len(stages) - 1))
    assert timeline.step_time_s == pytest.approx((m + (slices - 1) / chunks) * 3)
    assert timeline.busy_s == pytest.approx([3.0 * m] * slices)


def test_slice_holds_the_fullest_moment_of_its_stages() -> None:
    cost = price(Strategy(dp=8))
    moments = in_flight_units("interleaved-1f1b", 0, 2, 4, 2)
    memory = slice_memory([[(cost, 3)], [(cost, 1)]], moments, 10.0)
    assert memory["residuals"] == max(3 * a + b for a, b in moments) * cost.residual_bytes
    assert memory["boundary"] == 10


def test_interleaved_plan_reports_its_slice_s_peak_for_each_stage() -> None:
    strategy = Strategy(dp=4)
    runs = [("embed", "layers.*"), ("layers.*",), ("layers.*",), ("layers.*", "head")]
    stages = tuple(
        Stage(devices=4, runs=tuple(PlanRun(kind=kind, count=1, strategy=strategy) for kind in kinds)) for kinds in runs
    )
    plan = msgspec.structs.replace(
        one_stage(strategy), stages=stages, schedule="interleaved-1f1b", chunks=2, microbatches=4
    )
    found = estimate_plan(plan, MODEL, HARDWARE)
    assert [found.stages[k].peak_bytes for k in (0, 1)] == [found.stages[k].peak_bytes for k in (2, 3)]
    assert sum(found.times.values()) == pytest.approx(found.step_time_s, rel=1e-12)


# --------------------------------------------------------------------------------------------------------- properties
EVERY = [
    Strategy(tp=tp, ulysses=u, sp=sp, dp=8 // (tp * u), zero=zero, replicas=r, remat=remat)
    for tp, u, sp in ((1, 1, False), (4, 1, False), (4, 1, True), (1, 4, False), (1, 8, False))
    for zero in (0, 1, 2, 3)
    for r in (1, 2)
    for remat in ("none", "dots", "full")
    if (8 // (tp * u)) % r == 0 and (zero or r == 1) and (8 // tp > r or not zero)
]
FIGURES = [f.name for f in dataclasses.fields(LayerCost) if f.name.endswith(("_s", "_bytes"))]


@given(strategy=st.sampled_from(EVERY), samples=st.integers(1, 16), more=st.integers(1, 16))
def test_every_strategy_is_monotone_in_the_batch_and_never_negative(
    strategy: Strategy, samples: int, more: int
) -> None:
    small, large = (price(strategy, at=setting(8, microbatch=8 * n)) for n in (samples, samples + more))
    for figure in sorted(set(FIGURES) - {"sync_s"}):
        assert 0 <= getattr(small, figure) <= getattr(large, figure) * (1 + 1e-12)
    assert large.backward_s + large.sync_s >= (small.backward_s + small.sync_s) * (1 - 1e-12)
    assert min(*small.times.values(), *small.memory.values(), small.sync_s) >= 0


def model_with(kind: LayerKind) -> ModelProfile:
    return msgspec.structs.replace(MODEL, kinds=tuple(kind if k.name == kind.name else k for k in MODEL.kinds))


def one_stage(strategy: Strategy) -> Plan:
    runs = (("embed", 1), ("layers.*", 4), ("head", 1))
    return Plan(
        model=model_reference(MODEL),
        cluster=HERE.cluster,
        global_batch=64,
        microbatches=4,
        stages=(Stage(devices=8, runs=tuple(PlanRun(kind=k, count=n, strategy=strategy) for k, n in runs)),),
    )

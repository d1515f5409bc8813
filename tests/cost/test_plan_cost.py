from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import (
    Crossing,
    estimate_layer,
    estimate_plan,
    estimate_relayout,
    estimate_transfer,
    leaves_node,
    sample_flops,
    simulate,
    stream_arrays,
    stream_sizes,
    wire_strategy,
)
from galvatron_jax.cost._pipeline import StageTime
from galvatron_jax.errors import PlanError
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.schedule import build_schedule
from tests.cost.settings import HARDWARE, MODEL, legal_strategies, setting

BLOCK = "layers.*"


def plan_of(*stages: Stage, batch: int = 64, microbatches: int = 4) -> Plan:
    return Plan(
        model=model_reference(MODEL),
        cluster=Cluster(nodes=2, gpus_per_node=4, gpu="toy"),
        global_batch=batch,
        microbatches=microbatches,
        stages=stages,
    )


def run(kind: str, count: int, strategy: Strategy) -> PlanRun:
    return PlanRun(kind=kind, count=count, strategy=strategy)


def one_stage(strategy: Strategy, middle: Strategy | None = None, microbatches: int = 4) -> Plan:
    runs = (run("embed", 1, strategy), run(BLOCK, 4, middle or strategy), run("head", 1, strategy))
    return plan_of(Stage(devices=8, runs=runs), microbatches=microbatches)


def two_stages(first: Strategy, second: Strategy) -> Plan:
    return plan_of(
        Stage(devices=4, runs=(run("embed", 1, first), run(BLOCK, 3, first))),
        Stage(devices=4, runs=(run(BLOCK, 1, second), run("head", 1, second))),
    )


PLANS = [
    one_stage(Strategy(dp=8)),
    one_stage(Strategy(dp=8, zero=3, remat="full")),
    one_stage(Strategy(tp=4, dp=2, zero=1), Strategy(dp=8, zero=2)),
    one_stage(Strategy(tp=2, sp=True, dp=4, zero=1), microbatches=1),
    two_stages(Strategy(dp=4, zero=3), Strategy(tp=2, sp=True, dp=2, zero=1)),
    two_stages(Strategy(tp=4), Strategy(tp=4, remat="full")),
]


def test_plan_of_one_stage_is_microbatches_times_its_layers_and_the_step_end() -> None:
    strategy = Strategy(dp=8, zero=1)
    case = setting(8, microbatch=16, microbatches=4)
    costs = [estimate_layer(MODEL.kind(kind), strategy, case) for kind in ("embed", BLOCK, "head")]
    counts = (1, 4, 1)
    passes = sum(n * (c.forward_s + c.backward_s) for n, c in zip(counts, costs, strict=True))
    ends = sum(n * (c.sync_s + c.update_s) for n, c in zip(counts, costs, strict=True))
    assert estimate_plan(one_stage(strategy), MODEL, HARDWARE).step_time_s == pytest.approx(4 * passes + ends)


def test_plan_with_two_layouts_pays_for_both_changes() -> None:
    ends, middle = Strategy(tp=4, dp=2), Strategy(dp=8)
    case = setting(8, microbatch=16, microbatches=4)
    block = MODEL.kind(BLOCK)
    (stream,) = stream_arrays(block)
    sizes = stream_sizes(block, case)
    into = estimate_relayout(stream, sizes, ends, middle, case)
    back = estimate_relayout(stream, sizes, middle, ends, case)
    found = estimate_plan(one_stage(ends, middle), MODEL, HARDWARE).times["relayout"]
    assert found == pytest.approx(4 * (sum(into) + sum(back)))
    assert found > 0


def test_plan_with_two_stages_is_the_simulated_schedule() -> None:
    first, second = Strategy(dp=4, zero=3), Strategy(tp=2, sp=True, dp=2, zero=1)
    case = setting(8, microbatch=16, microbatches=4)
    case = type(case)(**{f: getattr(case, f) for f in case.__slots__} | {"stage_devices": 4})
    block = MODEL.kind(BLOCK)
    (stream,) = stream_arrays(block)
    sizes = stream_sizes(block, case)
    wire = wire_strategy(case)
    arrive = estimate_relayout(stream, sizes, wire, second, case)
    leave = estimate_relayout(stream, sizes, first, wire, case)
    times = []
    for strategy, layers, change in (
        (first, [("embed", 1), (BLOCK, 3)], leave),
        (second, [(BLOCK, 1), ("head", 1)], arrive),
    ):
        costs = [(estimate_layer(MODEL.kind(kind), strategy, case), n) for kind, n in layers]
        times.append(
            StageTime(
                forward_s=sum(n * c.forward_s for c, n in costs) + change[0],
                backward_s=sum(n * c.backward_s for c, n in costs) + change[1],
                step_end_s=sum(n * (c.sync_s + c.update_s) for c, n in costs),
            )
        )
    transfer_s = estimate_transfer(stream.local_bytes(sizes, {}) / 4, case, boundary=0)
    expected = simulate(build_schedule("1f1b", 2, 4), times, [Crossing(transfer_s, leaves_node(case, 0))]).step_time_s
    assert estimate_plan(two_stages(first, second), MODEL, HARDWARE).step_time_s == expected


@pytest.mark.parametrize("plan", PLANS)
def test_prediction_adds_up(plan: Plan) -> None:
    found = estimate_plan(plan, MODEL, HARDWARE)
    assert sum(found.times.values()) == pytest.approx(found.step_time_s, rel=1e-12)
    for stage in found.stages:
        assert sum(stage.memory.values()) == stage.peak_bytes
    assert found.tokens_per_s == pytest.approx(64 * 32 / found.step_time_s)
    assert 0 < found.mfu < 1
    assert set(found.times) == {
        "compute",
        "recompute",
        "tensor_communication",
        "data_communication",
        "relayout",
        "optimizer",
        "bubble",
    }


@pytest.mark.parametrize("plan", PLANS)
def test_prediction_is_a_valid_part_of_a_plan_file(plan: Plan) -> None:
    predicted = estimate_plan(plan, MODEL, HARDWARE)
    again = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(plan, predicted=predicted)), type=Plan)
    assert again.predicted == predicted


def test_one_stage_has_no_bubble_and_no_boundary() -> None:
    found = estimate_plan(one_stage(Strategy(dp=8)), MODEL, HARDWARE)
    assert found.times["bubble"] == 0
    assert found.stages[0].memory["boundary"] == 0


def test_two_stages_hold_one_message_each_and_their_in_flight_residuals() -> None:
    strategy = Strategy(dp=4)
    found = estimate_plan(two_stages(strategy, strategy), MODEL, HARDWARE)
    wire_bytes = 16 * 32 * 64 * 2 / 4
    assert [stage.memory["boundary"] for stage in found.stages] == [
        wire_bytes
    ] * 2  # a cotangent; what arrived for the next pass
    case = setting(4, microbatch=16, microbatches=4)
    embed, block, head = (
        estimate_layer(MODEL.kind(k), strategy, case).residual_bytes for k in ("embed", BLOCK, "head")
    )
    assert found.stages[0].memory["residuals"] == pytest.approx(2 * (embed + 3 * block), abs=1)
    assert found.stages[1].memory["residuals"] == pytest.approx(block + head, abs=1)


def test_sample_flops_of_a_llama_is_six_per_parameter_and_token_and_half_of_attention() -> None:
    matrices = MODEL.parameter_count - 256 * 64 - (2 * 4 + 1) * 64  # without the lookup table and norm scales
    attention = 4 * (3 * 2 * 2 * 32 * 32 * 64)  # layers * (2 products, forward + 2x backward) * 2 seq^2 embed
    assert sample_flops(MODEL) == pytest.approx(6 * 32 * matrices + attention / 2)


def test_mfu_counts_model_flops_over_the_peak_of_all_devices() -> None:
    found = estimate_plan(one_stage(Strategy(dp=8, remat="full")), MODEL, HARDWARE)
    assert found.mfu == pytest.approx(64 * sample_flops(MODEL) / (found.step_time_s * 8 * 1e14))


def test_plan_that_does_not_fit_the_model_raises() -> None:
    plan = plan_of(Stage(devices=8, runs=(run(BLOCK, 4, Strategy(dp=8)),)))
    with pytest.raises(PlanError, match="the plan has 4 layers"):
        estimate_plan(plan, MODEL, HARDWARE)


@given(strategy=st.sampled_from(legal_strategies()), microbatches=st.sampled_from([1, 2, 4, 8]))
def test_runs_may_be_split_without_changing_the_price(strategy: Strategy, microbatches: int) -> None:
    whole = one_stage(strategy, microbatches=microbatches)
    (stage,) = whole.stages
    embed, block, head = stage.runs
    ones = msgspec.structs.replace(block, count=1)
    split = msgspec.structs.replace(stage, runs=(embed, ones, msgspec.structs.replace(block, count=3), head))
    price = estimate_plan(whole, MODEL, HARDWARE)
    other = estimate_plan(msgspec.structs.replace(whole, stages=(split,)), MODEL, HARDWARE)
    assert other.step_time_s == pytest.approx(price.step_time_s, rel=1e-12)
    assert other.stages[0].peak_bytes == pytest.approx(price.stages[0].peak_bytes, abs=6)

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost import LayerCost, collective_seconds, device_group, estimate_layer
from galvatron_jax.cost._overlap import exposed_seconds
from galvatron_jax.cost._weights import Spread, weight_work
from galvatron_jax.plan import Strategy
from galvatron_jax.profile import (
    Array,
    Collective,
    CollectiveKind,
    CollectiveTable,
    Dot,
    LayerKind,
    Link,
    Parameter,
    Traffic,
)
from tests.cost.settings import HARDWARE, KINDS, MODEL, legal_strategies, setting, strategies
from tests.support.toy_models import toy_hardware

MATRIX = 1000 * 4000
LAYER = LayerKind(
    name="k",
    classes={"batch": 1, "seq": 1000, "embed": 1000, "mlp": 4000},
    parameters=(Parameter(path="w", dtype="float32", compute_dtype="bfloat16", dims=(("embed",), ("mlp",))),),
    dots=(
        Dot(phase="forward", dtype="bfloat16", classes=("batch", "seq", "embed", "mlp")),
        Dot(phase="forward", dtype="bfloat16", classes=("batch", "seq", "embed", "mlp"), recomputed=False),
        Dot(phase="backward", dtype="bfloat16", classes=("batch", "seq", "embed", "mlp"), count=4),
    ),
    traffic=(
        Traffic(phase="forward", array=Array(dtype="bfloat16", classes=("batch", "seq", "embed"))),
        Traffic(phase="forward", array=Array(dtype="float32", classes=("embed", "mlp"))),
    ),
    inputs=(),
    outputs=(),
    residuals=(),
    workspace=(),
    candidates=MODEL.kind("layers.*").candidates,
    data=(Collective(phase="forward", kind="all-reduce", array=Array(dtype="float32"), merged_count=1),),
)
DOT_S = 2 * 2 * 1000 * MATRIX / 0.75e14  # two samples per device, 16e9 FLOP: the flat end of the curve
STREAM_S = 2 * 1000 * 1000 * 2 / 1e12
CAST_S = MATRIX * 4 / 1e12
LOSS_S = collective_seconds("all-reduce", 4, device_group(8, 1, 4), HARDWARE)


def price(strategy: Strategy, microbatches: int = 1) -> LayerCost:
    return estimate_layer(LAYER, strategy, setting(8, microbatch=16, microbatches=microbatches))


def data_collective(kind: CollectiveKind, itemsize: int) -> float:
    return collective_seconds(kind, MATRIX * itemsize, device_group(8, 1, 4), HARDWARE)


def exposed(compute_s: float, communication_s: float) -> float:
    return exposed_seconds(compute_s, communication_s, HARDWARE.overlap_slowdown)


def test_forward_is_products_traffic_casts_and_the_loss_mean() -> None:
    assert price(Strategy(dp=8)).forward_s == pytest.approx(2 * DOT_S + STREAM_S + CAST_S + LOSS_S)


def test_backward_is_its_own_products() -> None:
    assert price(Strategy(dp=8)).backward_s == pytest.approx(4 * DOT_S)


def test_remat_runs_forward_again_but_not_its_dead_product() -> None:
    assert price(Strategy(dp=8, remat="full")).backward_s == pytest.approx(5 * DOT_S + STREAM_S + CAST_S)
    assert price(Strategy(dp=8, remat="full")).times["recompute"] == pytest.approx(DOT_S + STREAM_S + CAST_S)


def test_zero_0_reduces_once_behind_backward_in_the_compute_dtype() -> None:
    cost = price(Strategy(dp=8))
    assert cost.sync_s == pytest.approx(exposed(4 * DOT_S, data_collective("all-reduce", 2)))


def test_zero_0_with_microbatches_reduces_the_float32_accumulator_once() -> None:
    cost = price(Strategy(dp=8), microbatches=4)
    accumulate_s = MATRIX * (2 + 4 + 4) / 1e12
    assert cost.backward_s == pytest.approx(4 * DOT_S + accumulate_s)
    assert cost.sync_s == pytest.approx(exposed(4 * DOT_S + accumulate_s, data_collective("all-reduce", 4)))


def test_zero_1_scatters_once_and_gathers_the_updated_parameters() -> None:
    cost = price(Strategy(dp=8, zero=1))
    reduce_s, gather_s = data_collective("reduce-scatter", 2), data_collective("all-gather", 4)
    assert cost.sync_s == pytest.approx(exposed(4 * DOT_S, reduce_s) + gather_s)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_zero_2_scatters_every_microbatch(microbatches: int) -> None:
    cost = price(Strategy(dp=8, zero=2), microbatches)
    accumulate_s = MATRIX * (2 + 4 + 4) / 8 / 1e12 if microbatches > 1 else 0.0
    backward_s = 4 * DOT_S + accumulate_s
    assert cost.backward_s == pytest.approx(backward_s + exposed(backward_s, data_collective("reduce-scatter", 2)))
    assert cost.sync_s == pytest.approx(data_collective("all-gather", 4))


def test_zero_3_gathers_twice_and_casts_its_shard() -> None:
    cost = price(Strategy(dp=8, zero=3))
    gather_s, reduce_s = data_collective("all-gather", 2), data_collective("reduce-scatter", 2)
    forward_s = 2 * DOT_S + STREAM_S + CAST_S / 8
    assert cost.forward_s == pytest.approx(forward_s + LOSS_S + exposed(forward_s, gather_s))
    assert cost.backward_s == pytest.approx(4 * DOT_S + exposed(4 * DOT_S, gather_s + reduce_s))
    assert cost.sync_s == 0


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_backend_that_combines_nothing_pays_the_latency_of_each_array(zero: int) -> None:
    """Of equal arrays: so many collectives of a part each, for gathers and for reductions."""
    halves = [msgspec.structs.replace(LAYER.parameters[0], path=path, dims=(("seq",), ("mlp",))) for path in "ab"]
    kind = msgspec.structs.replace(LAYER, classes=LAYER.classes | {"seq": 504}, parameters=tuple(halves))
    apart = msgspec.structs.replace(HARDWARE, combines_gathers=False)
    seconds = []
    for hardware in (apart, HARDWARE):
        work = weight_work(kind, hardware, Spread.of(Strategy(dp=8, zero=zero)), False, 8, 4, False)
        seconds.append(work.gather_s + work.reduce_each_s + work.reduce_once_s + work.gather_once_s)
    expected = _latency("all-reduce") if zero == 0 else _latency("reduce-scatter") + _latency("all-gather")
    assert seconds[0] - seconds[1] == pytest.approx(expected)


def test_arrays_that_move_apart_take_the_time_of_their_own_sizes() -> None:
    """By a table that bends: of a matrix and a vector the vector is nearly free, two halves would not be."""
    table = CollectiveTable(
        kind="all-reduce", group=8, inside_node=False, sizes_bytes=(1e3, 1e5, 1e7), times_s=(1e-4, 2e-3, 1e-2)
    )
    hardware = msgspec.structs.replace(HARDWARE, combines_gathers=False, collectives=(table,))
    matrix = msgspec.structs.replace(LAYER.parameters[0], dims=(("embed",), ("mlp",)))
    vector = msgspec.structs.replace(LAYER.parameters[0], path="v", dims=(("embed",),))
    kind = msgspec.structs.replace(LAYER, parameters=(matrix, vector))
    work = weight_work(kind, hardware, Spread.of(Strategy(dp=8)), False, 8, 4, False)
    sizes = [p.array(p.compute_dtype).local_bytes(kind.classes, {}) for p in kind.parameters]
    group = device_group(8, 1, 4)
    expected = sum(collective_seconds("all-reduce", size, group, hardware) for size in sizes)
    assert work.reduce_once_s == pytest.approx(expected)
    assert work.reduce_once_s < 0.9 * 2 * collective_seconds("all-reduce", sum(sizes) / 2, group, hardware)


def _latency(kind: CollectiveKind) -> float:
    """Seconds of a collective over all devices that moves next to nothing."""
    return collective_seconds(kind, 1e-9, device_group(8, 1, 4), HARDWARE)


@pytest.mark.parametrize(("zero", "share"), [(0, 1), (1, 8), (2, 8), (3, 8)])
def test_update_reads_and_writes_what_the_device_owns(zero: int, share: int) -> None:
    # gradient, parameter in and out, 8 bytes of state in and out
    assert price(Strategy(dp=8, zero=zero)).update_s == pytest.approx(MATRIX * (3 * 4 + 2 * 8) / share / 1e12)


STREAM_BYTES = 16 * 32 * 64 * 2


@pytest.mark.parametrize(
    ("remat", "merged", "backward"), [("none", True, 2), ("none", False, 5), ("full", True, 3), ("full", False, 6)]
)
def test_tensor_collectives_of_a_block_are_counted_as_compiled(remat: str, merged: bool, backward: int) -> None:
    hardware = toy_hardware(sums_before_reducing=merged)
    strategy = msgspec.convert({"tp": 4, "dp": 2, "remat": remat}, Strategy)
    cost = estimate_layer(MODEL.kind("layers.*"), strategy, setting(8, hardware=hardware))
    one = collective_seconds("all-reduce", STREAM_BYTES / 2, device_group(4, 1, 4), hardware)
    assert cost.times["tensor_communication"] == pytest.approx((2 + backward) * one)


def test_sequence_parallel_collectives_move_the_whole_stream_of_the_group() -> None:
    cost = estimate_layer(MODEL.kind("layers.*"), Strategy(tp=4, sp=True, dp=2, remat="full"), setting(8))
    group = device_group(4, 1, 4)
    gather, scatter = (
        collective_seconds(kind, STREAM_BYTES / 2, group, HARDWARE) for kind in ("all-gather", "reduce-scatter")
    )
    # forward 2 + 2, backward 2 + 2, again 2 + 1: the last scatter is dead code
    assert cost.times["tensor_communication"] == pytest.approx(6 * gather + 5 * scatter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_breakdowns_add_up(kind: str, microbatches: int) -> None:
    for strategy in legal_strategies():
        cost = estimate_layer(MODEL.kind(kind), strategy, setting(8, microbatches=microbatches))
        assert sum(cost.times.values()) == pytest.approx(cost.forward_s + cost.backward_s)
        assert sum(cost.memory.values()) == pytest.approx(cost.state_bytes + cost.residual_bytes + cost.live_bytes)
        assert min(*cost.times.values(), *cost.memory.values(), cost.sync_s, cost.update_s) >= 0


FIGURES = [f.name for f in dataclasses.fields(LayerCost) if f.name.endswith(("_s", "_bytes"))]


@given(kind=st.sampled_from(KINDS), strategy=strategies, samples=st.integers(1, 32), more=st.integers(1, 32))
def test_layer_never_cheaper_with_a_larger_batch(kind: str, strategy: Strategy, samples: int, more: int) -> None:
    # The once-per-step reduction may hide better behind more compute: it counts together with backward.
    small = estimate_layer(MODEL.kind(kind), strategy, setting(8, microbatch=8 * samples))
    large = estimate_layer(MODEL.kind(kind), strategy, setting(8, microbatch=8 * (samples + more)))
    for figure in sorted(set(FIGURES) - {"sync_s"}):
        assert getattr(large, figure) >= getattr(small, figure) * (1 - 1e-12)
    assert large.backward_s + large.sync_s >= (small.backward_s + small.sync_s) * (1 - 1e-12)


@given(kind=st.sampled_from(KINDS), strategy=strategies, slower=st.floats(1, 10))
def test_layer_never_faster_on_slower_hardware(kind: str, strategy: Strategy, slower: float) -> None:
    slow = toy_hardware(
        memory_bandwidth_bytes_per_s=1e12 / slower,
        matmul_flops_per_s={"bfloat16": 1e14 / slower},
        kernel_launch_s=1e-6 * slower,
        intra_node=Link(bandwidth_bytes_per_s=1e11 / slower, latency_s=1e-6 * slower),
        inter_node=Link(bandwidth_bytes_per_s=1e10 / slower, latency_s=1e-5 * slower),
    )
    fast_cost = estimate_layer(MODEL.kind(kind), strategy, setting(8))
    slow_cost = estimate_layer(MODEL.kind(kind), strategy, setting(8, hardware=slow))
    for figure in ("forward_s", "backward_s", "sync_s", "update_s"):
        assert getattr(slow_cost, figure) >= getattr(fast_cost, figure) * (1 - 1e-12)


@given(kind=st.sampled_from(KINDS), strategy=strategies, unit=st.floats(0.1, 10))
def test_times_have_the_dimension_of_time(kind: str, strategy: Strategy, unit: float) -> None:
    # Measure time in another unit: every rate divides, every duration multiplies, so must every result.
    other = toy_hardware(
        memory_bandwidth_bytes_per_s=1e12 / unit,
        matmul_flops_per_s={"bfloat16": 1e14 / unit},
        kernel_launch_s=1e-6 * unit,
        intra_node=Link(bandwidth_bytes_per_s=1e11 / unit, latency_s=1e-6 * unit),
        inter_node=Link(bandwidth_bytes_per_s=1e10 / unit, latency_s=1e-5 * unit),
    )
    seconds = estimate_layer(MODEL.kind(kind), strategy, setting(8))
    units = estimate_layer(MODEL.kind(kind), strategy, setting(8, hardware=other))
    for figure in FIGURES:
        scale = unit if figure.endswith("_s") else 1
        assert getattr(units, figure) == pytest.approx(getattr(seconds, figure) * scale, rel=1e-9, abs=1e-15)


def test_estimate_layer_takes_less_than_a_millisecond() -> None:
    kind, case = MODEL.kind("layers.*"), setting(8)
    cases = legal_strategies() * 10
    started = time.perf_counter()
    for strategy in cases:
        estimate_layer(kind, strategy, case)
    assert (time.perf_counter() - started) / len(cases) < 1e-3


def test_cost_never_imports_jax() -> None:
    code = "import sys, galvatron_jax.cost; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'optax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost._compute import (
    compute_seconds,
    efficiency_curve,
    matmul_peak,
    recompute_seconds,
    traffic_seconds,
)
from galvatron_jax.cost._kind import PHASES, KindSums, is_fused, summarise
from galvatron_jax.cost._values import Shares
from galvatron_jax.errors import DocumentError
from galvatron_jax.plan import Strategy
from galvatron_jax.profile import Array, Dot, LayerKind, Phase, Traffic
from tests.cost.settings import HARDWARE, MODEL
from tests.support.toy_models import toy_hardware

ONE = Shares(1, 1)


def kind_of(*dots: Dot, traffic: tuple[Traffic, ...] = (), **classes: int) -> LayerKind:
    return LayerKind(
        name="k",
        classes={"batch": 1, "n": 1000, **classes},
        parameters=(),
        dots=dots,
        traffic=traffic,
        inputs=(),
        outputs=(),
        residuals=(),
        workspace=(),
    )


def sums_of(*dots: Dot, traffic: tuple[Traffic, ...] = (), **classes: int) -> KindSums:
    kind = kind_of(*dots, traffic=traffic, **classes)
    return summarise(kind, is_fused(kind, HARDWARE))


def test_efficiency_at_the_points_of_the_curve_is_theirs() -> None:
    curve = efficiency_curve(HARDWARE)  # 0.25 at 1e8 FLOP, 0.75 at 1e10
    assert curve.at(1e8) == pytest.approx(0.25)
    assert curve.at(1e10) == pytest.approx(0.75)


def test_efficiency_between_points_is_a_power_law() -> None:
    assert efficiency_curve(HARDWARE).at(1e9) == pytest.approx(math.sqrt(0.25 * 0.75))


@pytest.mark.parametrize(("flops", "efficiency"), [(1.0, 0.25), (1e20, 0.75)])
def test_efficiency_outside_the_curve_is_flat(flops: float, efficiency: float) -> None:
    assert efficiency_curve(HARDWARE).at(flops) == pytest.approx(efficiency)


def test_compute_one_product_takes_flops_over_peak_times_efficiency() -> None:
    dot = Dot(phase="forward", dtype="bfloat16", classes=("batch", "n", "n", "m"))
    sums = sums_of(dot, m=5000)  # 2 * 1000 * 1000 * 5000 = 1e10 FLOP, efficiency 0.75, peak 1e14
    assert compute_seconds(sums, "forward", ONE, HARDWARE, causal=False) == pytest.approx(1e10 / 0.75e14)


def test_compute_count_multiplies_time_not_size() -> None:
    dot = Dot(phase="forward", dtype="bfloat16", classes=("n", "n", "m"), count=3)
    sums = sums_of(dot, m=5000)
    assert compute_seconds(sums, "forward", ONE, HARDWARE, causal=False) == pytest.approx(3 * 1e10 / 0.75e14)


def test_compute_tiny_product_takes_one_launch() -> None:
    sums = sums_of(Dot(phase="forward", dtype="bfloat16", classes=("batch",), count=7))
    assert compute_seconds(sums, "forward", ONE, HARDWARE, causal=False) == pytest.approx(7e-6)


def test_compute_backward_counts_backward_products_only() -> None:
    forward = Dot(phase="forward", dtype="bfloat16", classes=("n", "n", "m"))
    backward = Dot(phase="backward", dtype="bfloat16", classes=("n", "n", "m"), count=5)
    sums = sums_of(forward, backward, m=5000)
    assert compute_seconds(sums, "backward", ONE, HARDWARE, causal=False) == pytest.approx(5e10 / 0.75e14)


@pytest.mark.parametrize(
    ("phase", "causal", "seconds"),
    [("forward", False, 1e10 / 0.5e14), ("forward", True, 0.5e10 / 0.5e14), ("backward", True, 0.5e10 / 0.4e14)],
)
def test_compute_fused_attention_uses_its_own_efficiency_and_half_when_causal(
    phase: Phase, causal: bool, seconds: float
) -> None:
    dots = [Dot(phase=p, dtype="bfloat16", classes=("n", "n", "m"), attention=True) for p in PHASES]
    assert compute_seconds(sums_of(*dots, m=5000), phase, ONE, HARDWARE, causal=causal) == pytest.approx(seconds)


def test_compute_fused_backward_runs_in_the_dtype_of_the_forward_operands() -> None:
    forward = Dot(phase="forward", dtype="bfloat16", classes=("n", "n", "m"), attention=True)
    backward = Dot(phase="backward", dtype="float32", classes=("n", "n", "m"), attention=True)
    sums = sums_of(forward, backward, m=5000)
    assert compute_seconds(sums, "backward", ONE, HARDWARE, causal=False) == pytest.approx(1e10 / 0.4e14)


@pytest.mark.parametrize(("dtype", "fused_attention"), [("float32", True), ("bfloat16", False)])
def test_compute_unfused_attention_is_whole_and_writes_its_scores(dtype: str, fused_attention: bool) -> None:
    hardware = toy_hardware(fused_attention=fused_attention)
    dot = Dot(phase="forward", dtype=dtype, classes=("n", "n", "m"), attention=True)
    scores = Traffic(phase="forward", array=Array(dtype="float32", classes=("batch", "n", "n"), attention=True))
    kind = kind_of(dot, traffic=(scores,), m=5000)
    sums = summarise(kind, is_fused(kind, hardware))
    expected = 1e10 / (0.75 * hardware.matmul_flops_per_s[dtype]) + 4e6 / 1e12
    assert compute_seconds(sums, "forward", ONE, hardware, causal=True) == pytest.approx(expected)


def test_compute_fused_attention_leaves_its_arrays_out() -> None:
    dot = Dot(phase="forward", dtype="bfloat16", classes=("n", "n", "m"), attention=True)
    scores = Traffic(phase="forward", array=Array(dtype="float32", classes=("batch", "n", "n"), attention=True))
    assert sums_of(dot, traffic=(scores,), m=5000).traffic["forward"].at(ONE) == 0


def test_compute_again_skips_products_that_backward_does_not_need() -> None:
    needed = Dot(phase="forward", dtype="bfloat16", classes=("n", "n", "m"))
    sums = sums_of(needed, msgspec.structs.replace(needed, recomputed=False), m=5000)
    assert recompute_seconds(sums, "full", ONE, HARDWARE, causal=False) == pytest.approx(1e10 / 0.75e14)


def test_traffic_takes_bytes_over_bandwidth_but_at_least_its_launches() -> None:
    assert traffic_seconds(1e9, 2, HARDWARE) == pytest.approx(1e-3)
    assert traffic_seconds(8.0, 2, HARDWARE) == pytest.approx(2e-6)
    assert traffic_seconds(0.0, 2, HARDWARE) == 0


def test_matmul_peak_unknown_dtype_raises_naming_the_known_ones() -> None:
    with pytest.raises(DocumentError, match="no matmul rate for int8.*bfloat16, float16, float32"):
        matmul_peak(HARDWARE, "int8")


@given(flops=st.floats(1, 1e16), factor=st.floats(1, 1e3))
def test_product_time_never_falls_while_flops_rise(flops: float, factor: float) -> None:
    curve = efficiency_curve(HARDWARE)
    assert flops * factor / curve.at(flops * factor) >= flops / curve.at(flops) * (1 - 1e-12)


@given(microbatch=st.integers(1, 64), tp=st.sampled_from([1, 2, 4, 8]), sp=st.booleans())
def test_summed_dots_equal_the_profile_s_own_formula(microbatch: int, tp: int, sp: bool) -> None:
    kind = MODEL.kind("layers.*")
    shares = Shares.of(kind, Strategy(tp=tp, sp=sp), microbatch)
    sizes = {**kind.classes, "batch": microbatch}
    for phase in PHASES:
        ours = [dot.flops.at(shares) for dot in summarise(kind, True).dots[phase]]
        profile = [dot.flops(sizes, {"heads": tp, "mlp": tp}) for dot in kind.dots if dot.phase == phase]
        assert ours == pytest.approx(profile)

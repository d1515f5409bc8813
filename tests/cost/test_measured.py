"""Measured passes take the place of formulas: exactly where they were measured, scaled by the formulas elsewhere."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import Setting, estimate_layer
from galvatron_jax.cost._measured import interpolate_samples, is_measured, pass_seconds
from galvatron_jax.measured import Measured, Pass, PassTable, Provenance
from galvatron_jax.plan import Training
from galvatron_jax.profile import HardwareProfile, LayerKind
from galvatron_jax.strategy import Remat, Strategy
from tests.support.toy_models import llama_like_profile, toy_hardware

MODEL = llama_like_profile(layers=2, embed=64, heads=8, head_dim=8, mlp=128, vocab=256, seq=32, dtype="float32")
HARDWARE = toy_hardware(fused_attention=False)
HERE = Provenance(device="toy", device_kind="Toy", jax_version="0.10.2", date="2026-11-24")


def table(tp: int = 1, *, what: Pass = "forward", **points: float) -> PassTable:
    samples = tuple(int(name[1:]) for name in points)
    return PassTable(what=what, tp=tp, samples=samples, times_s=tuple(points.values()))


def block(*tables: PassTable, provenance: Provenance = HERE, fused: bool = False) -> LayerKind:
    measured = Measured(provenance=provenance, passes=tables, fused_attention=fused)
    return msgspec.structs.replace(MODEL.kind("layers.*"), measured=measured)


def formula(strategy: Strategy, microbatch: int) -> float:
    """Work in proportion to samples and 1/tp; a tenth of it is not divided by tp but by sequence parallelism."""
    samples = microbatch / strategy.dp
    return samples * (0.9 / strategy.tp + 0.1 / (strategy.tp if strategy.sp else 1))


def seconds(kind: LayerKind, strategy: Strategy, microbatch: int, hardware: HardwareProfile = HARDWARE) -> float:
    return pass_seconds(kind, hardware, "forward", strategy, microbatch, formula)


@pytest.mark.parametrize(("microbatch", "dp", "expected"), [(1, 1, 2.0), (4, 1, 5.0), (8, 4, 3.0), (2, 1, 3.0)])
def test_measured_strategy_takes_what_the_clock_said(microbatch: int, dp: int, expected: float) -> None:
    kind = block(table(n1=2.0, n4=5.0))
    assert seconds(kind, Strategy(dp=dp), microbatch) == pytest.approx(expected)


def test_other_strategy_is_scaled_by_the_ratio_of_the_formulas() -> None:
    kind = block(table(tp=1, n1=10.0, n2=20.0), table(tp=2, n1=6.0, n2=12.0))
    whole, sharded = Strategy(tp=2), Strategy(tp=2, sp=True)
    assert seconds(kind, whole, 2) == pytest.approx(12.0)
    assert seconds(kind, sharded, 2) == pytest.approx(12.0 * formula(sharded, 2) / formula(whole, 2))
    eight = Strategy(tp=8)
    assert seconds(kind, eight, 2) == pytest.approx(12.0 * formula(eight, 2) / formula(whole, 2))


@pytest.mark.parametrize("change", ["another device", "attention in another way", "never measured"])
def test_foreign_measurement_does_not_count(change: str) -> None:
    foreign = msgspec.structs.replace(HERE, device="h100")
    kind = {
        "another device": block(table(n1=99.0), provenance=foreign),
        "attention in another way": block(table(n1=99.0), fused=True),
        "never measured": MODEL.kind("layers.*"),
    }[change]
    assert not is_measured(kind, HARDWARE)
    assert seconds(kind, Strategy(), 1) == formula(Strategy(), 1)


def test_measured_hardware_of_the_same_device_counts() -> None:
    measured = msgspec.structs.replace(HARDWARE, name="toy-1x8-measured", provenance=HERE)
    assert seconds(block(table(n1=7.0)), Strategy(), 1, measured) == 7.0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_price_of_a_layer_holds_the_measured_seconds(remat: Remat) -> None:
    tables = [table(what="forward", n1=3.0), table(what="backward", n1=5.0), table(what="recompute", n1=2.0)]
    strategy = Strategy(remat=remat)
    setting = Setting(
        hardware=HARDWARE,
        cluster=Cluster(nodes=1, gpus_per_node=1),
        stage_devices=1,
        microbatch=1,
        microbatches=1,
        training=Training(),
        causal_attention=True,
    )
    measured, formula = (estimate_layer(k, strategy, setting) for k in (block(*tables), MODEL.kind("layers.*")))
    casts_s = sum(formula.times[name] for name in ("compute", "recompute"))  # microseconds: weights only
    again_s = 2.0 if remat == "full" else 0.0
    assert measured.times["compute"] == pytest.approx(8.0, abs=casts_s)
    assert measured.times["recompute"] == pytest.approx(again_s, abs=casts_s)
    assert measured.memory == formula.memory


def test_recomputation_without_a_measurement_is_scaled_like_forward() -> None:
    kind = block(table(n1=3.0))
    found = pass_seconds(kind, HARDWARE, "recompute", Strategy(), 1, lambda s, m: 0.5 * formula(s, m), forward=formula)
    assert found == pytest.approx(0.5 * 3.0)


def test_pass_whose_formula_is_nothing_takes_the_clock() -> None:
    assert pass_seconds(block(table(n1=3.0)), HARDWARE, "forward", Strategy(), 2, lambda *_: 0.0) == 6.0


@given(
    times=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4).map(sorted),
    samples=st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True).map(sorted),
    asked=st.integers(1, 128),
)
def test_interpolation_never_falls_and_is_positive(times: list[float], samples: list[int], asked: int) -> None:
    count = min(len(times), len(samples))
    points = PassTable(what="forward", tp=1, samples=tuple(samples[:count]), times_s=tuple(times[:count]))
    low, high = interpolate_samples(points, asked), interpolate_samples(points, asked + 1)
    assert 0 < low <= high * (1 + 1e-12)

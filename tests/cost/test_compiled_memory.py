"""Compiled memory takes the place of formulas where a strategy was compiled, and only there."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given

from galvatron_jax.cost import count_compiled, estimate_layer, memory_source
from galvatron_jax.measured import MeasuredMemory, MemoryTable, Provenance
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.profile import LayerKind

from .settings import HARDWARE, MODEL, setting, strategies

HERE = Provenance(device="toy", device_kind="toy (compiled for)", jax_version="0.10.2", date="2026-11-25")
KIND = MODEL.kind("layers.*")
SAMPLES = (1, 4)
KEPT, WORKSPACE = (1_000_000, 4_000_000), (3_000_000, 9_000_000)
FSDP = Strategy(dp=8, zero=3)


def table(strategy: Strategy, *, accumulates: bool = False, samples: tuple[int, ...] = SAMPLES) -> MemoryTable:
    count = len(samples)
    fields = {name: getattr(strategy, name) for name in strategy.__struct_fields__}
    return MemoryTable(
        **fields,
        accumulates=accumulates,
        samples=samples,
        kept_bytes=KEPT[:count],
        workspace_bytes=WORKSPACE[:count],
    )


def compiled(*tables: MemoryTable, provenance: Provenance = HERE, fused: bool = HARDWARE.fused_attention) -> LayerKind:
    return msgspec.structs.replace(
        KIND, memory=MeasuredMemory(provenance=provenance, fused_attention=fused, tables=tables)
    )


def kept_and_live(kind: LayerKind, strategy: Strategy, microbatch: int = 8) -> tuple[float, float]:
    cost = estimate_layer(kind, strategy, setting(microbatch=microbatch))
    return cost.residual_bytes, cost.live_bytes


@pytest.mark.parametrize(("samples", "kept", "live"), [(1, 1e6, 3e6), (4, 4e6, 9e6), (2, 2e6, 5e6), (8, 8e6, 17e6)])
def test_compiled_strategy_takes_what_the_compiler_said(samples: int, kept: float, live: float) -> None:
    assert kept_and_live(compiled(table(FSDP)), FSDP, 8 * samples) == pytest.approx((kept, live))


def test_states_stay_formulas() -> None:
    measured, formula = (estimate_layer(kind, FSDP, setting(microbatch=8)) for kind in (compiled(table(FSDP)), KIND))
    assert measured.state_bytes == formula.state_bytes
    assert measured.times == formula.times


@pytest.mark.parametrize("change", [{"replicas": 2}, {"dp": 4}], ids=str)
def test_other_ranks_differ_by_the_difference_of_the_formulas(change: dict[str, int]) -> None:
    kind, other = compiled(table(FSDP)), msgspec.structs.replace(FSDP, **change)
    formula = [b - a for a, b in zip(kept_and_live(KIND, FSDP), kept_and_live(KIND, other, other.dp), strict=True)]
    assert kept_and_live(kind, other, other.dp) == pytest.approx((1e6 + formula[0], 3e6 + formula[1]))


@pytest.mark.parametrize(
    "other",
    [
        Strategy(dp=8, zero=1),
        Strategy(dp=8, zero=3, remat="full"),
        Strategy(tp=2, sp=True, dp=4, zero=3),
        Strategy(tp=2, dp=4, zero=3),
    ],
    ids=str,
)
def test_other_strategies_are_priced_by_formulas(other: Strategy) -> None:
    assert kept_and_live(compiled(table(FSDP)), other) == kept_and_live(KIND, other)


def test_likest_table_counts() -> None:
    one, two = table(Strategy(dp=8, zero=1)), table(Strategy(dp=8, zero=2), accumulates=True)
    both = compiled(two, msgspec.structs.replace(one, kept_bytes=(77, 308)))
    assert kept_and_live(both, Strategy(dp=8, zero=2))[0] == pytest.approx(77)


def test_single_size_follows_the_formula() -> None:
    kind = compiled(table(FSDP, samples=(1,)))
    grown = [b - a for a, b in zip(kept_and_live(KIND, FSDP, 8), kept_and_live(KIND, FSDP, 16), strict=True)]
    assert kept_and_live(kind, FSDP, 16) == pytest.approx((1e6 + grown[0], 3e6 + grown[1]))


@pytest.mark.parametrize("change", ["another device", "attention in another way"])
def test_foreign_memory_does_not_count(change: str) -> None:
    foreign = msgspec.structs.replace(HERE, device="h100")
    kind = {
        "another device": compiled(table(FSDP), provenance=foreign),
        "attention in another way": compiled(table(FSDP), fused=not HARDWARE.fused_attention),
    }[change]
    assert kept_and_live(kind, FSDP) == kept_and_live(KIND, FSDP)


@given(strategies)
def test_bytes_are_never_negative(strategy: Strategy) -> None:
    kind = compiled(msgspec.structs.replace(table(FSDP), kept_bytes=(-5, -5), workspace_bytes=(-7, -9)))
    assert min(kept_and_live(kind, strategy, 16)) >= 0


def test_report_counts_the_pairs_that_were_compiled() -> None:
    other = Strategy(tp=2, dp=4, zero=3)
    runs = (
        PlanRun(kind="embed", count=1, strategy=FSDP),
        PlanRun(kind="layers.*", count=2, strategy=msgspec.structs.replace(FSDP, replicas=2)),
        PlanRun(kind="layers.*", count=2, strategy=other),
        PlanRun(kind="head", count=1, strategy=FSDP),
    )
    plan = Plan(
        model=model_reference(MODEL),
        cluster=setting().cluster,
        global_batch=8,
        microbatches=1,
        stages=(Stage(devices=8, runs=runs),),
    )
    memory = compiled(table(FSDP)).memory
    assert memory is not None
    assert count_compiled(plan, MODEL.with_memory({"layers.*": memory}), HARDWARE) == (1, 4)
    assert memory_source(plan, MODEL.with_memory({"layers.*": memory}), HARDWARE).startswith(
        "measured for 1 of 4 (kind"
    )
    assert memory_source(plan, MODEL, HARDWARE) == "estimated"


def test_table_that_cannot_be_interpolated_is_refused() -> None:
    with pytest.raises(ValueError, match="rise"):
        MemoryTable(samples=(2, 1), kept_bytes=(1, 2), workspace_bytes=(1, 2))
    with pytest.raises(ValueError, match="same length"):
        MemoryTable(samples=(1, 2), kept_bytes=(1,), workspace_bytes=(1, 2))

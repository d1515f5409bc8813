"""Stages without a loop: what their layers take less, and what they leave behind."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost import Setting, estimate_layer, estimate_plan, layer_bytes, stage_setting
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.profile import Array, LayerKind, Live, Lookup, Moment
from tests.cost.settings import HARDWARE, MODEL, setting, strategies
from tests.support.toy_models import llama_like_profile

BLOCK = "layers.*"
WEIGHT = Array(dtype="bfloat16", classes=("embed", "mlp"))
WIDE = Array(dtype="bfloat16", classes=("batch", "seq", "mlp"))
KIND = msgspec.structs.replace(
    MODEL.kind(BLOCK),
    live={"none": Live(moments=(Moment(arrays=(WIDE,)),), prefetched=(WEIGHT,), waiting=(WIDE,))},
)
WEIGHT_BYTES, WAITING = 64 * 128 * 2, 16 * 32 * 128 * 2 / 8
GRADIENT = sum(p.array().elements(KIND.classes, {}) for p in KIND.parameters) * 2  # bfloat16


def pipelined(straight: int = 0, microbatches: int = 2) -> Setting:
    return dataclasses.replace(setting(8, microbatches=microbatches), slices=2, straight=straight)


def at_edge(kind: LayerKind) -> LayerKind:
    return msgspec.structs.replace(kind, repeated=False)


def memory(kind: LayerKind, strategy: Strategy, at: Setting) -> dict[str, float]:
    return dict(estimate_layer(kind, strategy, at).memory)


@pytest.mark.parametrize(
    ("zero", "gathered", "stack", "left"),
    [(0, 0, 0, 0), (1, 0, 0, 0), (2, 0, 1, min(GRADIENT, WAITING)), (3, WEIGHT_BYTES, 1, min(GRADIENT, WAITING))],
)
def test_straight_stage_gathers_nothing_ahead_and_has_one_copy_of_gradients(
    zero: int, gathered: float, stack: int, left: float
) -> None:
    """A layer's own gradient takes the place of its operands; what an earlier one left waits to be reduced."""
    strategy = Strategy(dp=8, zero=zero)
    loop, one, two = (memory(KIND, strategy, pipelined(layers)) for layers in (0, 1, 2))
    assert loop["live"] - one["live"] == pytest.approx(gathered + GRADIENT)
    assert one["live"] == two["live"]
    assert one["gradients"] == pytest.approx(loop["gradients"] / (1 + stack))
    assert two["gradients"] - one["gradients"] == pytest.approx(left / 2)
    for name in ("parameters", "optimizer", "residuals"):
        assert loop[name] == one[name] == two[name]


def test_gradients_wait_only_where_the_backward_pass_has_collectives() -> None:
    """Else XLA keeps the order that needs least memory."""
    for strategy, microbatches, waits in (
        (Strategy(dp=8, zero=1), 2, False),
        (Strategy(dp=8, zero=1), 1, True),  # reduced as they are made
        (Strategy(tp=2, dp=4), 2, True),
        (Strategy(dp=8, zero=3), 2, True),
    ):
        one, two = (memory(KIND, strategy, pipelined(layers, microbatches))["gradients"] for layers in (1, 2))
        assert (two > one) == waits, strategy


def test_a_head_leaves_its_gradients_in_every_pipeline_and_an_embedding_none() -> None:
    for name, leaves in (("head", True), ("embed", False)):
        kind, strategy = at_edge(MODEL.kind(name)), Strategy(dp=8, zero=3)
        stored = memory(kind, strategy, setting(8, microbatches=2))["gradients"]
        for straight in (0, 1):
            assert (memory(kind, strategy, pipelined(straight))["gradients"] > stored) == leaves


def test_zeros_of_a_table_count_where_the_scatter_into_them_takes_long() -> None:
    """They depend on nothing, so they are made long before: read in a program with a table of 2 GiB."""
    rows, indices = (Array(dtype=d, classes=("batch", "seq")) for d in ("bfloat16", "int32"))
    kind, strategy = at_edge(MODEL.kind("embed")), Strategy(dp=8, zero=3)
    looked_up = msgspec.structs.replace(kind.parameters[0], lookups=(Lookup(rows=rows, indices=indices),))
    kind = msgspec.structs.replace(kind, parameters=(looked_up,))
    table = kind.parameters[0].array().elements(kind.classes, {}) * 2  # computed in bfloat16
    for rate, zeros in ((2 * table / 0.9e-3, 0), (2 * table / 1.1e-3, table)):
        slow = msgspec.structs.replace(HARDWARE, memory_bandwidth_bytes_per_s=rate)
        found = memory(kind, strategy, dataclasses.replace(pipelined(1), hardware=slow))["gradients"]
        assert found == pytest.approx(memory(kind, strategy, pipelined(1))["gradients"] + zeros)


@given(strategies, st.sampled_from([BLOCK, "embed", "head"]), st.integers(1, 4))
def test_straight_stage_never_needs_more_than_a_loop_and_more_with_every_layer(
    strategy: Strategy, name: str, microbatches: int
) -> None:
    """So a stage needs more with every layer, whichever price holds: the search relies on it."""
    kind = MODEL.kind(name)
    loop, one, two = (estimate_layer(kind, strategy, pipelined(n, microbatches)) for n in (0, 1, 2))
    assert one.state_bytes <= min(two.state_bytes, loop.state_bytes)
    assert one.live_bytes == two.live_bytes <= loop.live_bytes
    assert one.state_bytes + one.live_bytes <= 2 * two.state_bytes + two.live_bytes
    assert 2 * two.state_bytes + two.live_bytes <= (3 * loop.state_bytes + loop.live_bytes) * (1 + 1e-12)


@given(strategies, st.sampled_from([0, 1, 2]))
def test_search_and_report_price_straight_stages_alike(strategy: Strategy, straight: int) -> None:
    kind = MODEL.kind(BLOCK)
    cost = estimate_layer(kind, strategy, pipelined(straight))
    held = layer_bytes(kind, strategy, pipelined()).on_stage(straight)
    assert held == pytest.approx((cost.state_bytes, cost.residual_bytes, cost.live_bytes))


@pytest.mark.parametrize(
    ("layers", "cut", "chunks", "straight"),
    [
        (4, 3, 1, (2, 2)),
        (5, 3, 1, (2, 0)),
        (6, 4, 1, (0, 0)),
        (2, 1, 1, (1, 2)),
        (3, 2, 1, (1, 2)),
        (4, 0, 2, (0, 0, 0, 0)),
    ],
)
def test_stage_is_straight_with_at_most_two_repeated_layers(
    layers: int, cut: int, chunks: int, straight: tuple[int, ...]
) -> None:
    """Three run as a loop; stages that share a slice keep the price of loops."""
    model = llama_like_profile(layers=layers, embed=64, heads=8, head_dim=8, mlp=128, vocab=256, seq=32, kv_heads=8)
    kinds = ["embed", *[BLOCK] * layers, "head"]
    cuts = [0, cut, len(kinds)] if chunks == 1 else [0, 2, 3, 5, 6]
    model = msgspec.structs.replace(
        model, kinds=tuple(kind if kind.name == BLOCK else at_edge(kind) for kind in model.kinds)
    )
    runs = tuple(PlanRun(kind=k, count=1, strategy=Strategy(dp=4, zero=3)) for k in kinds)
    plan = Plan(
        model=model_reference(model),
        cluster=setting(8).cluster,
        global_batch=16,
        microbatches=2,
        schedule="1f1b" if chunks == 1 else "interleaved-1f1b",
        chunks=chunks,
        stages=tuple(Stage(devices=4, runs=runs[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)),
    )
    assert tuple(stage_setting(plan, stage, model, HARDWARE).straight for stage in plan.stages) == straight
    assert all(stage.peak_bytes > 0 for stage in estimate_plan(plan, model, HARDWARE).stages)

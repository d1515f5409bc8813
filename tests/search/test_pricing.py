from __future__ import annotations

import numpy as np
import pytest

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.cost import Setting, estimate_layer
from galvatron_jax.plan import Training
from galvatron_jax.search._dominance import MANY_ROWS, undominated
from galvatron_jax.search._space import (
    Limits,
    default_batches,
    legal,
    microbatch_counts,
    stage_counts,
    stage_strategies,
)
from tests.support.toy_models import llama_like_profile, toy_hardware

MODEL = llama_like_profile(layers=3, embed=256, heads=6, head_dim=32, mlp=768, vocab=999, seq=64)


def test_layer_cost_depends_on_microbatches_only_through_accumulation() -> None:
    """The price list keeps one table for all counts above 1."""
    cluster = parse_cluster("1x4")
    two = Setting(
        hardware=toy_hardware(),
        cluster=cluster,
        stage_devices=4,
        microbatch=8,
        microbatches=2,
        training=Training(),
        causal_attention=True,
    )
    many = with_microbatches(two, microbatches=64)
    for kind in MODEL.kinds:
        for strategy in legal(kind, stage_strategies(cluster, 4, Limits()), 8):
            assert estimate_layer(kind, strategy, two) == estimate_layer(kind, strategy, many)


def with_microbatches(setting: Setting, *, microbatches: int) -> Setting:
    fields = {name: getattr(setting, name) for name in Setting.__slots__}
    return Setting(**{**fields, "microbatches": microbatches})


def test_undominated_keeps_the_first_of_equals_and_compares_within_groups() -> None:
    rows = np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 2.0], [0.5, 9.0], [9.0, 9.0]])
    assert undominated(rows, np.array([0, 0, 0, 0, 1])).tolist() == [True, False, False, True, True]


def test_strategies_of_an_indivisible_vocabulary_leave_tensor_parallelism_out() -> None:
    embed = MODEL.kind("embed")
    choices = legal(embed, stage_strategies(parse_cluster("1x2"), 2, Limits()), 4)
    assert {strategy.tp for strategy in choices} == {1}
    assert len(choices) == 4 * 2  # zero 0-3, remat none or full: this profile knows neither dots nor Ulysses


def test_strategies_follow_the_mesh_axes() -> None:
    # six devices in two nodes of three: axes 2 and 3, so tensor degrees 1, 3, 6
    assert {s.tp for s in stage_strategies(parse_cluster("2x3"), 6, Limits())} == {1, 3, 6}
    assert {s.tp for s in stage_strategies(parse_cluster("2x3"), 6, Limits(max_tp=3))} == {1, 3}


@pytest.mark.parametrize(
    ("mesh", "layers", "limits", "expected"),
    [
        ("2x8", 3, Limits(), (1, 2, 4)),
        ("2x8", 14, Limits(), (1, 2, 4, 8, 16)),
        ("2x8", 14, Limits(max_stages=3), (1, 2)),
        ("3x2", 14, Limits(), (1, 3, 6)),  # two stages of three devices would cut a node in halves
        ("1x1", 1, Limits(), (1,)),
    ],
)
def test_stage_counts_split_the_nodes_evenly(mesh: str, layers: int, limits: Limits, expected: tuple[int, ...]) -> None:
    model = llama_like_profile(layers=layers, embed=64, heads=4, head_dim=16, mlp=64, vocab=64, seq=8)
    assert stage_counts(parse_cluster(mesh), model, limits) == expected


def test_microbatch_counts_are_all_divisors() -> None:
    assert microbatch_counts(12, Limits()) == (1, 2, 3, 4, 6, 12)
    assert microbatch_counts(12, Limits(microbatches=(4, 5, 6))) == (4, 6)


def test_default_batches_are_the_largest_three_within_the_token_limit() -> None:
    assert default_batches(parse_cluster("2x8"), MODEL.at_seq(4096)) == (128, 256, 512)
    assert default_batches(parse_cluster("64x8"), MODEL.at_seq(8192)) == (512, 1024, 2048)
    assert default_batches(parse_cluster("1000x8"), MODEL.at_seq(8192)) == (8000,)


def test_undominated_gives_the_same_rows_whether_few_or_many() -> None:
    draw = np.random.default_rng(5)
    rows, group = draw.integers(0, 6, (MANY_ROWS + 40, 3)).astype(float), draw.integers(0, 3, MANY_ROWS + 40)
    by_hand = [
        not any(
            group[j] == group[i] and (rows[j] <= rows[i]).all() and ((rows[j] < rows[i]).any() or j < i)
            for j in range(len(rows))
        )
        for i in range(len(rows))
    ]
    assert undominated(rows, group).tolist() == by_hand

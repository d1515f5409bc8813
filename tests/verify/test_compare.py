from __future__ import annotations

import dataclasses

import pytest

from galvatron_jax.cost import PlannedCollective
from galvatron_jax.cost._plan_collectives import Cause
from galvatron_jax.profile import CollectiveKind
from galvatron_jax.verify import HloCollective
from galvatron_jax.verify._compare import CollectiveRow, LayerShare, compare_collectives
from galvatron_jax.verify._schedule import ScheduledCollective

SEGMENTS = {"embed": "embed", "layers.0": "layers.*", "layers.1": "layers.*"}
PAIRS = ((0, 1), (2, 3))


def planned(kind: CollectiveKind, count: int, size_bytes: float, group: int = 2) -> PlannedCollective:
    return PlannedCollective(
        kind=kind,
        cause="tensor",
        phase="forward",
        layer=1,
        layer_kind="layers.*",
        group=group,
        count=count,
        bytes=size_bytes,
    )


def compiled(kind: CollectiveKind, size_bytes: int, op_name: str = "", *, times: int = 1) -> ScheduledCollective:
    """One that takes 2 s, of which 1 s is exposed."""
    return scheduled(HloCollective(kind, size_bytes, ("f32",), PAIRS, times > 1, op_name, times))


def scheduled(collective: HloCollective) -> ScheduledCollective:
    return ScheduledCollective(collective, asynchronous=True, products_beside=1, seconds=2.0, exposed_s=1.0)


def compare(found: list[ScheduledCollective], foreseen: list[PlannedCollective]) -> tuple[CollectiveRow, ...]:
    return compare_collectives(found, foreseen, devices=4, segments=SEGMENTS)


def test_equal_kinds_and_groups_share_a_row_with_the_layers_of_the_program() -> None:
    (row,) = compare(
        [
            compiled("all-reduce", 100, "jit(_train)/jvp(layers.0)/dot_general"),
            compiled("all-reduce", 100, "jit(_train)/jvp(layers.1)/dot_general"),
            compiled("all-reduce", 300, "jit(_train)/transpose(jvp(layers.1))/jvp(layers.1)/dot_general"),
        ],
        [planned("all-reduce", 3, 450), planned("all-reduce", 1, 50)],
    )
    assert (row.compiled_count, row.compiled_bytes) == (3, 500)
    assert (row.predicted_count, row.predicted_bytes) == (4, 500)
    assert row.shares == (
        LayerShare(layer_kind="layers.*", phase="backward", count=1, bytes=300, seconds=2.0, exposed_s=1.0),
        LayerShare(layer_kind="layers.*", phase="forward", count=2, bytes=200, seconds=4.0, exposed_s=2.0),
    )


def test_what_stands_in_a_loop_counts_once_per_turn() -> None:
    (row,) = compare([compiled("all-gather", 10, times=3), compiled("all-gather", 7)], [planned("all-gather", 4, 37)])
    assert (row.compiled_count, row.compiled_bytes) == (4, 37)
    assert (row.seconds, row.exposed_s) == (8.0, 4.0)


@pytest.mark.parametrize(
    ("causes", "assumed"),
    [
        ((), ""),
        (("tensor", "relayout"), "exposed"),
        (("weights", "gradient"), "hidden"),
        (("tensor", "weights"), "both"),
    ],
)
def test_row_says_what_the_estimate_assumes(causes: tuple[Cause, ...], assumed: str) -> None:
    foreseen = [dataclasses.replace(planned("all-gather", 1, 10), cause=cause) for cause in causes]
    (row,) = compare([compiled("all-gather", 10)], foreseen)
    assert row.assumed == assumed


def test_reduce_scatter_counts_the_whole_array_of_its_group() -> None:
    (row,) = compare([compiled("reduce-scatter", 50)], [planned("reduce-scatter", 1, 100)])
    assert row.compiled_bytes == row.predicted_bytes


def test_unplanned_kind_and_missing_kind_have_rows_of_their_own() -> None:
    unplanned, missing = compare(
        [compiled("all-to-all", 10, "jit(_train)/jvp(embed)/x")], [planned("all-gather", 1, 5)]
    )
    assert (unplanned.kind, unplanned.planned, unplanned.shares[0].layer_kind) == ("all-to-all", False, "embed")
    assert (missing.kind, missing.planned, missing.compiled_count, missing.shares) == ("all-gather", True, 0, ())


def test_other_group_size_is_another_row() -> None:
    rows = compare([compiled("all-gather", 10)], [planned("all-gather", 1, 10, group=4)])
    assert {(row.group_size, row.predicted_count, row.compiled_count) for row in rows} == {(2, 0, 1), (4, 1, 0)}


def test_instruction_without_groups_is_of_all_devices() -> None:
    (row,) = compare([scheduled(HloCollective("all-reduce", 4, ("f32",), (), False, ""))], [])
    assert row.group_size == 4


def test_collective_of_one_device_is_left_out() -> None:
    assert compare([scheduled(HloCollective("all-reduce", 4, ("f32",), ((0,), (1,)), False, ""))], []) == ()


def test_permute_is_of_pairs_however_many_devices_it_goes_round() -> None:
    (row,) = compare([compiled("collective-permute", 10)], [planned("collective-permute", 1, 10, group=4)])
    assert (row.group_size, row.predicted_bytes, row.compiled_bytes) == (2, 10, 10)

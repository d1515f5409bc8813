from __future__ import annotations

from galvatron_jax.cost import PlannedCollective
from galvatron_jax.profile import CollectiveKind
from galvatron_jax.verify import HloCollective
from galvatron_jax.verify._compare import CollectiveRow, LayerShare, compare_collectives

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


def compiled(kind: CollectiveKind, size_bytes: int, op_name: str = "", *, in_loop: bool = False) -> HloCollective:
    return HloCollective(kind, size_bytes, ("f32",), PAIRS, in_loop, op_name)


def compare(
    found: list[HloCollective], foreseen: list[PlannedCollective], microbatches: int = 1
) -> tuple[CollectiveRow, ...]:
    return compare_collectives(found, foreseen, devices=4, microbatches=microbatches, segments=SEGMENTS)


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
        LayerShare(layer_kind="layers.*", phase="backward", count=1, bytes=300),
        LayerShare(layer_kind="layers.*", phase="forward", count=2, bytes=200),
    )


def test_what_stands_in_the_loop_counts_once_per_microbatch() -> None:
    (row,) = compare(
        [compiled("all-gather", 10, in_loop=True), compiled("all-gather", 7)], [planned("all-gather", 4, 37)], 3
    )
    assert (row.compiled_count, row.compiled_bytes) == (4, 37)


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
    (row,) = compare([HloCollective("all-reduce", 4, ("f32",), (), False, "")], [])
    assert row.group_size == 4


def test_collective_of_one_device_is_left_out() -> None:
    assert compare([HloCollective("all-reduce", 4, ("f32",), ((0,), (1,)), False, "")], []) == ()

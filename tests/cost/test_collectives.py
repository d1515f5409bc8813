from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost import Group, collective_seconds, device_group
from galvatron_jax.hardware import load_hardware
from galvatron_jax.profile import CollectiveKind, CollectiveTable, Link
from tests.support.toy_models import toy_hardware

HARDWARE = toy_hardware()  # inside 1e11 B/s, 1 us; between nodes 1e10 B/s, 10 us
KINDS: tuple[CollectiveKind, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MIB = 2**20


@pytest.mark.parametrize(
    ("size", "stride", "gpus_per_node", "group"),
    [
        (8, 1, 8, Group(8, 1, 8)),  # tensor parallelism over one node
        (4, 2, 8, Group(4, 1, 4)),  # data parallelism beside tp 2 in one node
        (2, 8, 8, Group(2, 2, 1, 8)),  # data parallelism beside tp 8 over two nodes
        (4, 4, 8, Group(4, 2, 2, 4)),
        (16, 1, 8, Group(16, 2, 8)),  # whole nodes
        (16, 4, 8, Group(16, 8, 2, 4)),
        (6, 1, 2, Group(6, 3, 2)),
        (3, 1, 2, Group(3, 3, 1, 2)),  # cuts nodes: the least favourable part
        (2, 3, 2, Group(2, 2, 1, 2)),
        (1, 8, 8, Group(1, 1, 1)),
    ],
)
def test_device_group_counts_nodes_and_members(size: int, stride: int, gpus_per_node: int, group: Group) -> None:
    assert device_group(size, stride, gpus_per_node) == group


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        # inside a node: 3/4 of 1e9 bytes at 1e11 B/s, 3 hops of 1 us
        ("all-gather", Group(4, 1, 4), 7.5e-3 + 3e-6),
        ("reduce-scatter", Group(4, 1, 4), 7.5e-3 + 3e-6),
        ("all-reduce", Group(4, 1, 4), 15e-3 + 6e-6),
        ("all-to-all", Group(4, 1, 4), 7.5e-3 + 3e-6),
        ("collective-permute", Group(4, 1, 4), 1e-2 + 1e-6),
        # one member per node: one card's share
        ("all-gather", Group(2, 2, 1), 0.5e-1 + 10e-6),
        ("collective-permute", Group(2, 2, 1), 1e-1 + 10e-6),
        # 4 members on each of 2 nodes: 4 cards; 1 hop between nodes, 2 * 3 inside
        ("all-gather", Group(8, 2, 4), 7 / 8 * 1e9 / 4e10 + 16e-6),
        # half of the bytes leave the node, over each GPU's own card
        ("all-to-all", Group(8, 2, 4), 0.5 * 1e9 / 1e10 + 16e-6),
        # all-reduce takes the tree's latency: log2(4) * 10 us + 3 * 1 us against the ring's 3 * 10 + 4 * 3 us
        ("all-reduce", Group(16, 4, 4), 2 * 15 / 16 * 1e9 / 4e10 + 2 * 23e-6),
        # 16 members per node: the cards (1.6e11) outrun the links inside (1e11)
        ("all-gather", Group(32, 2, 16), 31 / 32 * 1e9 / 1e11 + 40e-6),
    ],
)
def test_collective_takes_the_formula_worked_out_by_hand(kind: CollectiveKind, group: Group, seconds: float) -> None:
    assert collective_seconds(kind, 1e9, group, HARDWARE) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_collective_of_one_device_or_no_bytes_is_free(kind: CollectiveKind) -> None:
    assert collective_seconds(kind, 1e9, Group(1, 1, 1), HARDWARE) == 0
    assert collective_seconds(kind, 0, Group(4, 1, 4), HARDWARE) == 0


@given(
    kind=st.sampled_from(KINDS),
    size=st.floats(1, 1e11),
    factor=st.floats(1, 100),
    ranks=st.sampled_from([2, 4, 8, 16, 64]),
    stride=st.sampled_from([1, 2, 4, 8]),
    slower=st.floats(1, 10),
)
def test_collective_never_faster_with_more_bytes_or_slower_links(
    kind: CollectiveKind, size: float, factor: float, ranks: int, stride: int, slower: float
) -> None:
    group = device_group(ranks, stride, 8)
    slow = toy_hardware(
        intra_node=Link(bandwidth_bytes_per_s=1e11 / slower, latency_s=1e-6 * slower),
        inter_node=Link(bandwidth_bytes_per_s=1e10 / slower, latency_s=1e-5 * slower),
    )
    time_s = collective_seconds(kind, size, group, HARDWARE)
    assert collective_seconds(kind, size * factor, group, HARDWARE) >= time_s * (1 - 1e-12)
    assert collective_seconds(kind, size, group, slow) >= time_s * (1 - 1e-12)


@given(size=st.floats(1, 1e11), ranks=st.sampled_from([2, 4, 8]), stride=st.sampled_from([1, 2, 4, 8]))
def test_all_reduce_is_at_most_reduce_scatter_and_all_gather(size: float, ranks: int, stride: int) -> None:
    group = device_group(ranks, stride, 8)
    both = sum(collective_seconds(kind, size, group, HARDWARE) for kind in ("reduce-scatter", "all-gather"))
    assert collective_seconds("all-reduce", size, group, HARDWARE) <= both * (1 + 1e-12)


# ------------------------------------------------------------------------------------------------------------- tables
TABLE = CollectiveTable(
    kind="all-gather", group=4, inside_node=True, sizes_bytes=(1e6, 1e8, 2e8), times_s=(1e-4, 1e-2, 3e-2)
)
MEASURED = toy_hardware(collectives=(TABLE,))


@pytest.mark.parametrize(
    ("size", "seconds"),
    [
        (1e6, 1e-4),
        (1e8, 1e-2),
        (1e7, 1e-3),  # power law between the points
        (4e8, 3e-2 + 2e8 * 2e-2 / 1e8),  # last segment: 2e-2 s per 1e8 bytes
        (5e5, 5e-5),  # the first segment's line goes through the origin here
    ],
)
def test_table_of_the_same_group_replaces_the_formula(size: float, seconds: float) -> None:
    assert collective_seconds("all-gather", size, Group(4, 1, 4), MEASURED) == pytest.approx(seconds)


def test_table_below_the_first_size_keeps_its_latency() -> None:
    flat = CollectiveTable(kind="all-gather", group=4, inside_node=True, sizes_bytes=(1e6, 2e6), times_s=(1e-4, 1.1e-4))
    hardware = toy_hardware(collectives=(flat,))
    assert collective_seconds("all-gather", 1.0, Group(4, 1, 4), hardware) == pytest.approx(0.9e-4, rel=1e-3)


def test_table_of_another_group_is_scaled_by_the_formulas() -> None:
    formula_2 = collective_seconds("all-gather", 1e8, Group(2, 1, 2), HARDWARE)
    formula_4 = collective_seconds("all-gather", 1e8, Group(4, 1, 4), HARDWARE)
    time_s = collective_seconds("all-gather", 1e8, Group(2, 1, 2), MEASURED)
    assert time_s == pytest.approx(1e-2 * formula_2 / formula_4)


@pytest.mark.parametrize(("kind", "group"), [("all-reduce", Group(4, 1, 4)), ("all-gather", Group(4, 2, 2))])
def test_table_of_another_kind_or_place_is_not_used(kind: CollectiveKind, group: Group) -> None:
    assert collective_seconds(kind, 1e8, group, MEASURED) == collective_seconds(kind, 1e8, group, HARDWARE)


@given(size=st.floats(1, 1e11), factor=st.floats(1, 100), ranks=st.sampled_from([2, 4, 8]))
def test_table_never_faster_with_more_bytes(size: float, factor: float, ranks: int) -> None:
    group = Group(ranks, 1, ranks)
    time_s = collective_seconds("all-gather", size, group, MEASURED)
    assert collective_seconds("all-gather", size * factor, group, MEASURED) >= time_s * (1 - 1e-9)


# ----------------------------------- a measured A100-class cluster, all-reduce of 32 MiB (Hetu-Galvatron cea12ff)
def bus_bandwidth(size: int, stride: int) -> float:
    """All-reduce bus bandwidth, MiB/ms, of 32 MiB on 2x8 with the inter-node link set from the measured c = 1 group."""
    inter = Link(bandwidth_bytes_per_s=8.13 * MIB * 1e3 * 1.007, latency_s=14e-6)  # 0.7 %: two latencies in 3.94 ms
    a100 = load_hardware("a100-80g")
    hardware = toy_hardware(intra_node=a100.intra_node, inter_node=inter)
    time_s = collective_seconds("all-reduce", 32 * MIB, device_group(size, stride, 8), hardware)
    return 2 * (size - 1) / size * 32 / (time_s * 1e3)


@pytest.mark.parametrize(
    ("size", "stride", "measured", "tolerance"),
    [
        (2, 8, 8.130, 0.01),  # the anchor itself
        (4, 4, 16.220, 0.02),
        (8, 2, 20.772, 0.01),  # four members per node beside a sibling: what u was set from
        (8, 1, 155.658, 0.10),  # inside a node
        (4, 1, 157.984, 0.20),
    ],
)
def test_formula_agrees_with_a_measured_a100_class_cluster(
    size: int, stride: int, measured: float, tolerance: float
) -> None:
    assert bus_bandwidth(size, stride) == pytest.approx(measured, rel=tolerance)


def test_formula_is_optimistic_for_whole_nodes_by_the_stated_error() -> None:
    assert bus_bandwidth(16, 1) / 44.682 - 1 == pytest.approx(0.34, abs=0.02)

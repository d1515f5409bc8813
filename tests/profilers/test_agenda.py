from __future__ import annotations

import itertools

import pytest

from galvatron_jax.cluster import divisors, parse_cluster
from galvatron_jax.errors import ClusterError
from galvatron_jax.profilers._agenda import KINDS, DeviceGroup, device_groups, hardware_agenda
from galvatron_jax.profilers._readings import (
    LAUNCH,
    LOOP,
    MATMUL,
    MESSAGE,
    OVERLAP,
    PROGRAM,
    SENDER,
    product_flops,
    product_side,
)
from galvatron_jax.units import KIB, MIB


def test_device_groups_of_one_node_are_those_of_its_axes() -> None:
    groups = {(group.size, group.stride) for group in device_groups(parse_cluster("1x8"))}
    assert groups == {(8, 1), (4, 1), (2, 1), (4, 2), (2, 4), (2, 2)}  # tp; dp beside tp 2, 4; dp 2 beside tp 2, pp 2
    assert all(group.inside_node for group in device_groups(parse_cluster("1x8")))


def test_device_groups_know_which_leave_the_node() -> None:
    groups = device_groups(parse_cluster("2x4"))
    assert {group for group in groups if not group.inside_node} == {
        DeviceGroup(2, 4, False),
        DeviceGroup(4, 2, False),
        DeviceGroup(8, 1, False),
    }


@pytest.mark.parametrize("mesh", ["1x1", "1x6", "3x2", "2x8", "4x4"])
def test_device_groups_divide_the_mesh(mesh: str) -> None:
    cluster = parse_cluster(mesh)
    groups = device_groups(cluster)
    assert len(set(groups)) == len(groups)
    assert all(cluster.devices % (group.size * group.stride) == 0 and group.size > 1 for group in groups)


def test_agenda_covers_every_kind_and_group_from_1_kb_to_256_mb() -> None:
    cluster = parse_cluster("2x8")
    agenda = hardware_agenda(cluster, "gpu", quick=False)
    assert len(set(agenda)) == len(agenda)
    for kind, group in itertools.product(KINDS, device_groups(cluster)):
        sizes = {s.size for s in agenda if (s.what, s.group, s.stride) == (kind, group.size, group.stride)}
        assert {KIB, 256 * MIB} <= sizes
        assert len(sizes) >= 7


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_agenda_measures_before_it_needs(platform: str, quick: bool) -> None:
    agenda = hardware_agenda(parse_cluster("1x8"), platform, quick=quick)
    names = [subject.what for subject in agenda]
    overlap = agenda[names.index(OVERLAP)]
    before = agenda[: names.index(OVERLAP)]
    assert names[:2] == [LOOP, LAUNCH]
    assert any(s.what == "all-reduce" and (s.size, s.group) == (overlap.size, overlap.group) for s in before)
    assert any(s.what == MATMUL and s.dtype == overlap.dtype for s in before)


def test_quick_agenda_is_shorter_and_has_every_group_size() -> None:
    cluster = parse_cluster("2x4")
    quick, full = (hardware_agenda(cluster, "cpu", quick=quick) for quick in (True, False))
    assert len(quick) < len(full) / 2
    places = {(g.size, g.inside_node) for g in device_groups(cluster)}
    measured = {(s.group, 4 % (s.group * s.stride) == 0) for s in quick if s.what == "all-gather"}
    assert measured == places


@pytest.mark.parametrize("quick", [True, False])
def test_messages_between_nodes_come_before_collectives(quick: bool) -> None:
    agenda = hardware_agenda(parse_cluster("3x4"), "cpu", quick=quick)
    messages = [n for n, subject in enumerate(agenda) if subject.what == MESSAGE]
    assert {(agenda[n].group, agenda[n].stride) for n in messages} == {(3, 4)}
    assert max(messages) < min(n for n, s in enumerate(agenda) if s.what == "all-gather")
    assert not [s for s in hardware_agenda(parse_cluster("1x4"), "cpu", quick=quick) if s.what == MESSAGE]
    (sender,) = [s for s in agenda if s.what == SENDER]
    assert sender.size in {agenda[n].size for n in messages}
    assert agenda.index(sender) > max(messages)
    assert not [s for s in hardware_agenda(parse_cluster("3x4"), "gpu", quick=quick) if s.what == SENDER]


@pytest.mark.parametrize(("platform", "expected"), [("cpu", 1), ("gpu", 0)])
def test_programs_that_are_waited_for_are_timed_where_devices_do_not_queue_them(platform: str, expected: int) -> None:
    agenda = hardware_agenda(parse_cluster("1x4"), platform, quick=True)
    assert sum(subject.what == PROGRAM for subject in agenda) == expected


def test_sizes_in_between_are_measured_over_several_nodes_only() -> None:
    agenda = hardware_agenda(parse_cluster("2x2"), "cpu", quick=False)
    sizes = {
        g: {s.size for s in agenda if s.what == "all-reduce" and (s.group, s.stride) == g} for g in ((2, 1), (2, 2))
    }
    assert sizes[2, 2] - sizes[2, 1] == {32 * KIB, 256 * KIB}


def test_agenda_of_one_device_has_no_collectives() -> None:
    assert not {s.what for s in hardware_agenda(parse_cluster("1x1"), "gpu", quick=False)} & {*KINDS, OVERLAP}


@pytest.mark.parametrize("side", [1, 64, 1000, 8192, 65536])
def test_product_side_is_the_inverse_of_product_flops(side: int) -> None:
    assert product_side(product_flops(side)) == side


@pytest.mark.parametrize("mesh", ["1x8", "2x8", "4x2", "2x3"])
def test_every_group_of_every_strategy_is_measured(mesh: str) -> None:
    """Tensor, Ulysses and data groups, and both groups of hsdp, on every stage that a pipeline can have."""
    cluster = parse_cluster(mesh)
    measured = {(group.size, group.stride) for group in device_groups(cluster)}
    for devices in divisors(cluster.devices):
        try:
            degrees = cluster.tensor_degrees(devices)
        except ClusterError:
            continue
        for tp, inner in itertools.combinations_with_replacement(degrees, 2):
            shard, replicas = inner // tp, devices // inner
            used = {(tp, 1), (devices // tp, tp), (shard, tp), (replicas, inner)}
            assert {group for group in used if group[0] > 1} <= measured, (devices, tp, inner)

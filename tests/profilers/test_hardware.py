"""A machine with known numbers is measured through its overheads; the profile must give the numbers back."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.cost import device_group
from galvatron_jax.hardware import load_hardware
from galvatron_jax.profile import CollectiveKind, HardwareProfile, Link
from galvatron_jax.profilers._agenda import KINDS, OVERLAP_BYTES, OVERLAP_SIDE, device_groups
from galvatron_jax.profilers._hardware import Assembly, assemble_profile
from galvatron_jax.profilers._links import bus_factor, expected_seconds, fit_link, ring_steps
from galvatron_jax.profilers._parts import find_overheads
from galvatron_jax.profilers._readings import (
    COPY,
    LAUNCH,
    LOOP,
    MATMUL,
    MESSAGE,
    OVERLAP,
    PROGRAM,
    SENDER,
    Reading,
    product_flops,
)
from galvatron_jax.profilers._report import plain_table, report_rows

from .fakes import MACHINE, reading

BASE = load_hardware("h200")
CLUSTER = parse_cluster("2x8")
LOOP_S, LAUNCH_S = 12e-6, 2e-6
INTRA = Link(bandwidth_bytes_per_s=3e11, latency_s=3e-6)
INTER = Link(bandwidth_bytes_per_s=4e10, latency_s=15e-6)
PEAK, SLOWDOWN = 7e14, 1.25
SIZES = tuple(1 << power for power in range(10, 29, 3))


def overheads() -> list[Reading]:
    return [
        reading(LOOP_S + LAUNCH_S, LOOP),
        reading((LOOP_S + 32 * LAUNCH_S) / 32, LAUNCH, operations=32),
    ]


def product_s(flops: float) -> float:
    """Efficient when large: 4 us of start beside the work at the peak."""
    return flops / PEAK + 4e-6


def products() -> list[Reading]:
    return [
        reading(
            product_s(product_flops(side)) * slower + LOOP_S / 2 + LAUNCH_S,
            MATMUL,
            size=product_flops(side),
            dtype=dtype,
            operations=2,
            glue=1,
        )
        for dtype, slower in (("bfloat16", 1), ("float32", 2))
        for side in (512, 2048, 4096, 8192)
    ]


def collectives() -> list[Reading]:
    return [
        reading(
            expected_seconds(kind, group.size, size, INTRA if group.inside_node else INTER)
            + LOOP_S / 8
            + LAUNCH_S * (kind in ("all-gather", "reduce-scatter")),
            kind,
            size=size,
            group=group.size,
            stride=group.stride,
            operations=8,
            glue=int(kind in ("all-gather", "reduce-scatter")),
        )
        for kind, group, size in itertools.product(KINDS, device_groups(CLUSTER), SIZES)
    ]


def overlap(slowdown: float) -> Reading:
    """Ten products beside an all-reduce: T = c + g (1 - 1 / s)."""
    size = OVERLAP_BYTES["gpu"]
    communication_s = expected_seconds("all-reduce", 8, size, INTRA)
    compute_s = 10 * (product_s(product_flops(OVERLAP_SIDE["gpu"])) + LAUNCH_S)
    both_s = compute_s + communication_s * (1 - 1 / slowdown)
    return reading(both_s + LOOP_S / 2, OVERLAP, size=size, dtype="bfloat16", group=8, operations=2, products=10)


def everything() -> list[Reading]:
    copy = reading(2 * 2**30 / 4e12 + LOOP_S, COPY, size=2**30)
    alone = reading(
        expected_seconds("all-reduce", 8, OVERLAP_BYTES["gpu"], INTRA) + LOOP_S / 8,
        "all-reduce",
        size=OVERLAP_BYTES["gpu"],
        group=8,
        operations=8,
    )
    return [*overheads(), copy, *products(), *collectives(), alone, overlap(SLOWDOWN)]


def assemble(readings: list[Reading]) -> Assembly:
    return assemble_profile(readings, BASE, CLUSTER, MACHINE, date="2026-11-22")


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    return assemble(everything()).profile


def test_overheads_come_apart_from_two_loops() -> None:
    found = find_overheads({r.subject: r for r in overheads()})
    assert found.loop_s == pytest.approx(LOOP_S)
    assert found.launch_s == pytest.approx(LAUNCH_S)


def test_overheads_of_a_compiler_that_fuses_all_kernels_are_one_launch() -> None:
    fused = [reading(3e-6, LOOP), reading(4e-6, LAUNCH, operations=1)]
    assert find_overheads({r.subject: r for r in fused}) == (0.0, 3e-6)


def test_corrections_leave_a_fifth_of_a_reading() -> None:
    found = find_overheads({r.subject: r for r in overheads()})
    assert found.corrected(reading(1e-6, "all-gather", operations=1, glue=1)) == pytest.approx(0.2e-6)


def test_assembly_gives_launch_copy_and_links_back(profile: HardwareProfile) -> None:
    assert profile.measured
    assert profile.kernel_launch_s == pytest.approx(LAUNCH_S)
    assert profile.memory_bandwidth_bytes_per_s == pytest.approx(4e12)
    for found, true in ((profile.intra_node, INTRA), (profile.inter_node, INTER)):
        assert found.bandwidth_bytes_per_s == pytest.approx(true.bandwidth_bytes_per_s, rel=1e-6)
        assert found.latency_s == pytest.approx(true.latency_s, rel=1e-6)


def test_assembly_gives_product_times_back(profile: HardwareProfile) -> None:
    for side in (512, 2048, 4096, 8192):
        flops = product_flops(side)
        (point,) = [point for point in profile.matmul_efficiency if point.flops == flops]
        rate = profile.matmul_flops_per_s["bfloat16"] * point.efficiency
        assert flops / rate == pytest.approx(product_s(flops))
    assert max(point.efficiency for point in profile.matmul_efficiency) == 1
    assert profile.matmul_flops_per_s["float32"] == pytest.approx(profile.matmul_flops_per_s["bfloat16"] / 2)


def test_assembly_keeps_the_rates_of_what_was_not_measured(profile: HardwareProfile) -> None:
    ratio = profile.matmul_flops_per_s["bfloat16"] / BASE.matmul_flops_per_s["bfloat16"]
    float8 = profile.matmul_flops_per_s["float8_e4m3fn"]
    assert float8 == pytest.approx(ratio * BASE.matmul_flops_per_s["float8_e4m3fn"])
    attention = profile.attention_efficiency["forward"] * profile.matmul_flops_per_s["bfloat16"]
    assert attention == pytest.approx(BASE.attention_efficiency["forward"] * BASE.matmul_flops_per_s["bfloat16"])
    assert profile.memory_bytes == BASE.memory_bytes


def test_assembly_gives_the_slowdown_back(profile: HardwareProfile) -> None:
    assert profile.overlap_slowdown == pytest.approx(SLOWDOWN, rel=1e-6)


@pytest.mark.parametrize(("slowdown", "expected"), [(1.0, 1.0), (0.8, 1.0), (2.0, 2.0), (1e9, 1000.0)])
def test_slowdown_stays_within_its_bounds(slowdown: float, expected: float) -> None:
    assembly = assemble([r for r in everything() if r.subject.what != OVERLAP] + [overlap(slowdown)])
    assert assembly.profile.overlap_slowdown == pytest.approx(expected, rel=1e-6)
    assert any("nothing was hidden" in note for note in assembly.notes) == (expected == 1000.0)


def test_assembly_has_one_table_for_each_kind_group_and_place(profile: HardwareProfile) -> None:
    groups = [device_group(g.size, g.stride, CLUSTER.gpus_per_node) for g in device_groups(CLUSTER)]
    places = {(group.size, group.nodes == 1, group.per_node) for group in groups}
    assert {(t.group, t.inside_node, t.per_node) for t in profile.collectives} == places
    assert len(profile.collectives) == len(KINDS) * len(places)
    for table in profile.collectives:
        link = INTRA if table.inside_node else INTER
        for size, seconds in zip(table.sizes_bytes, table.times_s, strict=True):
            assert seconds == pytest.approx(expected_seconds(table.kind, table.group, size, link))


def test_messages_tell_the_link_between_nodes_not_what_gathers_make_of_it() -> None:
    nodes, node = CLUSTER.nodes, CLUSTER.gpus_per_node
    sizes = (1 << 10, 1 << 16, 1 << 18, 1 << 20)
    gathers = [
        reading(3 * expected_seconds("all-gather", nodes, s, INTER), "all-gather", size=s, group=nodes, stride=node)
        for s in sizes
    ]
    messages = [
        reading(INTER.latency_s + s / INTER.bandwidth_bytes_per_s, MESSAGE, size=s, group=nodes, stride=node)
        for s in sizes[1:]
    ]
    messages += [reading(1e-7, MESSAGE, size=sizes[0], group=nodes, stride=node)]  # a bucket that is full
    found = assemble([*gathers, *messages]).profile
    assert found.inter_node.bandwidth_bytes_per_s == pytest.approx(INTER.bandwidth_bytes_per_s, rel=1e-6)
    assert found.inter_node.latency_s == pytest.approx(INTER.latency_s, rel=1e-6)
    assert "messages" in found.sources["inter_node"]
    assert {table.kind for table in found.collectives} == {"all-gather"}


@pytest.mark.parametrize(("eager", "found"), [(0.0, 0.0), (1e5, 1e5), (3e5, float(1 << 18)), (1e9, float(1 << 18))])
def test_sender_is_free_when_buffers_have_the_rest(eager: float, found: float) -> None:
    """A sender that waits for the whole message, for a part, for nothing: T = max(message, held + c) + answer."""
    place = {"group": CLUSTER.nodes, "stride": CLUSTER.gpus_per_node}
    link = Link(bandwidth_bytes_per_s=5e6, latency_s=1e-4)
    messages = [
        reading(link.latency_s + s / link.bandwidth_bytes_per_s, MESSAGE, size=s, **place)
        for s in (1 << 10, 1 << 16, 1 << 18)
    ]
    answer, _, message = (r.seconds for r in messages)
    side = OVERLAP_SIDE[MACHINE.platform]
    each = product_s(product_flops(side)) + LAUNCH_S
    count = math.ceil(1.25 * message / each)
    held = max(0.0, (1 << 18) - eager) / link.bandwidth_bytes_per_s
    both = max(message, held + count * each) + answer
    sender = reading(both + LOOP_S, SENDER, size=1 << 18, dtype="bfloat16", products=count, **place)
    profile = assemble([*overheads(), *products(), *messages, sender]).profile
    assert profile.eager_bytes == pytest.approx(found, abs=2e3)
    assert load_hardware("h100").eager_bytes == 0.0


def test_the_host_takes_what_a_program_takes_that_does_nothing() -> None:
    assert assemble([reading(3e-4, PROGRAM)]).profile.program_s == 3e-4
    assert load_hardware("h100").program_s == 0.0


def test_table_is_the_slowest_placement() -> None:
    rows = [
        reading(seconds, "all-gather", size=size, group=2, stride=stride)
        for stride, slower in ((1, 1.0), (4, 1.3))
        for size, seconds in ((1024, 1e-5 * slower), (2048, 2e-5 * slower))
    ]
    assembly = assemble(rows)
    (table,) = assembly.profile.collectives
    assert table.times_s == pytest.approx((1.3e-5, 2.6e-5))
    assert "1.30" in assembly.profile.sources["collectives"]


def test_outliers_and_unsteady_readings_are_named() -> None:
    times = {1 << 10: 1e-5, 1 << 13: 9e-5, 1 << 16: 1.2e-5, 1 << 20: 5e-5}
    rows = [reading(t, "all-gather", size=s, group=8, spread=0.9 * (s == 1 << 20)) for s, t in times.items()]
    notes = " ".join(assemble(rows).notes)
    assert "outlier left out: all-gather over 8 devices, inside a node at 8.19 kB: 90 µs" in notes
    assert "unsteady: all-gather over 8 devices, stride 1, 1.05 MB (spread 90%)" in notes


def test_unsteady_reading_counts_only_where_steady_ones_are_missing() -> None:
    times = {1 << 10: 2.6e-5, 1 << 16: 1.1e-6, 1 << 20: 5e-4, 1 << 22: 2e-3}
    rows = [reading(t, "all-gather", size=s, group=8, spread=1.8 * (s == 1 << 16)) for s, t in times.items()]
    (table,) = assemble(rows).profile.collectives
    assert table.sizes_bytes == (1 << 10, 1 << 20, 1 << 22)
    (table,) = assemble(rows[1:3]).profile.collectives
    assert table.sizes_bytes == (1 << 16, 1 << 20)


@pytest.mark.parametrize(("processes", "named"), [(1, True), (2, False), (16, False)])
def test_nodes_inside_one_process_are_named(processes: int, named: bool) -> None:
    machine = msgspec.structs.replace(MACHINE, processes=processes)
    notes = assemble_profile(everything(), BASE, CLUSTER, machine, date="2026-11-22").notes
    assert any("no network was measured" in note for note in notes) == named


def test_one_size_makes_no_table() -> None:
    assembly = assemble([reading(1e-5, "all-gather", size=1024, group=8)])
    assert assembly.profile.collectives == ()
    assert "no table" in assembly.notes[0]


def test_nothing_measured_leaves_the_base_numbers() -> None:
    profile = assemble([]).profile
    assert profile.provenance is not None
    assert (profile.device, profile.provenance.driver) == (BASE.name, MACHINE.driver)
    own = {name: getattr(BASE, name) for name in ("name", "description", "measured", "sources", "provenance")}
    assert msgspec.structs.replace(profile, **own) == BASE


def test_sources_say_what_was_measured_and_what_was_not(profile: HardwareProfile) -> None:
    assert set(profile.sources) == set(BASE.sources)
    stamp = "measured 2026-11-22 on 8 x NVIDIA H200 (1x8, jax 0.10.2, driver 570.86, processes: 1)"
    bundled = {field for field, text in profile.sources.items() if text.startswith("from h200: ")}
    assumed = {"memory_bytes", "reserved_bytes", "eager_bytes", "program_s"}
    assert bundled == assumed | {"fused_attention", "sums_before_reducing", "combines_gathers"}
    assert all(text.startswith(stamp) for field, text in profile.sources.items() if field not in bundled)
    assert "not measured" in profile.sources["attention_efficiency"]


def test_report_puts_the_base_beside_the_measurement(profile: HardwareProfile) -> None:
    text = plain_table(report_rows(profile, BASE))
    lines = text.splitlines()
    assert len(set(map(len, lines[1:]))) <= 3  # aligned
    (copy,) = [line for line in lines if line.startswith("memory copy")]
    assert copy.split() == ["memory", "copy", "4", "TB/s", "4.32", "TB/s"]
    assert sum("all-reduce" in line for line in lines) == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [2, 8])
def test_fit_link_is_the_inverse_of_expected_seconds(kind: CollectiveKind, group: int) -> None:
    from galvatron_jax.profilers._fit import Point

    points = [Point(size, expected_seconds(kind, group, size, INTRA)) for size in SIZES]
    link = fit_link(kind, group, points)
    assert link is not None
    assert link.bandwidth_bytes_per_s == pytest.approx(3e11, rel=1e-6)
    assert link.latency_s == pytest.approx(3e-6, rel=1e-6)


def test_ring_of_eight_by_hand() -> None:
    assert bus_factor("all-reduce", 8) == 1.75
    assert ring_steps("all-reduce", 8) == 14
    assert bus_factor("all-gather", 8) == 0.875
    assert ring_steps("collective-permute", 8) == 1
    # XLA's H100 table: 134 MB over 8 GPUs in 670 us (see hardware/h100.json)
    link = Link(bandwidth_bytes_per_s=3.7e11, latency_s=2.5e-6)
    assert math.isclose(expected_seconds("all-reduce", 8, 134e6, link), 670e-6, rel_tol=0.02)

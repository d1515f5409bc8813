"""The compiled programs hold what they claim to time, and do it; on the 8 virtual CPU devices of conftest."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.profile import CollectiveKind
from galvatron_jax.profilers import _collectives
from galvatron_jax.profilers._agenda import KINDS, OVERLAP_SIDE, device_groups, hardware_agenda
from galvatron_jax.profilers._collectives import collective_loop, spelling
from galvatron_jax.profilers._compute import launch_loop, product_loop
from galvatron_jax.profilers._hlo import count_in_loop
from galvatron_jax.profilers._loop import LOCAL, group_mesh, steps_in_trip
from galvatron_jax.profilers._programs import subject_loop
from galvatron_jax.profilers._readings import ANSWER_BYTES, MATMUL, MESSAGE, OVERLAP, SENDER, Subject, product_flops
from galvatron_jax.profilers._timing import MeasurementError
from galvatron_jax.units import KIB, MIB
from galvatron_jax.verify import collectives

from .fakes import reading

pytestmark = pytest.mark.multidevice
GROUPS = [(group.size, group.stride) for group in device_groups(parse_cluster("1x8"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group", "stride"), GROUPS)
def test_collective_stands_in_the_loop_as_often_as_claimed(kind: CollectiveKind, group: int, stride: int) -> None:
    loop = collective_loop(kind, KIB, jax.devices(), group=group, stride=stride)
    assert count_in_loop(loop.text, spelling(kind, "cpu")) == loop.operations == 2
    loop.run(0)
    loop.run(3)


@pytest.mark.parametrize(("group", "stride"), GROUPS)
def test_collective_runs_over_every_stride_th_device(group: int, stride: int) -> None:
    text = collective_loop("all-reduce", KIB, jax.devices(), group=group, stride=stride).text
    members = tuple(stride * member for member in range(group))
    everyone = (tuple(range(8)),)
    assert {members in (found.groups or everyone) for found in collectives(text)} == {True}


def test_small_steps_share_a_trip_on_gpus_only() -> None:
    gpus = [SimpleNamespace(platform="cuda")]
    assert steps_in_trip(gpus, small=True) == 8
    assert steps_in_trip(gpus, small=False) == 2
    assert steps_in_trip(jax.devices(), small=True) == 2


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce"])
def test_collective_moves_the_bytes_of_the_whole_array(kind: CollectiveKind) -> None:
    text = collective_loop(kind, 4000, jax.devices(), group=8, stride=1).text
    lines = [line for line in text.splitlines() if f" {spelling(kind, 'cpu')}(" in line]
    assert lines
    assert all("f32[1000]" in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-reduce", [2.0, 4.0, 2.0, 4.0]),  # groups {0, 2} and {1, 3} hold 0 + 2 and 1 + 3
        ("all-gather", [2.0, 3.0, 2.0, 3.0]),  # the last of the group's elements
        ("reduce-scatter", [2.0, 4.0, 2.0, 4.0]),
        ("all-to-all", [0.0, 1.0, 0.0, 1.0]),  # first element of every device: from the first member
        ("collective-permute", [2.0, 3.0, 0.0, 1.0]),  # from the member before
    ],
)
def test_step_is_that_collective(kind: CollectiveKind, expected: list[float]) -> None:
    mesh = group_mesh(jax.devices()[:4], 2, 2)
    for platform in ("cpu", "gpu"):
        step = _collectives._step(kind, 2, spelling(kind, platform))
        run = jax.shard_map(step, mesh=mesh, in_specs=LOCAL, out_specs=(LOCAL,), check_vma=False)
        (result,) = jax.jit(run)(np.repeat(np.arange(4.0, dtype=np.float32), 2))
        assert np.asarray(result)[::2].tolist() == expected


def test_collective_that_the_compiler_removed_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_collectives, "_step", lambda *_: lambda x: (x + 1,))
    with pytest.raises(MeasurementError, match="left 0 of 2 all-reduce"):
        collective_loop("all-reduce", KIB, jax.devices(), group=8, stride=1)


def test_product_loop_keeps_its_values_finite() -> None:
    loop = product_loop(64, "float32", jax.devices()[:2])
    assert "f32[64,64]" in loop.text
    assert (loop.operations, loop.glue) == (2, 1)
    loop.run(1000)


def test_launch_loop_counts_the_kernels_that_are_left() -> None:
    loop = launch_loop(jax.devices(), 32)
    assert 1 <= loop.operations <= 32


def test_program_for_every_subject_of_a_quick_agenda_runs() -> None:
    devices = jax.devices()[:2]
    agenda = hardware_agenda(parse_cluster("1x2"), "cpu", quick=True)
    small = [s for s in agenda if s.size <= MIB or (s.what == MATMUL and s.size <= product_flops(256))]
    known = {s: reading(1e-4, **{f: getattr(s, f) for f in s.__struct_fields__}) for s in agenda}
    assert OVERLAP in {subject.what for subject in small}
    for subject in small:
        subject_loop(subject, known, devices).run(1)


@pytest.mark.parametrize("nodes", [2, 4])
def test_messages_go_there_and_back_between_every_second_node_and_the_next(nodes: int) -> None:
    per_node = len(jax.devices()) // nodes
    subject = Subject(what=MESSAGE, size=4 * KIB, group=nodes, stride=per_node)
    loop = subject_loop(subject, {}, jax.devices())
    assert loop.operations == 2
    ids = [[per_node * node + d for d in range(per_node)] for node in range(nodes)]
    pairs = {(a, b) for k in range(0, nodes, 2) for a, b in zip(ids[k], ids[k + 1], strict=True)}
    found = [
        {(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[1])}
        for line in loop.text.splitlines()
        if "source_target_pairs=" in line
    ]
    assert found == [pairs, {(b, a) for a, b in pairs}]
    loop.run(3)


def test_senders_compute_longer_than_their_message_takes() -> None:
    subject = Subject(what=SENDER, size=64 * KIB, dtype="float32", group=4, stride=2)
    message = Subject(what=MESSAGE, size=64 * KIB, group=4, stride=2)
    answer = Subject(what=MESSAGE, size=ANSWER_BYTES, group=4, stride=2)
    product = Subject(what=MATMUL, size=product_flops(OVERLAP_SIDE["cpu"]), dtype="float32")
    times = {message: 8e-4, answer: 1e-5, product: 2e-4}
    known = {s: reading(t, **{f: getattr(s, f) for f in s.__struct_fields__}) for s, t in times.items()}
    loop = subject_loop(subject, known, jax.devices())
    assert loop.products == 5
    assert count_in_loop(loop.text, "collective-permute") == 2
    loop.run(3)
    with pytest.raises(MeasurementError, match="was not measured"):
        subject_loop(subject, {message: known[message]}, jax.devices())


def test_overlap_holds_twice_the_compute_of_its_all_reduce() -> None:
    subject = Subject(what=OVERLAP, size=MIB, dtype="float32", group=2)
    alone = reading(6e-4, "all-reduce", size=MIB, group=2)
    product = reading(2e-4, MATMUL, size=product_flops(OVERLAP_SIDE["cpu"]), dtype="float32")
    known = {r.subject: r for r in (alone, product)}
    loop = subject_loop(subject, known, jax.devices()[:2])
    assert loop.products == 6
    assert count_in_loop(loop.text, "all-reduce") == loop.operations == 2


def test_overlap_without_its_parts_raises() -> None:
    with pytest.raises(MeasurementError, match="was not measured"):
        subject_loop(Subject(what=OVERLAP, size=MIB, dtype="float32", group=2), {}, jax.devices()[:2])


def test_group_mesh_has_a_place_for_every_device() -> None:
    mesh = group_mesh(jax.devices(), 2, 2)
    assert mesh.shape == {"before": 2, "group": 2, "after": 2}
    assert PartitionSpec(*LOCAL) == LOCAL
    assert [device.id for device in mesh.devices[1, :, 0]] == [4, 6]

from __future__ import annotations

import itertools

import pytest

from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import (
    collective_seconds,
    device_group,
    estimate_relayout,
    estimate_transfer,
    message_bytes,
    stream_arrays,
    stream_sizes,
    wire_strategy,
)
from galvatron_jax.cost._stream import wire_layout
from galvatron_jax.plan import Strategy
from galvatron_jax.profile import CollectiveKind
from tests.cost.settings import HARDWARE, MODEL, setting

KIND = MODEL.kind("layers.*")
(STREAM,) = stream_arrays(KIND)
SETTING = setting(8, microbatch=16)  # two nodes of 4
SIZES = stream_sizes(KIND, SETTING)
WHOLE = 16 * 32 * 64 * 2  # batch * seq * embed * 2 bytes


def layout(tp: int, sp: bool = False) -> Strategy:
    return Strategy(tp=tp, sp=sp, dp=8 // tp)


def collective(kind: CollectiveKind, size_bytes: float, ranks: int, stride: int) -> float:
    return collective_seconds(kind, size_bytes, device_group(ranks, stride, 4), HARDWARE)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("sp", [False, True])
def test_relayout_between_equal_layouts_is_free(tp: int, sp: bool) -> None:
    before = Strategy(tp=tp, sp=sp, dp=8 // tp, zero=0)
    after = Strategy(tp=tp, sp=sp, dp=8 // tp, zero=3, remat="full")
    assert estimate_relayout(STREAM, SIZES, before, after, SETTING) == (0.0, 0.0)


GATHER, EXCHANGE, PERMUTE = "all-gather", "all-to-all", "collective-permute"
CASES = [
    # dp 8 -> tp 2: pairs of neighbours gather their samples; the way back is a slice
    (layout(1), layout(2), [(GATHER, WHOLE / 4, 2, 1)], []),
    # tp 2 -> tp 8: four groups of two become one; the joining ranks are 2 apart
    (layout(2), layout(8), [(GATHER, WHOLE, 4, 2)], []),
    (layout(8), layout(2), [], [(GATHER, WHOLE, 4, 2)]),
    # dp 8 -> tp 4 with sp: samples move, positions split: all-to-all both ways
    (layout(1), layout(4, True), [(EXCHANGE, WHOLE / 8, 4, 1)], [(EXCHANGE, WHOLE / 8, 4, 1)]),
    # some axes stay on the sequence: those that come must go before them
    (
        layout(2, True),
        layout(4, True),
        [(EXCHANGE, WHOLE / 8, 2, 2), (PERMUTE, WHOLE / 8, 4, 1)],
        [(EXCHANGE, WHOLE / 8, 2, 2), (PERMUTE, WHOLE / 8, 4, 1)],
    ),
    # sp on and off at equal tp
    (layout(4, True), layout(4), [(GATHER, WHOLE / 2, 4, 1)], []),
    (layout(4), layout(4, True), [], [(GATHER, WHOLE / 2, 4, 1)]),
    # tp 2 with sp -> tp 4 replicated: positions, then samples
    (layout(2, True), layout(4), [(GATHER, WHOLE / 4, 2, 1), (GATHER, WHOLE / 2, 2, 2)], []),
    # tp 4 with sp -> tp 2 replicated: all-to-all, then positions over 2
    (
        layout(4, True),
        layout(2),
        [(EXCHANGE, WHOLE / 8, 2, 2), (PERMUTE, WHOLE / 8, 4, 1), (GATHER, WHOLE / 4, 2, 1)],
        [(EXCHANGE, WHOLE / 8, 2, 2), (PERMUTE, WHOLE / 8, 4, 1)],
    ),
]


@pytest.mark.parametrize(("before", "after", "forward", "backward"), CASES)
def test_relayout_takes_the_collectives_worked_out_by_hand(
    before: Strategy,
    after: Strategy,
    forward: list[tuple[CollectiveKind, float, int, int]],
    backward: list[tuple[CollectiveKind, float, int, int]],
) -> None:
    expected = sum(collective(*c) for c in forward), sum(collective(*c) for c in backward)
    assert estimate_relayout(STREAM, SIZES, before, after, SETTING) == pytest.approx(expected)


def test_relayout_there_and_back_swap_forward_and_backward() -> None:
    layouts = [layout(tp, sp) for tp in (1, 2, 4, 8) for sp in (False, True)[: 1 + (tp > 1)]]
    for before, after in itertools.product(layouts, repeat=2):
        forward, backward = estimate_relayout(STREAM, SIZES, before, after, SETTING)
        assert estimate_relayout(STREAM, SIZES, after, before, SETTING) == (backward, forward)


def test_relayout_of_degrees_that_do_not_nest_goes_through_their_common_multiple() -> None:
    six = setting(6, microbatch=12)
    before, after = Strategy(tp=2, dp=3), Strategy(tp=3, dp=2)
    sizes = stream_sizes(KIND, six)
    forward, backward = estimate_relayout(STREAM, sizes, before, after, six)
    whole = 12 * 32 * 64 * 2
    assert forward == pytest.approx(collective_seconds("all-gather", whole, device_group(3, 2, 4), HARDWARE))
    assert backward == pytest.approx(collective_seconds("all-gather", whole, device_group(2, 3, 4), HARDWARE))


def test_wire_is_the_layout_without_tensor_parallelism() -> None:
    assert estimate_relayout(STREAM, SIZES, wire_strategy(SETTING), layout(1), SETTING) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("devices", "boundary", "bandwidth", "latency"),
    [
        (4, 0, 1e10, 1e-5),  # whole nodes: every boundary leaves the node
        (2, 0, 1e11, 1e-6),  # half nodes: the first boundary is inside,
        (2, 1, 1e10, 1e-5),  # the second between nodes
        (2, 2, 1e11, 1e-6),
    ],
)
def test_transfer_sends_each_device_s_part_over_the_link_of_the_boundary(
    devices: int, boundary: int, bandwidth: float, latency: float
) -> None:
    stage = setting(8)
    stage = type(stage)(**{f: getattr(stage, f) for f in stage.__slots__} | {"stage_devices": devices})
    time_s = estimate_transfer(message_bytes(KIND, 1, (), stage), stage, boundary=boundary)
    assert time_s == pytest.approx(WHOLE / devices / bandwidth + latency)


@pytest.mark.parametrize(
    ("microbatch", "expected"),
    [
        (8, Strategy(dp=8)),
        (12, Strategy(tp=2, sp=True, dp=4)),  # eight do not divide it, the leading axes of four do
        (2, Strategy(tp=4, sp=True, dp=2)),
        (1, Strategy(tp=8, sp=True, dp=1)),
    ],
)
def test_wire_of_a_small_microbatch_divides_the_sequence_too(microbatch: int, expected: Strategy) -> None:
    assert wire_layout(Cluster(nodes=2, gpus_per_node=4, gpu="h100"), 8, microbatch) == expected

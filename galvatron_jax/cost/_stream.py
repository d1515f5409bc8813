"""Moving the stream (the value that flows from layer to layer): between layouts in a stage, and between stages.

A layout is (t, sequence-sharded?) on D devices: batch over the dp = D / t leading ranks, replicated over the t trailing
ones or sequence over them. Tensor parallelism has t = tp, and the sequence sharded with sp; Ulysses has t = ulysses and
the sequence sharded always: the same layout as that of sp. Strategies nest, so a change is free (each device keeps a
part of what it has) or a few collectives. With n bytes of the whole stream, r = the larger t over the smaller, and tp,
sp standing for t and the sequence:

    tp grows,   after replicated    all-gather n / dp_after over the r ranks that join; sp before: first n / dp_before
                                    over tp_before
    tp grows,   after sp            exchange of n / D over r ranks
    tp shrinks, before replicated   free
    tp shrinks, before sp           exchange of n / D over r ranks, then all-gather n / dp_after over tp_after unless
                                    the layout after has sp or tp 1
    equal tp,   sp to replicated    all-gather n / dp over tp
    equal tp,   replicated to sp    free
    neither divides the other       via the layout with their least common multiple, replicated

An exchange is an all-to-all, and a permute of the result where the smaller tp is not 1: the axes left on the sequence
then stand before those that came, and device order wants them behind. All this is the compiler's choice, read from the
programs that XLA:GPU and XLA:CPU make of each of these changes on 8 devices (tests/runtime/test_relayout.py).

Backward, the cotangent takes the way back, so it costs what the reverse change costs forward.

Between stages each device sends n / D bytes to its partner, D devices at once ("the wire": batch over all devices of
the stage, the layout of tp = 1; a batch too small for that over as many as divide it, and the sequence over the rest),
and so the side values that cross (``_side_values``). The stages' own ends then change layout between the wire and their
first or last strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..cluster import Cluster
from ..plan import Strategy
from ..profile import BATCH, Array, CollectiveKind, LayerKind
from ._collectives import collective_seconds, device_group, message_seconds
from ._side_values import SideValue
from ._values import Setting


class StreamLayout(NamedTuple):
    """Where the stream lies between two layers: neighbours that agree exchange nothing."""

    inner: int
    """Trailing ranks that share one sample: tp or ulysses."""
    sequence: bool
    """They hold parts of the sequence; otherwise copies."""
    dp: int

    @classmethod
    def of(cls, strategy: Strategy) -> StreamLayout:
        """Return the layout of the stream that a layer under ``strategy`` reads and leaves."""
        return cls(strategy.inner, strategy.sp or strategy.ulysses > 1, strategy.dp)


class RelayoutStep(NamedTuple):
    """One collective of a change of layout."""

    kind: CollectiveKind
    parts: int
    """Its array is the whole stream divided by this."""
    ranks: int
    stride: int
    """The group: every ``stride``-th device, ``ranks`` of them (a permute: among these)."""


def stream_arrays(kind: LayerKind) -> tuple[Array, ...]:
    """Return the arrays that a layer of ``kind`` takes from the layer before."""
    return tuple(boundary.array for boundary in kind.inputs if boundary.stream)


def stream_sizes(kind: LayerKind, setting: Setting) -> dict[str, int]:
    """Return the class sizes of ``kind`` for one microbatch."""
    return {**kind.classes, BATCH: setting.microbatch}


def wire_strategy(setting: Setting) -> Strategy:
    """Return the strategy whose layout messages between stages have; see ``wire_layout``."""
    return wire_layout(setting.cluster, setting.stage_devices, setting.microbatch)


def wire_layout(cluster: Cluster, devices: int, microbatch: int) -> Strategy:
    """Return the strategy whose layout messages between stages have.

    Batch over as many leading mesh axes of the stage as divide it, sequence over the rest (``runtime._wire``).

    Args:
        cluster: The cluster.
        devices: Of a stage.
        microbatch: Samples, over all data-parallel ranks.
    """
    return max(
        (
            Strategy(tp=d, sp=d > 1, dp=devices // d)
            for d in cluster.tensor_degrees(devices)
            if microbatch % (devices // d) == 0
        ),
        key=lambda strategy: strategy.dp,
    )


def estimate_relayout(
    stream: Array, sizes: Mapping[str, int], before: Strategy, after: Strategy, setting: Setting
) -> tuple[float, float]:
    """Return the seconds, forward and backward, to bring one microbatch's stream from one layout into another.

    Args:
        stream: The stream, whole.
        sizes: Class sizes of one microbatch.
        before: Strategy of the layer that makes it.
        after: Strategy of the layer that takes it; both on all devices of the stage.
        setting: Stage and hardware.

    Returns:
        (forward_s, backward_s); both 0 when the layouts agree.
    """
    size_bytes = stream.local_bytes(sizes, {})
    return (
        _seconds(size_bytes, relayout_steps(before, after), setting),
        _seconds(size_bytes, relayout_steps(after, before), setting),
    )


def message_bytes(kind: LayerKind, position: int, sides: Iterable[SideValue], setting: Setting) -> float:
    """Return the bytes that one device sends for one microbatch (or its cotangent) over a stage boundary.

    Args:
        kind: The kind of the layer behind the boundary, which takes the stream.
        position: That layer's position in the model, from 0.
        sides: The model's side values.
        setting: Stage and hardware.
    """
    sizes = stream_sizes(kind, setting)
    crossing = [side for side in sides if side.first < position <= side.last]
    whole = sum(array.local_bytes(sizes, {}) for array in stream_arrays(kind))
    whole += sum(
        side.copies * side.array.local_bytes({**side.sizes, BATCH: setting.microbatch}, {}) for side in crossing
    )
    return whole / setting.stage_devices


def estimate_transfer(size_bytes: float, setting: Setting, *, boundary: int) -> float:
    """Return the seconds to send ``size_bytes`` from each device of a stage over one stage boundary.

    Args:
        size_bytes: See ``message_bytes``.
        setting: Stage and hardware.
        boundary: ``k`` for the boundary between stages ``k`` and ``k + 1``: it decides which link is crossed (from the
            last slice back to the first: that between nodes, where there are several).
    """
    hardware = setting.hardware
    if not leaves_node(setting, boundary):
        return message_seconds(size_bytes, hardware.intra_node)
    # Its own program, and that of the pass that it feeds: what the host takes for both stands in its way.
    return message_seconds(size_bytes, hardware.inter_node) + 2 * hardware.program_s


def sender_seconds(size_bytes: float, setting: Setting, *, boundary: int) -> float:
    """Return the seconds of ``estimate_transfer`` for which the sender is held; arguments as there.

    It is free when what is left fits into the buffers below it (``HardwareProfile.eager_bytes``).
    """
    seconds, hardware = estimate_transfer(size_bytes, setting, boundary=boundary), setting.hardware
    if not (hardware.eager_bytes and leaves_node(setting, boundary)):
        return seconds
    left = max(0.0, size_bytes - hardware.eager_bytes)
    return min(seconds, left / hardware.inter_node.bandwidth_bytes_per_s + hardware.program_s)


def leaves_node(setting: Setting, boundary: int) -> bool:
    """Return whether a boundary, as in ``estimate_transfer``, lies between two nodes."""
    cluster, after = setting.cluster, (boundary + 1) * setting.stage_devices % setting.cluster.devices
    return cluster.nodes > 1 and after % cluster.gpus_per_node == 0


def relayout_steps(before: Strategy, after: Strategy) -> tuple[RelayoutStep, ...]:
    """Return the collectives that bring the stream from the layout of ``before`` into that of ``after``.

    Args:
        before: Strategy of the layer that makes it.
        after: Strategy of the layer that takes it, on the same devices.
    """
    return layout_steps(StreamLayout.of(before), StreamLayout.of(after))


def layout_steps(before: StreamLayout, after: StreamLayout) -> tuple[RelayoutStep, ...]:
    """Return the collectives between two layouts on the same devices."""
    if before == after:
        return ()
    if before.inner == after.inner:
        return (_gather(before, before.inner, 1),) if before.sequence else ()
    if after.inner % before.inner == 0:
        if after.sequence:
            return _exchange(before, after)
        joining = _gather(after, after.inner // before.inner, before.inner)
        return (_gather(before, before.inner, 1), joining) if before.sequence else (joining,)
    if before.inner % after.inner == 0:
        if not before.sequence:
            return ()
        gather = () if after.sequence or after.inner == 1 else (_gather(after, after.inner, 1),)
        return _exchange(after, before) + gather
    common = math.lcm(before.inner, after.inner)
    return layout_steps(before, StreamLayout(common, False, before.inner * before.dp // common))


def _gather(layout: StreamLayout, ranks: int, stride: int) -> RelayoutStep:
    """Gather to the batch share of ``layout``."""
    return RelayoutStep("all-gather", layout.dp, ranks, stride)


def _exchange(narrow: StreamLayout, wide: StreamLayout) -> tuple[RelayoutStep, ...]:
    """Swap batch and sequence over the ranks between two degrees."""
    devices = wide.inner * wide.dp
    swap = RelayoutStep("all-to-all", devices, wide.inner // narrow.inner, narrow.inner)
    permute = RelayoutStep("collective-permute", devices, wide.inner, 1)
    return (swap, permute) if narrow.inner > 1 else (swap,)


def _seconds(size_bytes: float, steps: Iterable[RelayoutStep], setting: Setting) -> float:
    """Seconds of changing the layout of a stream of ``size_bytes``."""
    return sum(
        collective_seconds(
            step.kind,
            size_bytes / step.parts,
            device_group(step.ranks, step.stride, setting.gpus_per_node),
            setting.hardware,
        )
        for step in steps
    )

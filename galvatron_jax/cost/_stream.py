"""Moving the stream (the value that flows from layer to layer): between layouts in a stage, and between stages.

A layout is (tp, sequence-sharded?) on D devices: batch over the dp = D / tp leading ranks, replicated over the tp
trailing ones or, with sequence parallelism, sequence over them. Strategies nest, so a change is free (each device keeps
a part of what it has) or a few collectives. With n bytes of the whole stream, r = the larger tp over the smaller:

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
the stage, the layout of tp = 1). The stages' own ends then change layout between the wire and their first or last
strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..plan import Strategy
from ..profile import BATCH, Array, CollectiveKind, LayerKind
from ._collectives import collective_seconds, device_group, message_seconds
from ._values import Setting


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
    """Return the strategy whose layout messages between stages have: batch over all devices of the stage."""
    return Strategy(dp=setting.stage_devices)


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


def estimate_transfer(stream: Array, sizes: Mapping[str, int], setting: Setting, *, boundary: int) -> float:
    """Return the seconds to send one microbatch's stream (or its cotangent) over one stage boundary.

    Args:
        stream: The stream, whole.
        sizes: Class sizes of one microbatch.
        setting: Stage and hardware.
        boundary: ``s`` for the boundary between stages ``s`` and ``s + 1``: it decides which link is crossed.
    """
    leaves_node = (boundary + 1) * setting.stage_devices % setting.cluster.gpus_per_node == 0
    link = setting.hardware.inter_node if leaves_node else setting.hardware.intra_node
    return message_seconds(stream.local_bytes(sizes, {}) / setting.stage_devices, link)


def relayout_steps(before: Strategy, after: Strategy) -> tuple[RelayoutStep, ...]:
    """Return the collectives that bring the stream from the layout of ``before`` into that of ``after``.

    Args:
        before: Strategy of the layer that makes it.
        after: Strategy of the layer that takes it, on the same devices.
    """
    if (before.tp, before.sp) == (after.tp, after.sp):
        return ()
    if before.tp == after.tp:
        return (_gather(before, before.tp, 1),) if before.sp else ()
    if after.tp % before.tp == 0:
        if after.sp:
            return _exchange(before, after)
        joining = _gather(after, after.tp // before.tp, before.tp)
        return (_gather(before, before.tp, 1), joining) if before.sp else (joining,)
    if before.tp % after.tp == 0:
        if not before.sp:
            return ()
        gather = () if after.sp or after.tp == 1 else (_gather(after, after.tp, 1),)
        return _exchange(after, before) + gather
    common = math.lcm(before.tp, after.tp)
    return relayout_steps(before, Strategy(tp=common, dp=before.tp * before.dp // common))


def _gather(layout: Strategy, ranks: int, stride: int) -> RelayoutStep:
    """Gather to the batch share of ``layout``."""
    return RelayoutStep("all-gather", layout.dp, ranks, stride)


def _exchange(narrow: Strategy, wide: Strategy) -> tuple[RelayoutStep, ...]:
    """Swap batch and sequence over the ranks between two degrees."""
    devices = wide.tp * wide.dp
    swap = RelayoutStep("all-to-all", devices, wide.tp // narrow.tp, narrow.tp)
    return (swap, RelayoutStep("collective-permute", devices, wide.tp, 1)) if narrow.tp > 1 else (swap,)


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

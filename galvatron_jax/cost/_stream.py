"""Moving the stream (the value that flows from layer to layer): between layouts in a stage, and between stages.

A layout is (tp, sequence-sharded?) on D devices: batch over the dp = D / tp leading ranks, replicated over the tp
trailing ones or, with sequence parallelism, sequence over them. Strategies nest, so a change is free (each device keeps
a part of what it has) or one collective (the compiler's choice, read from programs for 8 devices). With n bytes of the
whole stream, r = tp_after / tp_before when tp grows, and the inverse when it shrinks:

    tp grows,   after replicated    all-gather n / dp_after over the r ranks that join (over tp_after with sp before)
    tp grows,   after sp            all-to-all of n / D over the r ranks
    tp shrinks, before replicated   free
    tp shrinks, before sp           all-to-all of n / D over r ranks, then all-gather n / dp_after over tp_after
                                    unless the layout after has sp or tp 1
    equal tp,   sp to replicated    all-gather n / dp over tp
    equal tp,   replicated to sp    free
    neither divides the other       via the layout with their least common multiple, replicated

Backward, the cotangent takes the way back, so it costs what the reverse change costs forward.

Between stages each device sends n / D bytes to its partner, D devices at once ("the wire": batch over all devices of
the stage, the layout of tp = 1). The stages' own ends then change layout between the wire and their first or last
strategy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..plan import Strategy
from ..profile import BATCH, Array, LayerKind
from ._collectives import collective_seconds, device_group, message_seconds
from ._values import Setting


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
    return _change_seconds(size_bytes, before, after, setting), _change_seconds(size_bytes, after, before, setting)


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


def _change_seconds(size_bytes: float, before: Strategy, after: Strategy, setting: Setting) -> float:
    """Seconds of one change of layout, in the direction before -> after."""
    if (before.tp, before.sp) == (after.tp, after.sp):
        return 0.0
    if before.tp == after.tp:
        return _gather(size_bytes, after.dp, before.tp, 1, setting) if before.sp else 0.0
    if after.tp % before.tp == 0:
        ratio = after.tp // before.tp
        if after.sp:
            return _exchange(size_bytes, ratio, before.tp, setting)
        if before.sp:
            return _gather(size_bytes, after.dp, after.tp, 1, setting)
        return _gather(size_bytes, after.dp, ratio, before.tp, setting)
    if before.tp % after.tp == 0:
        return _shrink(size_bytes, before, after, setting) if before.sp else 0.0
    common = math.lcm(before.tp, after.tp)
    return _change_seconds(size_bytes, before, Strategy(tp=common, dp=setting.stage_devices // common), setting)


def _shrink(size_bytes: float, before: Strategy, after: Strategy, setting: Setting) -> float:
    exchange_s = _exchange(size_bytes, before.tp // after.tp, after.tp, setting)
    if after.sp or after.tp == 1:
        return exchange_s
    return exchange_s + _gather(size_bytes, after.dp, after.tp, 1, setting)


def _gather(size_bytes: float, dp: int, ranks: int, stride: int, setting: Setting) -> float:
    group = device_group(ranks, stride, setting.gpus_per_node)
    return collective_seconds("all-gather", size_bytes / dp, group, setting.hardware)


def _exchange(size_bytes: float, ranks: int, stride: int, setting: Setting) -> float:
    group = device_group(ranks, stride, setting.gpus_per_node)
    return collective_seconds("all-to-all", size_bytes / setting.stage_devices, group, setting.hardware)

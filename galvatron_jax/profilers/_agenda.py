"""What to measure and in which order: coarse sizes of everything first, so that a short budget still covers all.

The groups are those that strategies use (see ``Cluster``): on a stage of contiguous devices, tensor-parallel groups are
trailing sets of mesh axes (stride 1), data-parallel groups leading sets (stride tp).
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import msgspec

from ..cluster import Cluster, divisors
from ..errors import ClusterError
from ..profile import CollectiveKind
from ..units import GIB, KIB, MIB
from ._readings import (
    ANSWER_BYTES,
    COPY,
    LAUNCH,
    LOOP,
    MATMUL,
    MESSAGE,
    OVERLAP,
    PROGRAM,
    SENDER,
    Subject,
    product_flops,
)

KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)

Sizes = tuple[int, ...]

_SIZES_BYTES: tuple[Sizes, Sizes] = ((KIB, 64 * KIB, 4 * MIB, 256 * MIB), (8 * KIB, 512 * KIB, 32 * MIB))
_BETWEEN_BYTES: Sizes = (32 * KIB, 256 * KIB)
"""Sizes in between, of groups over several nodes: there time bends with the segments that libraries cut arrays into."""
_QUICK_SIZES_BYTES: tuple[Sizes, Sizes] = ((KIB, 64 * KIB, MIB), (4 * MIB,))
"""Rounds, coarse to fine; within a round the sizes rise, so that one foretells the time of the next."""

_MESSAGE_BYTES = (ANSWER_BYTES, 64 * KIB, 256 * KIB, MIB, 16 * MIB)
_QUICK_MESSAGE_BYTES = (ANSWER_BYTES, 256 * KIB)

_SENDER_BYTES = {"cpu": 256 * KIB}
"""Size of the message that shows how long its sender is held: more than the buffers of a socket take. Not measured on
GPUs, whose messages hold both sides: NCCL's sender is a kernel of its stream."""

OVERLAP_BYTES = {"gpu": 32 * MIB, "cpu": MIB}
"""Size of the all-reduce that runs beside products, as in Hetu-Galvatron's overlap profiler (32 MiB)."""

OVERLAP_SIDE = {"gpu": 4096, "cpu": 256}
"""Side of the matrices of those products."""

MAIN_DTYPE = {"gpu": "bfloat16", "cpu": "float32"}
"""The dtype whose products give the efficiency curve."""

_OTHER_DTYPES = {"gpu": ("float16", "float32"), "cpu": ("bfloat16", "float16")}
_SIDES = {"gpu": (256, 512, 1024, 2048, 4096, 8192), "cpu": (64, 128, 256, 512, 1024)}
_QUICK_SIDES = {"gpu": (512, 2048, 4096), "cpu": (64, 256, 512)}
_COPY_BYTES = {"gpu": (256 * MIB, GIB), "cpu": (16 * MIB, 64 * MIB)}
"""Far above the caches (50 MB of level 2 on Hopper; NVIDIA H100 whitepaper)."""


class DeviceGroup(NamedTuple):
    """Every ``stride``-th device, ``size`` of them."""

    size: int
    stride: int
    inside_node: bool


def device_groups(cluster: Cluster) -> tuple[DeviceGroup, ...]:
    """Return the groups of more than one device that some strategy uses on ``cluster``, small ones first."""
    found = set()
    for devices in divisors(cluster.devices):
        try:
            degrees = cluster.tensor_degrees(devices)
        except ClusterError:  # a stage that cuts nodes unevenly: no strategy has it
            continue
        for tp in degrees:
            for size, stride in ((tp, 1), (devices // tp, tp)):
                if size > 1:
                    found.add(DeviceGroup(size, stride, cluster.gpus_per_node % (size * stride) == 0))
    return tuple(sorted(found))


def hardware_agenda(cluster: Cluster, platform: str, *, quick: bool) -> tuple[Subject, ...]:
    """Return the subjects for a hardware profile of ``cluster``, most needed first.

    Args:
        cluster: Nodes and devices to measure.
        platform: ``"gpu"`` or ``"cpu"``.
        quick: Fewer sizes, and one placement of each group size instead of all.
    """
    groups = device_groups(cluster)
    if quick:
        groups = tuple({(g.size, g.inside_node): g for g in reversed(groups)}.values())
    across = tuple(g for g in groups if not g.inside_node)
    coarse, fine = _QUICK_SIZES_BYTES if quick else _SIZES_BYTES
    rounds = ((coarse, groups), (fine, groups), (() if quick else _BETWEEN_BYTES, across))
    collectives = [
        Subject(what=k, size=s, group=g.size, stride=g.stride)
        for sizes, places in rounds
        for s in sizes
        for k in KINDS
        for g in places
    ]
    compute = _compute_agenda(platform, quick=quick)
    overlap = _overlap_agenda(cluster, platform) if groups else []
    return tuple(dict.fromkeys([*compute, *overlap, *_message_agenda(cluster, platform, quick=quick), *collectives]))


def _compute_agenda(platform: str, *, quick: bool) -> list[Subject]:
    sides = (_QUICK_SIDES if quick else _SIDES)[platform]
    products = [(MAIN_DTYPE[platform], side) for side in (*sides, OVERLAP_SIDE[platform])]
    products += [(dtype, side) for dtype in _OTHER_DTYPES[platform] for side in sides[-2:]]
    subjects = [Subject(what=LOOP), Subject(what=LAUNCH)]
    subjects += [Subject(what=PROGRAM)] if platform == "cpu" else []  # GPUs queue programs ahead
    subjects += [Subject(what=COPY, size=size) for size in _COPY_BYTES[platform][: 1 if quick else 2]]
    subjects += [Subject(what=MATMUL, size=product_flops(side), dtype=dtype) for dtype, side in products]
    return list(dict.fromkeys(subjects))


def _message_agenda(cluster: Cluster, platform: str, *, quick: bool) -> list[Subject]:
    if cluster.nodes == 1:
        return []
    sizes = _QUICK_MESSAGE_BYTES if quick else _MESSAGE_BYTES
    messages = [Subject(what=MESSAGE, size=s, group=cluster.nodes, stride=cluster.gpus_per_node) for s in sizes]
    held = [s for s in messages if s.size == _SENDER_BYTES.get(platform)]
    return messages + [msgspec.structs.replace(s, what=SENDER, dtype=MAIN_DTYPE[platform]) for s in held]


def _overlap_agenda(cluster: Cluster, platform: str) -> list[Subject]:
    """An all-reduce alone, then beside products: over a node, or the whole mesh when nodes have one device."""
    size = cluster.gpus_per_node if cluster.gpus_per_node > 1 else cluster.devices
    alone = Subject(what="all-reduce", size=OVERLAP_BYTES[platform], group=size)
    return [alone, msgspec.structs.replace(alone, what=OVERLAP, dtype=MAIN_DTYPE[platform])]

"""Seconds of collectives over a group of devices, from the links or from measured tables.

A group has k members: c on each of m nodes, k = c * m. Rings (Thakur, Rabenseifner, Gropp 2005, "Optimization of
Collective Communication Operations in MPICH"; the bandwidth terms are those of nccl-tests, doc/PERFORMANCE.md):

    all-gather, reduce-scatter    (k - 1) / k * n / B + L
    all-reduce                    2 (k - 1) / k * n / B + 2 L'
    all-to-all                    max((k - c) / k * n / B_inter, (c - 1) / k * n / B_intra) + L
    collective-permute            n / B_link + latency_link

with n bytes of the whole array (all-to-all and permute: of the local one), B in bytes/s, and

    B  = B_intra                           inside one node
         min(c * B_inter * u, B_intra)     otherwise
    L  = (m - 1) * l_inter + m (c - 1) * l_intra          the hops of a ring
    L' = min(L, ceil(log2 m) * l_inter + (c - 1) * l_intra)   or of NCCL's double binary tree (equal bandwidth;
                                                              Sanders, Speck, Traff 2009)

Why c * B_inter: B_inter is one GPU's share of its node's network cards. A data-parallel group of stride tp =
gpus_per_node has one member per node (c = 1) and runs beside tp others, each with its own share. A group of whole nodes
(c = 8) forms c rings, each of which leaves the node through another card; each ring carries n / c, so together they
have c shares, until the links inside the node, which all rings pass, are the bound. Chunks are pipelined through the
hops, so the slower link decides and the two times do not add up.

Why u: a strided group (the data-parallel ranks beside tp 2: every second GPU of each node) runs beside siblings that
use the same cards at the same time. With one or two members per node each ring has a card's share for itself (u = 1).
With more, every group has rings on every card, nobody schedules the rings of different communicators beside each other,
and cards wait while others queue: u = ``SHARED_CARDS`` of the shares. A group of whole nodes has no siblings (u = 1).

Checked on an unnamed A100-class cluster (2x8, all-reduce of 32 MiB; Hetu-Galvatron's allreduce_bandwidth file), with
B_inter set from its c = 1 groups, 8.13 MiB/ms of bus bandwidth; all siblings run at once. c = 2 beside 4 groups:
measured 16.2, formula 16.2; c = 4 beside 2 groups: 20.8, without u 31.8 (+53 %), hence u; c = 8: 44.7, 60.0 (+34 %).
The eight c = 1 groups together carry 65 MiB/ms per node, yet one c = 8 group only 45: at this size its rings do not
fill the cards. Well-built fabrics reach the card sum at large sizes (nccl-tests issue 100), so there the formula stays,
optimistic for small messages over several nodes. Measure where it matters: tables win.

A table of the same kind, group size and place (inside a node or not) replaces the formula. Inside a node, a table of
another group size is scaled by the ratio of the formulas. Limit: a table does not say how many members share a node.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..profile import CollectiveKind, HardwareProfile, Link
from ._tables import interpolate, nearest_table

SHARED_CARDS = 0.65
"""Share of the cards that groups beside each other reach with more than two members per node each.
measured: Hetu-Galvatron cea12ff, 2x8 A100-class, all-reduce of 32 MiB, 20.8 of 31.8 MiB/ms (see above)."""


class Group(NamedTuple):
    """Members of one collective: ``per_node`` on each of ``nodes`` nodes."""

    size: int
    nodes: int
    per_node: int
    siblings: int = 1
    """Groups that run the same collective on the same nodes at the same time, this one included."""


def device_group(size: int, stride: int, gpus_per_node: int) -> Group:
    """Return the group of every ``stride``-th device, ``size`` of them, on node-major devices.

    Tensor-parallel groups have stride 1, data-parallel groups stride tp. A group that cuts nodes unevenly (tp = 3 on
    nodes with 2 GPUs) is taken as its least favourable part: as few members per node as its worst node has.
    """
    span = size * stride
    if gpus_per_node % span == 0:
        return Group(size, 1, size)
    per_node = max(1, math.gcd(gpus_per_node, span) // stride)
    return Group(size, math.ceil(size / per_node), per_node, max(1, gpus_per_node // per_node))


def collective_seconds(kind: CollectiveKind, size_bytes: float, group: Group, hardware: HardwareProfile) -> float:
    """Return the seconds of one collective.

    Args:
        kind: The collective.
        size_bytes: The whole array of the group (result of all-reduce and all-gather, operand of reduce-scatter); the
            local array for all-to-all and collective-permute.
        group: Its members.
        hardware: Links and tables.
    """
    if group.size == 1 or size_bytes == 0:
        return 0.0
    if hardware.collectives:
        table = nearest_table(hardware, kind, group.size, group.nodes == 1, group.per_node)
        if table is not None and table.group == group.size:
            return interpolate(table, size_bytes)
        if table is not None and group.nodes == 1:
            other = formula_seconds(kind, size_bytes, Group(table.group, 1, table.group), hardware)
            return interpolate(table, size_bytes) * formula_seconds(kind, size_bytes, group, hardware) / other
    return formula_seconds(kind, size_bytes, group, hardware)


def formula_seconds(kind: CollectiveKind, size_bytes: float, group: Group, hardware: HardwareProfile) -> float:
    """Return the seconds of one collective by the formulas of the module docstring."""
    k, c = group.size, group.per_node
    ring = (k - 1) / k * size_bytes / ring_bandwidth(group, hardware)
    if kind == "all-reduce":
        return 2 * ring + 2 * min(_ring_latency(group, hardware), _tree_latency(group, hardware))
    if kind in ("all-gather", "reduce-scatter"):
        return ring + _ring_latency(group, hardware)
    if kind == "all-to-all":
        leaving_s = (k - c) / k * size_bytes / hardware.inter_node.bandwidth_bytes_per_s
        staying_s = (c - 1) / k * size_bytes / hardware.intra_node.bandwidth_bytes_per_s
        return max(leaving_s, staying_s) + _ring_latency(group, hardware)
    return message_seconds(size_bytes, hardware.intra_node if group.nodes == 1 else hardware.inter_node)


def ring_bandwidth(group: Group, hardware: HardwareProfile) -> float:
    """Return the bus bandwidth of a group's rings, bytes/s."""
    inside = hardware.intra_node.bandwidth_bytes_per_s
    if group.nodes == 1:
        return inside
    shared = SHARED_CARDS if group.siblings > 1 and group.per_node > 2 else 1.0
    return min(group.per_node * shared * hardware.inter_node.bandwidth_bytes_per_s, inside)


def message_seconds(size_bytes: float, link: Link) -> float:
    """Return the seconds of one message between two devices."""
    return size_bytes / link.bandwidth_bytes_per_s + link.latency_s


def _ring_latency(group: Group, hardware: HardwareProfile) -> float:
    inside_hops = group.nodes * (group.per_node - 1)
    return (group.nodes - 1) * hardware.inter_node.latency_s + inside_hops * hardware.intra_node.latency_s


def _tree_latency(group: Group, hardware: HardwareProfile) -> float:
    levels = math.ceil(math.log2(group.nodes))
    return levels * hardware.inter_node.latency_s + (group.per_node - 1) * hardware.intra_node.latency_s

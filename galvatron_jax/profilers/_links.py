"""Rings: what a link does to a collective, and what a collective tells about the link.

A group of k members moves ``bus_factor`` times its n bytes over every link, in ``ring_steps`` steps (nccl-tests,
doc/PERFORMANCE.md; Thakur, Rabenseifner, Gropp 2005):

    t = bus_factor * n / B + ring_steps * l

    all-gather, reduce-scatter, all-to-all    (k - 1) / k        k - 1
    all-reduce                              2 (k - 1) / k     2 (k - 1)
    collective-permute                            1               1

``n * bus_factor / t`` is the bus bandwidth, which compares across kinds and group sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..profile import CollectiveKind, HardwareProfile, Link
from ._fit import Point, fit_line


def bus_factor(kind: CollectiveKind, group: int) -> float:
    """Return the share of its bytes that a collective moves over each link."""
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group


def ring_steps(kind: CollectiveKind, group: int) -> int:
    """Return the number of messages that follow each other."""
    if kind == "collective-permute":
        return 1
    return (2 if kind == "all-reduce" else 1) * (group - 1)


def expected_seconds(kind: CollectiveKind, group: int, size_bytes: float, link: Link) -> float:
    """Return what ``link`` promises for a collective, as one ring over links of that kind.

    Limit: groups with several members on each of several nodes have as many rings over the network and may be faster.
    """
    work_s = bus_factor(kind, group) * size_bytes / link.bandwidth_bytes_per_s
    return work_s + ring_steps(kind, group) * link.latency_s


def fit_link(kind: CollectiveKind, group: int, points: Sequence[Point]) -> Link | None:
    """Return the link that explains the times of one collective best; None when they are too few or do not rise."""
    if len(points) < 2:
        return None
    line = fit_line(points)
    if line.seconds_per_byte <= 0:
        return None
    return Link(
        bandwidth_bytes_per_s=bus_factor(kind, group) / line.seconds_per_byte,
        latency_s=line.latency_s / ring_steps(kind, group),
    )


def link_of(hardware: HardwareProfile, *, inside_node: bool) -> Link:
    """Return the link that a group of that place crosses."""
    return hardware.intra_node if inside_node else hardware.inter_node

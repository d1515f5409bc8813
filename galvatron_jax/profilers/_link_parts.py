"""Links: from readings of collectives and messages to fields of a hardware profile.

What a sender need not wait for: with held the seconds until the sender of a message is free, c those of its products
after it and a those of the answer to it, a step of ``sender_loop`` takes

    T = max(message, held + c) + a

and c is longer than the message, so held = T - c - a. What was left at that moment was still on its way:

    eager bytes = size - held * B
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..cluster import Cluster
from ..profile import Link
from ..units import KIB, format_seconds
from ._fit import Point, monotone_fit
from ._links import fit_link
from ._parts import NOTHING, Overheads, Part, by_series, without_unsteady
from ._readings import MESSAGE, SENDER, Reading, Subject, sender_parts
from ._text import format_si

LEAST_MESSAGE_BYTES = 64 * KIB
"""Of messages that a link is fitted to. Less than what buckets and buffers on the way take comes faster than its bytes
say (a token bucket's burst, NCCL's protocols for small messages), and the line would tilt."""


def link_fields(known: Mapping[Subject, Reading], overheads: Overheads, cluster: Cluster) -> Part:
    """Return the links: in a node by all-gathers over neighbours, between nodes by messages.

    Without messages (readings of a former version) by all-gathers over one device of each node.
    """
    node = cluster.gpus_per_node
    series = by_series((s, overheads.corrected(r)) for s, r in without_unsteady(known).items())
    gathers = {
        (group, stride): points for (what, _, _, group, stride), points in series.items() if what == "all-gather"
    }
    inside = max((g for g, stride in gathers if stride == 1 and node % g == 0), default=1)
    across = max((g for g, stride in gathers if stride == node), default=1)
    messages = [p for p in series.get((MESSAGE, "", "", cluster.nodes, node), []) if p.size >= LEAST_MESSAGE_BYTES]
    between = ("messages between neighbouring nodes", fit_link("collective-permute", 2, _rising(messages)))
    if between[1] is None:
        between = _by_gathers(across, gathers.get((across, node), []))
    found = {"intra_node": _by_gathers(inside, gathers.get((inside, 1), [])), "inter_node": between}
    links = {field: (text, link) for field, (text, link) in found.items() if link}
    return Part(
        {field: link for field, (_, link) in links.items()},
        {field: f"line through {text}" for field, (text, _) in links.items()},
        [],
    )


def _by_gathers(group: int, points: Sequence[Point]) -> tuple[str, Link | None]:
    return f"the all-gathers over {group} devices", fit_link("all-gather", group, _rising(points))


def _rising(points: Sequence[Point]) -> Sequence[Point]:
    return monotone_fit(points).points if points else ()


def eager_fields(known: Mapping[Subject, Reading], overheads: Overheads, side: int, cluster: Cluster) -> Part:
    """Return the bytes of a message between nodes that its sender need not wait for."""
    link = link_fields(known, overheads, cluster).fields.get("inter_node")
    found = [(s, r, parts) for s, r in known.items() if s.what == SENDER and (parts := sender_parts(s, side, known))]
    if not found or link is None:
        return NOTHING
    subject, reading, (_, answer, product) = found[0]
    compute_s = reading.products * (product.seconds - overheads.loop_s / product.operations)
    held_s = max(0.0, overheads.corrected(reading) - compute_s - overheads.corrected(answer))
    eager = min(float(subject.size), max(0.0, subject.size - held_s * link.bandwidth_bytes_per_s))
    how = (
        f"the sender of {format_si(subject.size, 'B')} is free after {format_seconds(held_s)}, by the time of "
        f"{reading.products} products after it and an answer"
    )
    return Part({"eager_bytes": eager}, {"eager_bytes": how}, [])

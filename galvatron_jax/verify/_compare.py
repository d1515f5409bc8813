"""Collectives of the compiled program beside the predicted ones.

Compared are totals per kind and group size over one step: bytes (they do not change when the compiler combines
collectives) and counts (they fall). Bytes are counted as in ``profile.Collective``: the whole array of the group, for a
reduce-scatter too; the local array for all-to-all and permute. What stands in a loop counts once per turn. A combined
collective carries the name of one of its layers only.

Beside them stand the seconds that the compiled schedule leaves exposed (``_schedule``) and what the estimate assumes:
collectives of weights and gradients hide behind compute, those of activations do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..cost import PlannedCollective
from ..profile import CollectiveKind
from ._peak import layer_of, role_of
from ._schedule import ScheduledCollective

Assumption = Literal["hidden", "exposed", "both", ""]
"""What the estimate says of a row: ``both`` where some are of each kind, empty where nobody planned any."""

_HIDDEN_CAUSES = frozenset(("weights", "gradient"))
"""What ``cost`` lets run beside compute (``cost._overlap``)."""

PAIR = 2
"""Group of a permute: programs list it as pairs, however many devices it goes round."""

BETWEEN = ""
"""Layer kind of what belongs to no layer: changes of layout between layers, and the optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShare:
    """What one layer kind contributes to a row, in the compiled program."""

    layer_kind: str
    phase: str
    """``forward``, ``recomputed``, ``backward``, ``update``, or ``other`` where the compiler left no name."""
    count: int
    bytes: int
    seconds: float
    exposed_s: float
    """Of ``seconds``, not hidden behind what the schedule issues beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRow:
    """All collectives of one kind over groups of one size, in one step on one device."""

    kind: CollectiveKind
    group_size: int
    predicted_count: int
    predicted_bytes: int
    compiled_count: int
    compiled_bytes: int
    assumed: Assumption
    shares: tuple[LayerShare, ...]
    """Of the compiled program, largest first."""

    @property
    def planned(self) -> bool:
        """Somebody predicted this kind over such groups."""
        return self.predicted_count > 0

    @property
    def seconds(self) -> float:
        """Of all compiled ones in one step, by the cost model."""
        return sum(share.seconds for share in self.shares)

    @property
    def exposed_s(self) -> float:
        """Of ``seconds``, not hidden in the compiled schedule."""
        return sum(share.exposed_s for share in self.shares)


def compare_collectives(
    compiled: Iterable[ScheduledCollective],
    predicted: Iterable[PlannedCollective],
    *,
    devices: int,
    segments: Mapping[str, str],
) -> tuple[CollectiveRow, ...]:
    """Return one row per kind and group size that either side has, most compiled bytes first.

    Args:
        compiled: Collectives of the program, in its schedule.
        predicted: Collectives of the plan.
        devices: Devices of the stage: the group of an instruction that names none.
        segments: Kind of each layer by its name.
    """
    found = [(_key(c, devices), _share(c, segments)) for c in compiled if _key(c, devices)[1] > 1]
    foreseen = [((p.kind, PAIR if p.kind == "collective-permute" else p.group), p) for p in predicted]
    keys = {key for key, _ in found} | {key for key, _ in foreseen}
    rows = [
        CollectiveRow(
            kind=kind,
            group_size=size,
            predicted_count=sum(p.count for key, p in foreseen if key == (kind, size)),
            predicted_bytes=round(sum(p.bytes for key, p in foreseen if key == (kind, size))),
            compiled_count=sum(s.count for key, s in found if key == (kind, size)),
            compiled_bytes=sum(s.bytes for key, s in found if key == (kind, size)),
            assumed=_assumption(p for key, p in foreseen if key == (kind, size)),
            shares=_merged([s for key, s in found if key == (kind, size)]),
        )
        for kind, size in keys
    ]
    return tuple(sorted(rows, key=lambda row: (-row.compiled_bytes, row.kind, row.group_size)))


def _key(scheduled: ScheduledCollective, devices: int) -> tuple[CollectiveKind, int]:
    return scheduled.collective.kind, scheduled.collective.group_size or devices


def _assumption(planned: Iterable[PlannedCollective]) -> Assumption:
    hidden = {p.cause in _HIDDEN_CAUSES for p in planned}
    return "both" if len(hidden) > 1 else "" if not hidden else "hidden" if hidden.pop() else "exposed"


def _share(scheduled: ScheduledCollective, segments: Mapping[str, str]) -> LayerShare:
    collective = scheduled.collective
    layer = layer_of(collective.op_name, set(segments))
    whole = collective.group_size if collective.kind == "reduce-scatter" else 1
    return LayerShare(
        layer_kind=segments.get(layer, BETWEEN),
        phase=role_of(collective.op_name),
        count=collective.times,
        bytes=collective.times * whole * collective.bytes,
        seconds=collective.times * scheduled.seconds,
        exposed_s=collective.times * scheduled.exposed_s,
    )


def _merged(shares: Sequence[LayerShare]) -> tuple[LayerShare, ...]:
    """Add up shares of one layer kind and phase."""
    keys = dict.fromkeys((share.layer_kind, share.phase) for share in shares)
    merged = [
        LayerShare(
            layer_kind=kind,
            phase=phase,
            count=sum(s.count for s in shares if (s.layer_kind, s.phase) == (kind, phase)),
            bytes=sum(s.bytes for s in shares if (s.layer_kind, s.phase) == (kind, phase)),
            seconds=sum(s.seconds for s in shares if (s.layer_kind, s.phase) == (kind, phase)),
            exposed_s=sum(s.exposed_s for s in shares if (s.layer_kind, s.phase) == (kind, phase)),
        )
        for kind, phase in keys
    ]
    return tuple(sorted(merged, key=lambda share: (-share.bytes, share.layer_kind, share.phase)))

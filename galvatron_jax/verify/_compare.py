"""Collectives of the compiled program beside the predicted ones.

Compared are totals per kind and group size over one step: bytes (they do not change when the compiler combines
collectives) and counts (they fall). Bytes are counted as in ``profile.Collective``: the whole array of the group, for a
reduce-scatter too; the local array for all-to-all and permute. What stands in the loop over microbatches counts once
per microbatch. A combined collective carries the name of one of its layers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..cost import PlannedCollective
from ..profile import CollectiveKind
from ._hlo import HloCollective
from ._peak import layer_of, role_of

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRow:
    """All collectives of one kind over groups of one size, in one step on one device."""

    kind: CollectiveKind
    group_size: int
    predicted_count: int
    predicted_bytes: int
    compiled_count: int
    compiled_bytes: int
    shares: tuple[LayerShare, ...]
    """Of the compiled program, largest first."""

    @property
    def planned(self) -> bool:
        """Somebody predicted this kind over such groups."""
        return self.predicted_count > 0


def compare_collectives(
    compiled: Iterable[HloCollective],
    predicted: Iterable[PlannedCollective],
    *,
    devices: int,
    microbatches: int,
    segments: Mapping[str, str],
) -> tuple[CollectiveRow, ...]:
    """Return one row per kind and group size that either side has, most compiled bytes first.

    Args:
        compiled: Collectives of the program.
        predicted: Collectives of the plan.
        devices: Devices of the stage: the group of an instruction that names none.
        microbatches: Turns of the loop.
        segments: Kind of each layer by its name.
    """
    found = [(_key(c, devices), _share(c, microbatches, segments)) for c in compiled if _key(c, devices)[1] > 1]
    foreseen = [((p.kind, p.group), p) for p in predicted]
    keys = {key for key, _ in found} | {key for key, _ in foreseen}
    rows = [
        CollectiveRow(
            kind=kind,
            group_size=size,
            predicted_count=sum(p.count for key, p in foreseen if key == (kind, size)),
            predicted_bytes=round(sum(p.bytes for key, p in foreseen if key == (kind, size))),
            compiled_count=sum(s.count for key, s in found if key == (kind, size)),
            compiled_bytes=sum(s.bytes for key, s in found if key == (kind, size)),
            shares=_merged([s for key, s in found if key == (kind, size)]),
        )
        for kind, size in keys
    ]
    return tuple(sorted(rows, key=lambda row: (-row.compiled_bytes, row.kind, row.group_size)))


def _key(collective: HloCollective, devices: int) -> tuple[CollectiveKind, int]:
    return collective.kind, collective.group_size or devices


def _share(collective: HloCollective, microbatches: int, segments: Mapping[str, str]) -> LayerShare:
    times = microbatches if collective.in_loop else 1
    layer = layer_of(collective.op_name, set(segments))
    whole = collective.group_size if collective.kind == "reduce-scatter" else 1
    return LayerShare(
        layer_kind=segments.get(layer, BETWEEN),
        phase=role_of(collective.op_name),
        count=times,
        bytes=times * whole * collective.bytes,
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
        )
        for kind, phase in keys
    ]
    return tuple(sorted(merged, key=lambda share: (-share.bytes, share.layer_kind, share.phase)))

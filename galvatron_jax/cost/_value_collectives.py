"""Moving what layers take beside the stream: tokens that the head reads again, masks, an encoder's output.

Such a value (``Boundary.value``) stands in the layout of the layer that made it, a batch leaf in that of its first
reader, and every layer under another strategy brings it from there into its own: the batch over its data-parallel
ranks, the sequence over those of Ulysses. Layers in one layout share what was brought. The cotangent of each goes the
way back.

Only inside a stage: what crosses stages comes on the wire, and what depends on the batch alone is made again there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..plan import Strategy
from ..profile import BATCH, SEQ, Boundary, LayerKind, Phase
from ._stream import RelayoutStep, StreamLayout, layout_steps


class Move(NamedTuple):
    """One collective that brings a value, or its cotangent, into another layout."""

    phase: Phase
    step: RelayoutStep
    bytes: float
    """Of the whole value."""


class StandingValues:
    """Where the values beside the stream stand, while the layers of one stage are gone through in order."""

    def __init__(self, microbatch: int) -> None:
        """``microbatch`` is the number of samples over the stage."""
        self._microbatch = microbatch
        self._made: dict[str, StreamLayout] = {}
        self._brought: set[tuple[str, StreamLayout]] = set()

    def bring(self, kind: LayerKind, strategy: Strategy) -> Iterator[Move]:
        """Yield what brings the values that the next layer takes into its layout, and their cotangents back."""
        for boundary in kind.inputs:
            if not boundary.value or boundary.stream or BATCH not in boundary.array.classes:
                continue
            after = _layout(boundary, strategy)
            before = self._made.setdefault(boundary.value, after._replace(sequence=False))
            size = boundary.array.local_bytes({**kind.classes, BATCH: self._microbatch}, {})
            if (boundary.value, after) not in self._brought:
                self._brought.add((boundary.value, after))
                yield from (Move("forward", step, size) for step in layout_steps(before, after))
            if boundary.gradient:
                yield from (Move("backward", step, size) for step in layout_steps(after, before))
        self._made.update((made.value, _layout(made, strategy)) for made in kind.outputs if made.value)


def _layout(boundary: Boundary, strategy: Strategy) -> StreamLayout:
    along = strategy.ulysses > 1 and boundary.array.classes.count(SEQ) == 1
    return StreamLayout(strategy.inner, along, strategy.dp)

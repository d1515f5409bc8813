"""From layer calls to pieces that cover the whole program.

Between two layers there may be *glue*, repeated with every layer (a scale, a counter), and *one-off* work (the
decoder's embedding, the merging of patches between two stages). Glue joins the layer before or after which it stands
every time, so that alike layers stay alike; one-off work becomes a piece of its own: ``embed`` before the first layer,
``head`` after the last one, ``bridge`` between two.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from ._flow import Flow

EMBED, BRIDGE, HEAD, WHOLE = "embed", "bridge", "head", "model"
"""Kinds of the pieces before, between, after and instead of the repeated layers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A range of equations that becomes one segment."""

    pattern: str
    """What its kind is called."""
    name: str
    first: int
    stop: int


Glue = tuple[int, ...]
"""Fingerprints of equations."""


def cover(flow: Flow, layers: Sequence[Piece]) -> list[Piece]:
    """Return pieces that cover the program, from its layers in order (one whole piece when there are none)."""
    end = len(flow.equations)
    if not layers:
        return [Piece(WHOLE, WHOLE, 0, end)] if end else []
    starts, stops = [piece.first for piece in layers], [piece.stop for piece in layers]
    for pattern in {piece.pattern for piece in layers}:
        _attach_glue(flow, layers, pattern, starts, stops)
    pieces: list[Piece] = []
    position = 0
    for number, layer in enumerate(layers):
        if starts[number] > position:
            name = BRIDGE if number else EMBED
            pieces.append(Piece(name, name, position, starts[number]))
        pieces.append(dataclasses.replace(layer, first=starts[number], stop=stops[number]))
        position = stops[number]
    return [*pieces, Piece(HEAD, HEAD, position, end)] if position < end else pieces


def _attach_glue(flow: Flow, layers: Sequence[Piece], pattern: str, starts: list[int], stops: list[int]) -> None:
    """Move the edges of the layers of ``pattern`` over the glue that stands before (or after) them every time."""
    edges = [0, *(edge for piece in layers for edge in (piece.first, piece.stop)), len(flow.equations)]
    gaps = list(zip(edges[::2], edges[1::2], strict=True))
    members = [number for number, piece in enumerate(layers) if piece.pattern == pattern]
    inner = Counter(tuple(flow.keys[slice(*gaps[number])]) for number in members if number)
    glue = min(inner, key=lambda g: (-inner[g], len(g)), default=())
    if not glue:
        return
    before = [number for number in members if _keys(flow, gaps[number])[-len(glue) :] == glue]
    after = [number for number in members if _keys(flow, gaps[number + 1])[: len(glue)] == glue]
    if len(before) >= len(after):
        for number in before:
            starts[number] = max(layers[number].first - len(glue), stops[number - 1] if number else 0)
    else:
        for number in after:
            following = starts[number + 1] if number + 1 < len(layers) else len(flow.equations)
            stops[number] = min(layers[number].stop + len(glue), following)


def _keys(flow: Flow, gap: tuple[int, int]) -> Glue:
    return tuple(flow.keys[slice(*gap)])

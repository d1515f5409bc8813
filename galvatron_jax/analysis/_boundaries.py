"""Classify what crosses the edges of layers: the stream, what is forwarded beside it, what every stage makes again.

    stream       made by the layer before, for every layer of the kind: it flows from layer to layer
    gradient     it depends on a parameter, so its cotangent flows back (an encoder's output, a relative bias)
    recomputed   it depends on the batch, constants, counters and random keys alone (a mask, positions, a rotary table)

A value that is none of these (statistics, a value behind ``stop_gradient``) is forwarded without a cotangent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import msgspec

from ..profile import Boundary, LayerKind
from ._cut import Cut, Segment
from ._flatten import Variable
from ._flow import remade_values, trained_values

Test = Callable[[Variable], bool]


@dataclasses.dataclass(frozen=True)
class Crossings:
    """The values of a cut program, by what they depend on and where they flow."""

    trained: set[Variable]
    remade: set[Variable]
    stream: set[Variable]
    names: dict[Variable, str]
    """Of batch leaves, and of what segments make."""

    def classify(self, kind: LayerKind, segments: Sequence[Segment], parameters: set[Variable]) -> LayerKind:
        """Return ``kind`` with its boundaries classified.

        Args:
            kind: A layer kind.
            segments: All segments of it.
            parameters: Trained inputs of the program, which are no boundaries.
        """
        first = segments[0]
        data = [i for i, variable in enumerate(first.inputs) if variable not in parameters]
        return msgspec.structs.replace(
            kind,
            inputs=tuple(
                self._described(boundary, [s.inputs[i] for s in segments])
                for boundary, i in zip(kind.inputs, data, strict=True)
            ),
            outputs=tuple(
                self._described(boundary, [s.outputs[o] for s in segments]) for o, boundary in enumerate(kind.outputs)
            ),
        )

    def _described(self, boundary: Boundary, variables: Sequence[Variable]) -> Boundary:
        """Describe the value at one place, over all layers of the kind."""
        stream = any(v in self.stream for v in variables)
        return msgspec.structs.replace(
            boundary,
            gradient=any(v in self.trained for v in variables),
            stream=stream,
            recomputed=all(v in self.remade for v in variables),
            value=self.names.get(variables[0], "") if len(set(variables)) == 1 and not stream else "",
        )


def find_crossings(cut: Cut, batch: int) -> Crossings:
    """Return how the values of ``cut`` flow; ``batch`` is how many of its last inputs are batch leaves."""
    source = cut.source
    data = source.inputs[source.weights :]
    split = len(data) - batch
    trained = trained_values(source, source.inputs[: source.weights])
    remade = remade_values(source, data[split:], data[:split])
    names = {variable: f"batch.{i}" for i, variable in enumerate(data[split:])}
    names |= {v: f"{segment.name}.{o}" for segment in cut.segments for o, v in enumerate(segment.outputs)}
    return Crossings(trained, remade, _stream(cut, trained), names)


def _stream(cut: Cut, trained: set[Variable]) -> set[Variable]:
    """Trained values that, at their place, come from the layer before in all layers of the kind but the first one."""
    kinds: dict[str, list[int]] = {}
    for position, segment in enumerate(cut.segments):
        kinds.setdefault(segment.kind, []).append(position)
    found: set[Variable] = set()
    for positions in kinds.values():
        later = [p for p in positions if p > 0]
        for place in range(len(cut.segments[positions[0]].inputs)):
            values = [cut.segments[p].inputs[place] for p in later]
            if values and all(v in cut.segments[p - 1].outputs for v, p in zip(values, later, strict=True)):
                found.update(v for v in values if v in trained)
    return found

"""What is alive during the backward pass of one layer, as XLA:GPU schedules and fuses it.

The pass is a list of *events*, each of which writes values to memory:

* kernels (matrix products, lookups, sorts, loops); a product that is only read in a narrower dtype is written in it;
* values that loop fusion writes: operands of kernels, results of reductions. They are made from the written values
  before them; everything between stays in registers. Those made from the same kept value are one fused kernel with
  several results: a slice of the stack of residuals is read once.

Order: what the remat policy computes again, then the pullback; among events that could run, the one with the longest
way to the end first (a latency-hiding scheduler works along the critical path). So gradients of weights, which nothing
waits for, come last, and what they read waits for them.

Alive at an event: its operands and results, and whatever was written before and is still to be read. What the forward
pass kept, inputs, cotangents of outputs and gradients of parameters are counted elsewhere (``cost._memory``).
Compared with compiled programs in docs/design/0055.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from ..strategy import Remat
from ..units import ITEM_BYTES
from ._dimensions import Op, Value
from ._fusion import Fusion, is_kernel, unique
from ._layer import Layer, phase_of
from ._primitives import PRODUCTS, REDUCTIONS, VIEWS


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """What is alive at one event."""

    values: list[Value]
    parameters: list[int]
    """Positions of the parameters that are read now or later."""


@dataclasses.dataclass(eq=False, slots=True)
class _Event:
    reads: list[Value]
    writes: list[Value]
    fused: bool
    height: int = 0
    """Kernels on the longest way from here to the end of the pass."""


class Backward:
    """The backward pass of a layer under one remat policy."""

    def __init__(self, layer: Layer, fusion: Fusion, kept: Iterable[Value], remat: Remat) -> None:
        """Lay out the events of the pass.

        Args:
            layer: The layer.
            fusion: Its fusion analysis.
            kept: What the forward pass keeps under ``remat``.
            remat: The policy.
        """
        self._layer, self._fusion = layer, fusion
        self._parameters = {id(layer.inputs[index]): n for n, index in enumerate(layer.parameters)}
        self._kept = {id(fusion.source(v)) for v in kept}
        self._given = self._kept | {id(fusion.source(v)) for v in layer.dimensions.inputs}
        gradients = (layer.gradients[i] for i in layer.parameters if i in layer.gradients)
        self._results = {id(fusion.source(v)) for v in layer.gradients.values()}
        self._weight_gradients = {id(fusion.source(v)) for v in gradients}
        self._ops = [
            op
            for op in layer.ops
            if op.name not in VIEWS and (phase_of(op) == "backward" or remat in layer.recomputed_by(op))
        ]
        self._maker = {id(v): op for op in self._ops for v in op.outputs}
        self._epilogue = self._epilogues()
        self._written = self._written_values()
        self._order = self._schedule(self._events())

    # ------------------------------------------------------------------------------------------------------- answers
    def moments(self) -> list[Moment]:
        """Return what is alive at every event."""
        events, last = self._order, self._last_reads()
        alive: dict[int, Value] = {}
        found = []
        for n, event in enumerate(events):
            alive.update((id(v), v) for v in event.writes if self._counts(v))
            weights = [position for key, position in self._parameters.items() if last.get(key, -1) >= n]
            found.append(Moment(list(alive.values()), weights))
            alive = {key: value for key, value in alive.items() if last.get(key, -1) > n}
        return found

    def waiting(self) -> list[Value]:
        """Return what is alive when only gradients of weights are left to compute: their operands."""
        rest = [event for event in self._order if self._is_last(event)]
        done = {id(v) for event in self._order if not self._is_last(event) for v in event.writes}
        return [v for v in unique(v for event in rest for v in event.reads) if id(v) in done and self._counts(v)]

    def _counts(self, value: Value) -> bool:
        made = bool(value.shape) and id(value) not in self._results and id(value) not in self._given
        return made and self._fusion.depends_on_data(value)

    # -------------------------------------------------------------------------------------------------------- events
    def _source(self, value: Value) -> Value:
        source = self._fusion.source(value)
        return self._epilogue.get(id(source), source)

    def _epilogues(self) -> dict[int, Value]:
        """Products that are only read in a narrower dtype: they are written in it."""
        found = {}
        for op in self._ops:
            readers = [r for v in op.outputs for r in self._fusion.readers.get(id(v), ()) if r.name not in VIEWS]
            if op.name in PRODUCTS and len(readers) == 1 and readers[0].name == "convert_element_type":
                (wide,), (narrow,) = op.outputs, readers[0].outputs
                if ITEM_BYTES[narrow.dtype] < ITEM_BYTES[wide.dtype]:
                    found[id(wide)] = narrow
        return found

    def _written_values(self) -> dict[int, Value]:
        found: dict[int, Value] = {}
        for op in self._ops:
            values = [*op.inputs, *op.outputs] if is_kernel(op) else op.outputs if op.name in REDUCTIONS else []
            found.update((id(v), v) for v in map(self._source, values))
        found.update((key, v) for key, v in ((id(v), v) for v in map(self._source, self._layer.gradients.values())))
        return found

    def _events(self) -> list[_Event]:
        merged = {id(v) for v in self._epilogue.values()}
        events = []
        for op in self._ops:
            if is_kernel(op):
                reads = [self._source(v) for v in op.inputs]
                events.append(_Event(unique(reads), [self._source(v) for v in op.outputs], fused=False))
            else:
                writes = [v for v in op.outputs if id(v) in self._written and id(v) not in merged]
                if writes:
                    events.append(_Event(self._read_by(op), writes, fused=True))
        return events

    def _read_by(self, op: Op) -> list[Value]:
        """Written values from which a fusible operation's result is made."""
        found: dict[int, Value] = {}
        queue, seen = [self._source(v) for v in op.inputs], set[int]()
        while queue:
            value = queue.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            maker = self._maker.get(id(value))
            if id(value) in self._written or id(value) in self._given or maker is None:
                found[id(value)] = value
            else:
                queue += [self._source(v) for v in maker.inputs]
        return list(found.values())

    # ------------------------------------------------------------------------------------------------------ schedule
    def _schedule(self, events: list[_Event]) -> list[_Event]:
        """Order the events: longest way to the end first, and siblings that read one kept value together."""
        makers = {id(v): event for event in events for v in event.writes}
        for event in reversed(events):  # events are in trace order: readers come after makers
            for value in event.reads:
                maker = makers.get(id(value))
                if maker is not None:
                    maker.height = max(maker.height, event.height + (not event.fused))
        done: set[int] = set()
        rest, order = list(events), list[_Event]()
        while rest:
            ready = [e for e in rest if all(id(v) in done or id(v) not in makers for v in e.reads)]
            chosen = max(ready, key=lambda e: e.height)
            together = [chosen, *(e for e in ready if e is not chosen and self._are_siblings(chosen, e))]
            reads, writes = (unique(v for e in together for v in part(e)) for part in (_reads, _writes))
            order.append(_Event(reads, writes, chosen.fused, chosen.height))
            done.update(id(v) for v in writes)
            rest = [e for e in rest if not any(e is one for one in together)]
        return order

    def _are_siblings(self, left: _Event, right: _Event) -> bool:
        if not (left.fused and right.fused):
            return False
        shared = {id(v) for v in left.reads} & {id(v) for v in right.reads} & self._kept
        return any(len(v.shape) > 1 for v in left.reads if id(v) in shared)

    def _is_last(self, event: _Event) -> bool:
        """Tell whether nothing but gradients of weights follows from an event."""
        return event.height == 0 and all(
            id(v) in self._weight_gradients or not self._is_result(v) for v in event.writes
        )

    def _is_result(self, value: Value) -> bool:
        return id(value) in self._results

    def _last_reads(self) -> dict[int, int]:
        return {id(v): n for n, event in enumerate(self._order) for v in self._leaves(event)}

    def _leaves(self, event: _Event) -> Iterator[Value]:
        """What an event reads, and for a parameter that is cast first the parameter itself."""
        for value in event.reads:
            yield value
            yield from self._cast_from(value)

    def _cast_from(self, value: Value) -> Sequence[Value]:
        op = self._fusion.maker.get(id(value))
        if op is None or op.name != "convert_element_type":
            return ()
        return [v for v in map(self._fusion.source, op.inputs) if id(v) in self._parameters]


def _reads(event: _Event) -> list[Value]:
    return event.reads


def _writes(event: _Event) -> list[Value]:
    return event.writes

"""Which collectives a plan's gradient program runs: what the prices are made of, to hold against a compiled program.

Listed for one microbatch's forward and backward pass, layer by layer:

    tensor     of the trailing mesh axes (``_work``): tensor parallelism, with keys and values copied where tp exceeds
               the kv heads, or Ulysses; a recomputed forward pass runs some of them again
    data       of sharding the batch over the dp ranks, parameter gradients left out (the mean of the loss)
    weights    zero 3 gathers the parameters that its ranks divide, in forward and, those that the backward pass reads
               (``Parameter.reread``), in backward, in the compute dtype; what several layers read comes from the layer
               that keeps it (``_keepers``), once in forward if nobody casts it
    gradient   reductions of parameter gradients (``_gradient_collectives``); with several microbatches some of them run
               *once* a step
    relayout   between neighbours of a stage (``_stream.relayout_steps``), and between its ends and the wire to other
               stages (``_stream.wire_layout``; listed with the layer at that end); and of what layers take beside the
               stream (``_value_collectives``); backward takes the way back

A partitioner may spell a reduce-scatter as an all-reduce of the same bytes and a slice (XLA:CPU always does, XLA:GPU
where it does not recognise the pair), so all-reduce and reduce-scatter are comparable in sum. Not listed: what crosses
stages, the optimizer's own (the global norm for clipping), and the gather of updated parameters under zero 1 and 2.
What moves a shared parameter is listed with the layer that uses it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from ..plan import Plan, Strategy, check_plan
from ..profile import BATCH, CollectiveKind, LayerKind, ModelProfile, Parameter, Phase
from ._gradient_collectives import gradient_reductions, is_deferred
from ._keepers import Gather, Reading, read_parameters
from ._stream import relayout_steps, stream_arrays, wire_layout
from ._value_collectives import StandingValues
from ._values import Shares
from ._work import SpreadCollective, data_collectives, inner_collectives, runs_again

Cause = Literal["tensor", "data", "weights", "gradient", "relayout"]

_Moved = tuple[int, bool]
"""A value that was gathered: who keeps it (``Held``, by identity), and whether tensor shards were."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCollective:
    """One or several equal collectives of one layer, as one device takes part in them."""

    kind: CollectiveKind
    cause: Cause
    phase: Phase
    layer: int
    """Position of the layer in the plan, from 0; of a relayout, the layer that takes the stream."""
    layer_kind: str
    group: int
    """Devices that take part in one of them."""
    count: int
    """How many there are (compilers combine some)."""
    bytes: float
    """Of all of them: the whole array of a group (result of all-reduce and all-gather, operand of reduce-scatter), or
    the local array of all-to-all and collective-permute."""
    once: bool = False
    """It runs once a step, not in every microbatch."""


def plan_collectives(
    plan: Plan, model: ModelProfile, *, sums_before_reducing: bool = False
) -> tuple[PlannedCollective, ...]:
    """Return the collectives of one microbatch's forward and backward pass, layer by layer.

    Args:
        plan: The plan.
        model: The profile of its model, at the plan's sequence length.
        sums_before_reducing: The compiler merges all-reduces whose results are only added up (XLA:GPU does, XLA:CPU
            does not; ``HardwareProfile.sums_before_reducing``).

    Raises:
        PlanError: the plan contradicts itself or the model.
    """
    check_plan(plan, model)
    found: list[PlannedCollective] = []
    position, shared_out = 0, 2 if plan.microbatches > 1 and len(plan.stages) > 1 else 1
    for s, stage in enumerate(plan.stages):
        wire = wire_layout(plan.cluster, stage.devices, plan.microbatch_size)
        before = wire if s else None
        moved, beside = set[_Moved](), StandingValues(plan.microbatch_size)
        layers = [(model.kind(name), strategy) for name, strategy in stage.layers()]
        for (kind, strategy), readings in zip(layers, read_parameters(layers, shared_out=shared_out), strict=True):
            layer = _PlannedLayer.of(plan, position, kind, strategy)
            found += layer.relayout(before) if before else ()
            found += layer.moves(beside)
            found += layer.activations(merged=sums_before_reducing)
            found += layer.gathers(readings, moved)
            found += layer.reductions(readings, merged=sums_before_reducing)
            before, position = strategy, position + 1
        if before and s + 1 < len(plan.stages):
            taker = model.kind(plan.stages[s + 1].runs[0].kind)
            end = _PlannedLayer.of(plan, position - 1, taker, wire)
            found += end.relayout(before)
    return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class _PlannedLayer:
    """One layer of a plan."""

    position: int
    kind: LayerKind
    strategy: Strategy
    microbatch: int
    accumulates: bool
    """Gradients of several microbatches are summed up."""

    @classmethod
    def of(cls, plan: Plan, position: int, kind: LayerKind, strategy: Strategy) -> _PlannedLayer:
        """Return the layer at a position of ``plan``."""
        return cls(position, kind, strategy, plan.microbatch_size, plan.microbatches > 1)

    def relayout(self, before: Strategy) -> Iterator[PlannedCollective]:
        """Yield what brings the stream from the layer before, and its cotangent back."""
        ways: tuple[tuple[Phase, Strategy, Strategy], ...] = (
            ("forward", before, self.strategy),
            ("backward", self.strategy, before),
        )
        size_bytes = sum(array.local_bytes(self._sizes(), {}) for array in stream_arrays(self.kind) if array.classes)
        for phase, start, end in ways:
            for step in relayout_steps(start, end):
                yield self._planned(step.kind, "relayout", phase, step.ranks, size_bytes / step.parts)

    def moves(self, beside: StandingValues) -> Iterator[PlannedCollective]:
        """Yield what brings values beside the stream into the layer's layout, and their cotangents back."""
        for move in beside.bring(self.kind, self.strategy):
            step = move.step
            yield self._planned(step.kind, "relayout", move.phase, step.ranks, move.bytes / step.parts)

    def activations(self, *, merged: bool) -> Iterator[PlannedCollective]:
        """Yield the collectives of sharding the tensor classes (or the sequence) and the batch."""
        yield from self._of_passes(inner_collectives(self.kind, self.strategy), "tensor", merged)
        deferred = is_deferred(self.strategy, accumulates=self.accumulates)
        data = (c for c in data_collectives(self.kind, self.strategy) if not (deferred and c.collective.gradient))
        yield from self._of_passes(data, "data", merged)

    def gathers(self, readings: Iterable[Reading], moved: set[_Moved]) -> Iterator[PlannedCollective]:
        """Yield the gathers of parameters.

        Args:
            readings: The layer's parameters.
            moved: What earlier layers gathered in forward; what this one does is added.
        """
        ways: tuple[tuple[Phase, Callable[[Reading, Gather], bool]], ...] = (
            ("forward", lambda reading, gather: _is_fresh(reading, gather, moved)),
            ("backward", lambda reading, _: self._is_reread(reading.own.parameter)),
        )
        for phase, counts in ways:
            sizes = defaultdict[int, float](float)
            for reading in readings:
                for gather in reading.gathers:
                    sizes[gather.ranks] += gather.bytes if counts(reading, gather) else 0.0
            for ranks, size_bytes in sizes.items():
                if size_bytes:
                    yield self._planned("all-gather", "weights", phase, ranks, size_bytes)

    def reductions(self, readings: Iterable[Reading], *, merged: bool) -> Iterator[PlannedCollective]:
        """Yield the reductions of parameter gradients; ``merged``: partial results are added up before."""
        found = gradient_reductions(
            self.kind, self.strategy, self.microbatch, readings, accumulates=self.accumulates, merged=merged
        )
        for r in (r for r in found if r.group > 1):
            yield dataclasses.replace(self._planned(r.kind, "gradient", "backward", r.group, r.bytes), once=r.once)

    def _is_reread(self, parameter: Parameter) -> bool:
        """Tell whether the backward pass reads a parameter."""
        strategy, ulysses = self.strategy, self.kind.ulysses
        kept = ulysses.unread if ulysses and strategy.ulysses > 1 and strategy.remat == "none" else ()
        return strategy.remat in parameter.reread and parameter.path not in kept

    def _of_passes(
        self, collectives: Iterable[SpreadCollective], cause: Cause, merged: bool
    ) -> Iterator[PlannedCollective]:
        """Yield predicted collectives, and those of a recomputed forward pass again in backward."""
        shares = Shares.of(self.kind, self.strategy, self.microbatch)
        for spread in collectives:
            count, collective = spread.number(merged=merged), spread.collective
            if not count:
                continue
            size_bytes = count * spread.size_bytes(self.kind, shares)
            yield self._planned(collective.kind, cause, collective.phase, spread.ranks, size_bytes, count)
            if runs_again(collective, self.strategy.remat):
                yield self._planned(collective.kind, cause, "backward", spread.ranks, size_bytes, count)

    def _sizes(self) -> dict[str, int]:
        return {**self.kind.classes, BATCH: self.microbatch}

    def _planned(
        self, kind: CollectiveKind, cause: Cause, phase: Phase, group: int, size_bytes: float, count: int = 1
    ) -> PlannedCollective:
        return PlannedCollective(
            kind=kind,
            cause=cause,
            phase=phase,
            layer=self.position,
            layer_kind=self.kind.name,
            group=group,
            count=count,
            bytes=size_bytes,
        )


def _is_fresh(reading: Reading, gather: Gather, moved: set[_Moved]) -> bool:
    """Tell whether no layer before gathered the same in forward: a value is moved once for all its readers.

    Each layer's cast of a parameter, or gathered copy, is a value of its own: the compiler merges the casts, but not
    the gathers behind them.
    """
    parameter = reading.own.parameter
    value = (id(reading.keeper), gather.is_whole)
    is_second = gather != reading.gathers[0]
    if parameter.compute_dtype != parameter.dtype or is_second:
        return True
    is_fresh = value not in moved
    moved.add(value)
    return is_fresh

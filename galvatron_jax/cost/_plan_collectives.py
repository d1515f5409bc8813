"""Which collectives a plan's gradient program runs: what the prices are made of, to hold against a compiled program.

Listed for one microbatch's forward and backward pass, layer by layer:

    tensor     of sharding the candidate's classes over the tp ranks; a recomputed forward pass runs some of them again
    data       of sharding the batch over the dp ranks, parameter gradients left out (the mean of the loss)
    weights    zero 3 gathers the parameters that dp divides, in forward and in backward, in the compute dtype
    gradient   zero 0 all-reduces all gradients over dp; otherwise those that dp divides are reduce-scattered
    relayout   between neighbours of a stage (``_stream.relayout_steps``); backward takes the way back

A partitioner may spell a reduce-scatter as an all-reduce of the same bytes and a slice (XLA:CPU always does, XLA:GPU
where it does not recognise the pair), so all-reduce and reduce-scatter are comparable in sum. Not listed: what crosses
stages, the optimizer's own (the global norm for clipping), and the gather of updated parameters under zero 1 and 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

from ..plan import Plan, Strategy, check_plan
from ..profile import BATCH, Collective, CollectiveKind, LayerKind, ModelProfile, Phase
from ._kind import weigh
from ._stream import relayout_steps, stream_arrays
from ._work import tensor_collectives

Cause = Literal["tensor", "data", "weights", "gradient", "relayout"]


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
    position = 0
    for stage in plan.stages:
        before: Strategy | None = None
        for name, strategy in stage.layers():
            layer = _PlannedLayer(position, model.kind(name), strategy, plan.microbatch_size)
            found += layer.relayout(before) if before else ()
            found += layer.activations(merged=sums_before_reducing)
            found += layer.weights()
            before, position = strategy, position + 1
    return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class _PlannedLayer:
    """One layer of a plan."""

    position: int
    kind: LayerKind
    strategy: Strategy
    microbatch: int

    def relayout(self, before: Strategy) -> Iterator[PlannedCollective]:
        """Yield what brings the stream from the layer before, and its cotangent back."""
        ways: tuple[tuple[Phase, Strategy, Strategy], ...] = (
            ("forward", before, self.strategy),
            ("backward", self.strategy, before),
        )
        size_bytes = sum(array.local_bytes(self._sizes(), {}) for array in stream_arrays(self.kind))
        for phase, start, end in ways:
            for step in relayout_steps(start, end):
                yield self._planned(step.kind, "relayout", phase, step.ranks, size_bytes / step.parts)

    def activations(self, *, merged: bool) -> Iterator[PlannedCollective]:
        """Yield the collectives of sharding the tensor classes and the batch."""
        yield from self._of_passes(tensor_collectives(self.kind, self.strategy.sp), "tensor", self.strategy.tp, merged)
        yield from self._of_passes(self.kind.data, "data", self.strategy.dp, merged)

    def weights(self) -> Iterator[PlannedCollective]:
        """Yield the gathers of parameters and the reductions of their gradients."""
        dp, zero = self.strategy.dp, self.strategy.zero
        if dp == 1 or not self.kind.parameters:
            return
        weights = weigh(self.kind, self.strategy.tp, dp)
        divided, whole = weights.divided.computed, weights.whole.computed
        if zero >= 3 and divided:
            yield self._planned("all-gather", "weights", "forward", dp, divided)
            yield self._planned("all-gather", "weights", "backward", dp, divided)
        if zero and divided:
            yield self._planned("reduce-scatter", "gradient", "backward", dp, divided)
        if rest := whole if zero else divided + whole:
            yield self._planned("all-reduce", "gradient", "backward", dp, rest)

    def _of_passes(
        self, collectives: Iterable[Collective], cause: Cause, group: int, merged: bool
    ) -> Iterator[PlannedCollective]:
        """Yield predicted collectives, and those of a recomputed forward pass again in backward."""
        if group == 1:
            return
        for collective in collectives:
            count = collective.merged_count if merged else collective.array.count
            if not count:
                continue
            one = collective.array.local_bytes(self._sizes(), {BATCH: self.strategy.dp}) / collective.array.count
            yield self._planned(collective.kind, cause, collective.phase, group, count * one, count)
            if self.strategy.remat == "full" and collective.recomputed:
                yield self._planned(collective.kind, cause, "backward", group, count * one, count)

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

"""The whole model under a one-stage plan, as a pure function of flat leaves; and where each leaf lives.

Between two layers the stream is put into the layout of the next layer. Where an axis leaves the sequence for the batch
while another one is dropped, an intermediate layout stands between (one step would make XLA rematerialise the whole
array, "involuntary full rematerialization").
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import Analysis, Variable
from ..plan import Plan, Strategy
from ._layout import LayerLayout, Role
from ._mesh import StageMesh
from ._segment import SegmentFunction, build_segment


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """An analysed model with a layout for every segment."""

    analysis: Analysis
    stage: StageMesh
    layouts: tuple[LayerLayout, ...]
    """One per segment, in order; equal (kind, strategy) share one object."""

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """Run the program: leaves of (parameters, state, batch) to (loss, leaves of the new state)."""
        program = self.analysis.cut.source
        environment: dict[Variable, Any] = dict(zip(program.inputs, leaves, strict=True))
        environment.update(program.constants)
        before: dict[Variable, LayerLayout] = {}
        for segment, layout in zip(self.analysis.cut.segments, self.layouts, strict=True):
            inputs = [self._arrive(environment[v], before.get(v), layout, i) for i, v in enumerate(segment.inputs)]
            with jax.named_scope(segment.name):  # so that compiled programs say which layer an operation is of
                results = self._functions[id(layout)](inputs)
            for variable, result, value in zip(segment.outputs, results, layout.kind.layer.outputs, strict=True):
                placed = jax.lax.with_sharding_constraint(result, layout.value(value)) if result.ndim else result
                environment[variable] = placed
                before[variable] = layout
        return [v.val if isinstance(v, Literal) else environment[v] for v in program.outputs]

    def shardings(self, role: Role) -> list[NamedSharding]:
        """Return where each parameter leaf (or its gradient, or its optimizer state) lives.

        A parameter that several segments read lives where the first of them wants it.
        """
        inputs = self.analysis.cut.source.inputs[: len(self.analysis.trace.paths)]
        places: dict[Variable, NamedSharding] = {}
        for segment, layout in zip(self.analysis.cut.segments, self.layouts, strict=True):
            for position, index in enumerate(layout.kind.layer.parameters):
                places.setdefault(segment.inputs[index], layout.stored(position, role))
        return [places.get(variable, self.stage.replicated) for variable in inputs]

    def batch_shardings(self, *, microbatched: bool) -> list[NamedSharding]:
        """Return where each batch leaf is fed: dimension 0 over the data axes of the first segment that reads it.

        Args:
            microbatched: Leaves have a leading microbatch dimension.
        """
        leaves = len(jax.tree.leaves(self.analysis.trace.batch))
        places = []
        for variable in self.analysis.cut.source.inputs[-leaves:]:
            readers = [
                layout
                for segment, layout in zip(self.analysis.cut.segments, self.layouts, strict=True)
                if variable in segment.inputs
            ]
            axes = self.stage.data_axes(readers[0].strategy) if readers and variable.aval.ndim else ()
            entry = (axes,) if axes else (None,) if variable.aval.ndim else ()
            places.append(self.stage.sharding(PartitionSpec(*([None] if microbatched else []), *entry)))
        return places

    @functools.cached_property
    def _functions(self) -> dict[int, SegmentFunction]:
        return {id(layout): build_segment(layout) for layout in self.layouts}

    def _arrive(self, value: Any, before: LayerLayout | None, layout: LayerLayout, index: int) -> Any:
        """Insert the intermediate layout where the stream's axes both move and are dropped."""
        if before is None or index in layout.kind.layer.parameters or value.ndim < 2:
            return value
        spec = _intermediate(self.stage, before.strategy, layout.strategy, value.ndim)
        stream = layout.is_stream(layout.kind.layer.inputs[index])
        return jax.lax.with_sharding_constraint(value, self.stage.sharding(spec)) if spec and stream else value


def plan_model(analysis: Analysis, plan: Plan, stage: StageMesh) -> PlannedModel:
    """Give every segment of ``analysis`` its layout under a one-stage plan."""
    known: dict[tuple[str, Strategy], LayerLayout] = {}
    layouts = []
    for segment, (_, strategy) in zip(analysis.cut.segments, plan.layers(), strict=True):
        key = (segment.kind, strategy)
        known.setdefault(key, LayerLayout(analysis.kinds[segment.kind], strategy, stage))
        layouts.append(known[key])
    return PlannedModel(analysis, stage, tuple(layouts))


def _intermediate(stage: StageMesh, before: Strategy, after: Strategy, rank: int) -> PartitionSpec | None:
    """Layout of the stream between two layouts (batch first, then sequence), or None when one step is enough."""
    sequence, batch = stage.sequence_axes(before), stage.data_axes(after)
    moved = [axis for axis in sequence if axis in batch]
    left = tuple(axis for axis in sequence if axis not in batch)
    dropped = set(left) - set(stage.sequence_axes(after))
    if not moved or not dropped:
        return None
    return PartitionSpec(batch, left, *[None] * (rank - 2))

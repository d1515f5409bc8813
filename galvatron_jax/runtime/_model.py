"""The whole model under a one-stage plan, as a pure function of flat leaves; and where each leaf lives.

Between two layers the stream is put into the layout of the next layer, before rematerialisation begins: what a layer
keeps of its input is in its own layout, and no layout changes twice. Where an axis leaves the sequence for the batch
(or the way back) while another one is dropped (or joins), an intermediate layout stands between: one step would make
XLA rematerialise the whole array ("involuntary full rematerialization").
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgspec
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import Analysis, Variable
from ..plan import Plan, Strategy
from ._layout import LayerLayout, Role
from ._mesh import StageMesh
from ._order import after_gradients, has_gradient
from ._segment import SegmentFunction, build_segment, is_array


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
        for position, (segment, layout) in enumerate(zip(self.analysis.cut.segments, self.layouts, strict=True)):
            self._order_gradients(environment, position, before)
            inputs = [arrive(environment[v], before.get(v), layout, i) for i, v in enumerate(segment.inputs)]
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

    def _order_gradients(
        self, environment: dict[Variable, Any], position: int, before: Mapping[Variable, LayerLayout]
    ) -> None:
        """Let the cotangents of a layer's inputs wait for the gradients of the layer after it (see ``_order``)."""
        segments = self.analysis.cut.segments
        taken = [v for v in segments[position].inputs if v in before and has_gradient(environment[v])]
        if not taken or position + 1 == len(segments):
            return
        later, layout = segments[position + 1], self.layouts[position + 1]
        read = [later.inputs[index] for index in layout.kind.layer.parameters]
        parameters = [v for v in read if has_gradient(environment[v])]
        places = [self._gradient_places[v] for v in parameters]
        values, held = after_gradients([environment[v] for v in taken], [environment[v] for v in parameters], places)
        environment.update(zip(taken + parameters, values + held, strict=True))

    @functools.cached_property
    def _gradient_places(self) -> dict[Variable, NamedSharding]:
        parameters = self.analysis.cut.source.inputs[: len(self.analysis.trace.paths)]
        return dict(zip(parameters, self.shardings("gradient"), strict=True))

    @functools.cached_property
    def _functions(self) -> dict[int, SegmentFunction]:
        return {id(layout): build_segment(layout) for layout in self.layouts}


def plan_model(analysis: Analysis, plan: Plan, stage: StageMesh) -> PlannedModel:
    """Give every segment of ``analysis`` its layout under a one-stage plan."""
    known: dict[tuple[str, Strategy], LayerLayout] = {}
    layouts = []
    for segment, (_, strategy) in zip(analysis.cut.segments, plan.layers(), strict=True):
        key = (segment.kind, strategy)
        known.setdefault(key, LayerLayout(analysis.kinds[segment.kind], strategy, stage))
        layouts.append(known[key])
    return PlannedModel(analysis, stage, tuple(layouts))


def arrive(value: Any, before: LayerLayout | None, layout: LayerLayout, index: int) -> Any:
    """Put input ``index`` of a layer into the layer's layout; parameters stay where they are stored.

    Args:
        value: The input.
        before: Layout of the layer that made it, None when it enters from outside.
        layout: Layout of the layer that takes it.
        index: Which of its inputs.
    """
    if index in layout.kind.layer.parameters or not is_array(value):
        return value
    described = layout.kind.layer.inputs[index]
    middle = strategy_between(before.strategy, layout.strategy) if before else None
    if middle is not None and layout.is_stream(described):
        step = LayerLayout(layout.kind, middle, layout.stage)
        value = jax.lax.with_sharding_constraint(value, step.value(described))
    return jax.lax.with_sharding_constraint(value, layout.value(described))


def strategy_between(before: Strategy, after: Strategy) -> Strategy | None:
    """Return the strategy in whose layout the stream stands between two others, None when one step is enough.

    Only a change between ``tp`` with sequence parallelism and a smaller one without needs two: an all-to-all between
    sequence and batch, and a gather (or, the way back, a slice) of the sequence.
    """
    narrow, wide = sorted((before, after), key=lambda strategy: strategy.tp)
    if wide.sp and not narrow.sp and 1 < narrow.tp < wide.tp:
        return msgspec.structs.replace(narrow, sp=True)
    return None

"""A stage's share of the model under its plan, as a pure function of arrays; and where each array lives.

This is what every program of the runtime is built from: the one-stage train step and the programs of a pipeline. A
stage is a contiguous range of the cut program's segments on its own mesh; a one-stage plan is the range of all.

    stage = plan_stages(analysis, plan, meshes)[k]

    run         (parameters, state, batch, arriving) -> (leaving, loss or None, state)       pure, differentiable
    parameters  one stored array per ``stage.slots`` entry: a leaf of the user's tree, or the same leaf of a run of
                layers stacked. A leaf that several stages hold (tied) is a slot of its own on each; the sum of their
                gradients is its gradient.
    state       the model-state leaves ``stage.share.state``
    batch       the leaves ``stage.share.batch`` of one microbatch
    arriving    the values ``stage.share.arriving`` on the wire (``arriving_shardings``); ``leaving`` likewise, equal in
                order, shape, dtype and spec to ``arriving`` of the stage after. Those without ``Crossing.gradient``
                have no cotangent.

``vjp`` of ``run`` with respect to (parameters, arriving values with a gradient) is the backward pass.

Between two layers the stream is put into the layout of the next layer (``_relayout``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import Variable, run_equation
from ._copies import Copies, copyable, unreduced_axes
from ._layout import LayerLayout, Role
from ._mesh import Axes, StageMesh
from ._order import after_gradients, has_gradient, place_gradients
from ._relayout import arrive
from ._runs import Run, find_runs
from ._segment import Reduction, SegmentFunction, build_segment
from ._share import Crossing, StageShare, program_leaves
from ._slots import Slot, make_slots
from ._wire import wire_spec

Environment = dict[Variable, Any]


class StageResults(NamedTuple):
    """What a stage computes from one microbatch."""

    leaving: list[Any]
    """The values ``share.leaving``, on the wire."""
    loss: Any
    """The loss, a scalar in the user's dtype; None on all stages but the last."""
    state: list[Any]
    """New values of the model-state leaves ``share.state``."""


@dataclasses.dataclass(frozen=True)
class StageModel:
    """One stage's share of an analysed model, with a layout for every segment (see the module docstring)."""

    share: StageShare
    mesh: StageMesh
    layouts: tuple[LayerLayout, ...]
    """One per segment of the share, in order; equal (kind, strategy) share one object."""
    gradient_role: Role = "gradient"
    """Where gradients are put as they are made: a step that updates at once puts them where the optimizer is."""
    reduces_in_float32: bool = False
    """Gradients are reduced over data-parallel ranks in the parameters' storage dtype, not in the compute dtype."""
    is_copied: bool = False
    """Parameters come as ``spread`` makes them, with a copy per data-parallel rank where that spares reductions."""

    # ------------------------------------------------------------------------------------------------------- running
    def run(
        self, parameters: Sequence[Any], state: Sequence[Any], batch: Sequence[Any], arriving: Sequence[Any] = ()
    ) -> StageResults:
        """Run the stage on one microbatch; see the module docstring for the arguments."""
        environment, stacked = self._environment(parameters, state, batch, arriving)
        before: dict[Variable, LayerLayout] = {}
        for number, run in enumerate(self.runs):
            if run.is_scanned:
                self._scan(run, environment, stacked, before)
            else:
                self._order_gradients(environment, number, before)
                self._run_segment(run, environment, before)
        program = self.share.analysis.cut.source
        leaving = [self._to_wire(environment[c.variable], c) for c in self.share.leaving]
        loss = _read(environment, program.outputs[0]) if self.share.makes_loss else None
        return StageResults(leaving, loss, [_read(environment, program.outputs[1 + i]) for i in self.share.state])

    def _environment(
        self, parameters: Sequence[Any], state: Sequence[Any], batch: Sequence[Any], arriving: Sequence[Any]
    ) -> tuple[Environment, dict[int, Any]]:
        """Return what is known before the first segment runs, and the stacked parameters by their first leaf."""
        share, leaves = self.share, program_leaves(self.share.analysis)
        environment: Environment = dict(share.analysis.cut.source.constants)
        stacked: dict[int, Any] = {}
        for slot, array in zip(self.slots, parameters, strict=True):
            if slot.is_stacked:
                stacked[slot.leaves[0]] = array
            else:
                environment[leaves.parameters[slot.leaves[0]]] = array
        environment.update(zip([leaves.state[i] for i in share.state], state, strict=True))
        environment.update(zip([leaves.batch[i] for i in share.batch], batch, strict=True))
        environment.update(zip([c.variable for c in share.arriving], arriving, strict=True))
        for equation in share.remade:
            results = run_equation(equation.eqn, [_read(environment, v) for v in equation.inputs])
            environment.update(zip(equation.outputs, results, strict=True))
        return environment, stacked

    def _run_segment(self, run: Run, environment: Environment, before: dict[Variable, LayerLayout]) -> None:
        (segment,), layout = run.segments, run.layout
        inputs = [arrive(environment[v], before.get(v), layout, i) for i, v in enumerate(segment.inputs)]
        with jax.named_scope(segment.name):  # so that compiled programs say which layer an operation is of
            results = self._function(run)(inputs)
        for variable, result, value in zip(segment.outputs, results, layout.kind.layer.outputs, strict=True):
            environment[variable] = _placed(result, layout.value(value))
            before[variable] = layout

    def _scan(
        self,
        run: Run,
        environment: Environment,
        stacked: dict[int, Any],
        before: dict[Variable, LayerLayout],
    ) -> None:
        """Run a loop over the layers of ``run``; named after its first layer."""
        layout, head, last = run.layout, run.segments[0], run.segments[-1]
        leaf_of = {v: i for i, v in enumerate(program_leaves(self.share.analysis).parameters)}
        weights, carried, each = run.inputs_of("stacked"), run.inputs_of("carried"), run.inputs_of("each")
        start = [arrive(environment[head.inputs[i]], before.get(head.inputs[i]), layout, i) for i in carried]
        shared = {
            i: arrive(environment[head.inputs[i]], before.get(head.inputs[i]), layout, i)
            for i in run.inputs_of("shared")
        }
        rows = {i: stacked[leaf_of[head.inputs[i]]] for i in weights}
        rows |= {i: jnp.stack([environment[segment.inputs[i]] for segment in run.segments]) for i in each}
        escaping = run.escaping(self._read_outside(run))
        places = [self._row_place(run, layout.kind.layer.parameters.index(i)) for i in weights]
        function = self._function(run)

        def layer(carry: list[Any], row: dict[int, Any]) -> tuple[list[Any], list[Any]]:
            # Pinned here too: else the compiler lays out what is carried as the layers around the loop have it.
            carry = [arrive(value, layout, layout, i) for i, value in zip(carried, carry, strict=True)]
            placed = place_gradients([row[i] for i in weights], places)
            own = {i: arrive(row[i], before.get(head.inputs[i]), layout, i) for i in each}
            known = {
                **shared,
                **own,
                **dict(zip(weights, placed, strict=True)),
                **dict(zip(carried, carry, strict=True)),
            }
            results = function([known[i] for i in range(len(head.inputs))])
            results = [_placed(r, layout.value(v)) for r, v in zip(results, layout.kind.layer.outputs, strict=True)]
            return [results[run.feeds[i].output] for i in carried], [results[o] for o in escaping]

        with jax.named_scope(head.name):
            final, collected = jax.lax.scan(layer, start, rows)
        for o, column in zip(escaping, collected, strict=True):
            environment.update((segment.outputs[o], column[row]) for row, segment in enumerate(run.segments))
        for i, value in zip(carried, final, strict=True):
            environment[last.outputs[run.feeds[i].output]] = arrive(value, layout, layout, i)
        before.update((variable, layout) for segment in run.segments for variable in segment.outputs)

    def _order_gradients(self, environment: Environment, number: int, before: dict[Variable, LayerLayout]) -> None:
        """Let the cotangents of a segment's inputs wait for the gradients of the one after it (see ``_order``).

        A loop needs none of this: its gradients are finished when it is.
        """
        if number + 1 == len(self.runs) or self.runs[number + 1].is_scanned:
            return
        (segment,), (later,), layout = (
            self.runs[number].segments,
            self.runs[number + 1].segments,
            self.runs[number + 1].layout,
        )
        taken = [v for v in segment.inputs if v in before and has_gradient(environment[v])]
        read = [later.inputs[index] for index in layout.kind.layer.parameters]
        parameters = [v for v in read if has_gradient(environment[v])]
        if not taken:
            return
        places = [self._gradient_places[v] for v in parameters]
        values, held = after_gradients([environment[v] for v in taken], [environment[v] for v in parameters], places)
        environment.update(zip(taken + parameters, values + held, strict=True))

    # -------------------------------------------------------------------------------------------------------- places
    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The stored parameter arrays, in order."""
        variables = program_leaves(self.share.analysis).parameters
        return make_slots(self.mesh, self.runs, self.share.parameters, variables)

    def parameter_shardings(self, role: Role) -> list[NamedSharding]:
        """Return where each stored array (or its gradient, or its optimizer state) lives."""
        return [slot.sharding(role) for slot in self.slots]

    # -------------------------------------------------------------------------------------------------------- copies
    @functools.cached_property
    def copied(self) -> StageModel:
        """The same stage with a copy of its parameters per data-parallel rank: gradients are summed up unreduced."""
        return dataclasses.replace(self, is_copied=True)

    def spread(self, parameters: Sequence[Any]) -> list[Any]:
        """Return the parameters that ``copied.run`` takes: no bytes move, and no device holds more than before."""
        return [
            copies.spread(array, slot.leaf_sharding("parameter"), stacked=slot.is_stacked) if copies else array
            for slot, array, copies in zip(self.slots, parameters, self._slot_copies, strict=True)
        ]

    def reduce(self, sums: Sequence[Any]) -> list[Any]:
        """Return gradients of the stored arrays from gradients of ``spread`` ones: the reduction over the ranks.

        They are put where the optimizer is, so that zero 1 scatters what it reduces.
        """
        return [
            copies.sum(array, slot.leaf_sharding("optimizer"), stacked=slot.is_stacked)
            if copies
            else jax.lax.with_sharding_constraint(array, slot.sharding("optimizer"))
            for slot, array, copies in zip(self.slots, sums, self._slot_copies, strict=True)
        ]

    @functools.cached_property
    def spread_shardings(self) -> list[NamedSharding]:
        """Where ``spread`` arrays live."""
        return [
            copies.place(slot.leaf_sharding("parameter"), stacked=slot.is_stacked)
            if copies
            else slot.sharding("parameter")
            for slot, copies in zip(self.slots, self._slot_copies, strict=True)
        ]

    @functools.cached_property
    def sum_shardings(self) -> list[NamedSharding]:
        """Where sums of the gradients of ``spread`` arrays live."""
        return [
            copies.place(slot.leaf_sharding("gradient"), stacked=slot.is_stacked)
            if copies
            else slot.sharding(self.gradient_role)
            for slot, copies in zip(self.slots, self._slot_copies, strict=True)
        ]

    @property
    def sums_in_place(self) -> list[bool]:
        """Which gradients of ``spread`` arrays are reduced by nobody before the last microbatch (see ``_sums``)."""
        copied = zip(self.slots, self._slot_copies, strict=True)
        return [bool(copies) and slot.layout is not None and slot.layout.strategy.zero <= 1 for slot, copies in copied]

    @property
    def state_shardings(self) -> list[NamedSharding]:
        """Model state is small and stands whole on every device."""
        return [self.mesh.replicated] * len(self.share.state)

    def batch_shardings(self, *, microbatched: bool = False) -> list[NamedSharding]:
        """Return where each leaf of ``share.batch`` is fed: dimension 0 over the data axes of its first reader.

        Args:
            microbatched: Leaves have a leading microbatch dimension.
        """
        return [self._batch_sharding(leaf, microbatched) for leaf in self.share.batch]

    @functools.cached_property
    def arriving_shardings(self) -> list[NamedSharding]:
        """Where the values ``share.arriving`` stand when they enter: on the wire."""
        return [self._wire(crossing) for crossing in self.share.arriving]

    @functools.cached_property
    def leaving_shardings(self) -> list[NamedSharding]:
        """Where the values ``share.leaving`` stand when they leave: on the wire."""
        return [self._wire(crossing) for crossing in self.share.leaving]

    def _batch_sharding(self, leaf: int, microbatched: bool) -> NamedSharding:
        variable = program_leaves(self.share.analysis).batch[leaf]
        if not self.share.analysis.trace.has_samples[leaf]:
            return self.mesh.replicated
        pairs = zip(self.share.segments, self.layouts, strict=True)
        first = next((layout for segment, layout in pairs if variable in segment.inputs), self.layouts[0])
        axes = self.mesh.data_axes(first.strategy) or None
        return self.mesh.sharding(PartitionSpec(*[None] * microbatched, axes))

    def _wire(self, crossing: Crossing) -> NamedSharding:
        analysis = self.share.analysis
        kind = analysis.kinds[analysis.cut.segments[crossing.maker].kind]
        return self.mesh.sharding(wire_spec(self.mesh, kind, kind.layer.outputs[crossing.output]))

    def _to_wire(self, value: Any, crossing: Crossing) -> Any:
        return _placed(value, self._wire(crossing))

    # -------------------------------------------------------------------------------------------------------- pieces
    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """The segments as loops and single layers."""
        cut = self.share.analysis.cut
        variables = program_leaves(self.share.analysis).parameters
        return find_runs(self.share.first, self.share.segments, self.layouts, variables, cut.segments)

    def _read_outside(self, run: Run) -> set[Variable]:
        cut = self.share.analysis.cut
        inside = {id(segment) for segment in run.segments}
        read = {v for segment in cut.segments if id(segment) not in inside for v in segment.inputs}
        return read | {v for v in cut.source.outputs if isinstance(v, Variable)}

    @functools.cached_property
    def _gradient_places(self) -> dict[Variable, NamedSharding]:
        variables = program_leaves(self.share.analysis).parameters
        places = self.sum_shardings if self.is_copied else self.parameter_shardings(self.gradient_role)
        return {variables[slot.leaves[0]]: place for slot, place in zip(self.slots, places, strict=True)}

    def _row_place(self, run: Run, position: int) -> NamedSharding:
        """Where the gradient of one layer's parameter is put inside a loop."""
        if position in self._reduction(run).spread:
            return Copies(run.layout, unreduced_axes(run.layout)).place(run.layout.stored(position, "gradient"))
        return run.layout.stored(position, self.gradient_role)

    def _reduction(self, run: Run) -> Reduction:
        """How gradients of a run's layers are reduced."""
        if not self.is_copied:
            return Reduction(self.gradient_role, in_float32=self.reduces_in_float32)
        leaf_of = {v: i for i, v in enumerate(program_leaves(self.share.analysis).parameters)}
        leaves = [leaf_of[run.segments[0].inputs[index]] for index in run.layout.kind.layer.parameters]
        spread = frozenset(position for position, leaf in enumerate(leaves) if leaf in self._copied_leaves)
        return Reduction(self.gradient_role, spread, in_float32=self.reduces_in_float32)

    @functools.cached_property
    def _slot_copies(self) -> list[Copies | None]:
        """The copies of each slot; None where there is one array for all ranks."""
        return [
            Copies(slot.layout, unreduced_axes(slot.layout))
            if slot.layout is not None and slot.leaves[0] in self._copied_leaves
            else None
            for slot in self.slots
        ]

    @functools.cached_property
    def _copied_leaves(self) -> frozenset[int]:
        """Parameter leaves that every layer that reads them can read as copies, along the same axes."""
        leaf_of = {v: i for i, v in enumerate(program_leaves(self.share.analysis).parameters)}
        wanted: dict[int, set[Axes]] = {leaf: set() for leaf in self.share.parameters}
        allowed = {id(layout.kind): copyable(layout.kind) for layout in self.layouts}
        for segment, layout in zip(self.share.segments, self.layouts, strict=True):
            for position, index in enumerate(layout.kind.layer.parameters):
                axes = unreduced_axes(layout) if position in allowed[id(layout.kind)] else ()
                wanted[leaf_of[segment.inputs[index]]].add(axes)
        return frozenset(leaf for leaf, axes in wanted.items() if len(axes) == 1 and () not in axes)

    def _function(self, run: Run) -> SegmentFunction:
        key = (id(run.layout), run.is_scanned, self._reduction(run))
        if key not in self._functions:
            self._functions[key] = build_segment(run.layout, in_loop=run.is_scanned, reduction=key[2])
        return self._functions[key]

    @functools.cached_property
    def _functions(self) -> dict[tuple[int, bool, Reduction], SegmentFunction]:
        return {}


def _placed(value: Any, place: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(value, place) if value.ndim else value


def _read(environment: Environment, atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else environment[atom]

"""Walk: one pass through the layers of a stage, with what is known at every point and in which layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ..analysis import Variable
from ._cycles import Cycle, Stack
from ._layers import StageLayers
from ._layout import LayerLayout
from ._order import after_gradients, has_gradient, place_gradients
from ._relayout import arrive
from ._runs import Run

Environment = dict[Variable, Any]


class Walk:
    """One pass: every piece reads the environment and adds its results to it."""

    def __init__(
        self, layers: StageLayers, environment: Environment, stacked: Mapping[Variable, Any], *, in_loop: bool = False
    ) -> None:
        """Begin before the first layer.

        Args:
            layers: The stage's.
            environment: Values by variable; results are added.
            stacked: Stacked parameters, by the variable of their first row.
            in_loop: It is the body of a loop.
        """
        self._layers, self._environment, self._stacked, self._in_loop = layers, environment, stacked, in_loop
        self._before: dict[Variable, LayerLayout] = {}
        """The layout of the layer that made each value."""

    def through(self, pieces: Sequence[Run | Cycle]) -> None:
        """Run ``pieces`` one after the other."""
        for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
            if isinstance(piece, Cycle):
                self._cycle(piece)
            elif piece.is_scanned:
                self._scan(piece)
            else:
                self._order_gradients(piece, after)
                self._segment(piece)

    def _segment(self, run: Run) -> None:
        (segment,), layout = run.segments, run.layout
        inputs = [self._arrived(v, layout, i) for i, v in enumerate(segment.inputs)]
        with jax.named_scope(segment.name):  # so that compiled programs say which layer an operation is of
            results = self._layers.function(run, in_loop=self._in_loop)(inputs)
        for variable, result, value in zip(segment.outputs, results, layout.kind.layer.outputs, strict=True):
            self._put(variable, placed(result, layout.value(value)), layout)

    def _scan(self, run: Run) -> None:
        """Run a loop over the layers of ``run``; named after its first layer."""
        layout, head, last = run.layout, run.segments[0], run.segments[-1]
        weights, carried, each = run.inputs_of("stacked"), run.inputs_of("carried"), run.inputs_of("each")
        start = [self._arrived(head.inputs[i], layout, i) for i in carried]
        shared = {i: self._arrived(head.inputs[i], layout, i) for i in run.inputs_of("shared")}
        rows = {i: self._stacked[head.inputs[i]] for i in weights}
        rows |= {i: self._column([segment.inputs[i] for segment in run.segments]) for i in each}
        escaping = run.escaping(self._layers.read_outside(run))
        places = [self._layers.row_place(run, layout.kind.layer.parameters.index(i)) for i in weights]
        function = self._layers.function(run, in_loop=True)

        def layer(carry: list[Any], row: dict[int, Any]) -> tuple[list[Any], list[Any]]:
            # Pinned here too: else the compiler lays out what is carried as the layers around the loop have it.
            carry = [arrive(value, layout, layout, i) for i, value in zip(carried, carry, strict=True)]
            held = place_gradients([row[i] for i in weights], places)
            own = {i: arrive(row[i], self._before.get(head.inputs[i]), layout, i) for i in each}
            known = {**shared, **own, **dict(zip(weights, held, strict=True)), **dict(zip(carried, carry, strict=True))}
            results = function([known[i] for i in range(len(head.inputs))])
            results = [placed(r, layout.value(v)) for r, v in zip(results, layout.kind.layer.outputs, strict=True)]
            return [results[run.feeds[i].output] for i in carried], [results[o] for o in escaping]

        with jax.named_scope(head.name):
            final, collected = jax.lax.scan(layer, start, rows)
        for o, column in zip(escaping, collected, strict=True):
            self._environment.update((segment.outputs[o], column[row]) for row, segment in enumerate(run.segments))
        for i, value in zip(carried, final, strict=True):
            self._environment[last.outputs[run.feeds[i].output]] = arrive(value, layout, layout, i)
        self._before.update((variable, layout) for segment in run.segments for variable in segment.outputs)

    def _cycle(self, cycle: Cycle) -> None:
        """Run a loop over the turns of ``cycle``; the body runs the first turn's layers on the values of each."""
        first, carried, each = cycle.inputs[0], cycle.inputs_of("carried"), cycle.inputs_of("each")
        entries = [(first[i], *cycle.reader_of(i)) for i in carried]
        made = [cycle.outputs[0][cycle.feeds[i].output] for i in carried]
        start = [self._arrived(*entry) for entry in entries]
        rows = [self._column([inputs[i] for inputs in cycle.inputs]) for i in each]
        stacks = cycle.stacks

        def turn(carry: list[Any], row: tuple[list[Any], list[Any]]) -> tuple[list[Any], None]:
            own = dict(zip([first[i] for i in each], row[0], strict=True))
            weights = {stack.variables[0]: array for stack, array in zip(stacks, row[1], strict=True)}
            walk = Walk(self._layers, self._environment | own, weights, in_loop=True)
            walk._before.update(self._before)
            for (variable, layout, index), value in zip(entries, carry, strict=True):
                walk._put(variable, arrive(value, layout, layout, index), layout)
            walk._take_layers(stacks)
            walk.through(cycle.runs)
            handed = zip(made, entries, strict=True)
            return [walk._arrived(v, layout, index) for v, (_, layout, index) in handed], None

        final, _ = jax.lax.scan(turn, start, (rows, self._turn_weights(stacks, len(cycle.turns))))
        for i, (_, layout, index), value in zip(carried, entries, final, strict=True):
            handed_on = cycle.outputs[-1][cycle.feeds[i].output]
            self._put(handed_on, arrive(value, layout, layout, index), layout)

    def _turn_weights(self, stacks: Sequence[Stack], turns: int) -> list[Any]:
        """Return the stacked parameters of a cycle with a row for each turn: a layer's, or those of a run."""
        arrays = [self._stacked[stack.variables[0]] for stack in stacks]
        # They come so already where ``spread`` made them, so that gradients add up in place.
        return [x if x.shape[0] == turns else x.reshape(turns, -1, *x.shape[1:]) for x in arrays]

    def _take_layers(self, stacks: Sequence[Stack]) -> None:
        """In the body of a cycle: parameters of single layers leave the stacks, their gradients go to their places."""
        single = [stack for stack in stacks if not stack.run.is_scanned]
        arrays = [self._stacked[stack.variables[0]] for stack in single]
        held = place_gradients(arrays, [self._layers.row_place(stack.run, stack.position) for stack in single])
        self._environment.update((stack.variables[0], array) for stack, array in zip(single, held, strict=True))

    def _order_gradients(self, run: Run, after: Run | Cycle | None) -> None:
        """Let the cotangents of a segment's inputs wait for the gradients of the one after it (see ``_order``).

        A loop needs none of this: its gradients are finished when it is.
        """
        if not isinstance(after, Run) or after.is_scanned:
            return
        (segment,), (later,), layout = run.segments, after.segments, after.layout
        environment = self._environment
        taken = [v for v in segment.inputs if v in self._before and has_gradient(environment[v])]
        read = {later.inputs[index]: position for position, index in enumerate(layout.kind.layer.parameters)}
        parameters = [v for v in read if has_gradient(environment[v])]
        if not taken:
            return
        places = [self._gradient_place(v, after, read[v]) for v in parameters]
        values, held = after_gradients([environment[v] for v in taken], [environment[v] for v in parameters], places)
        environment.update(zip(taken + parameters, values + held, strict=True))

    def _gradient_place(self, variable: Variable, run: Run, position: int) -> NamedSharding:
        if variable in self._stacked:
            return self._layers.row_place(run, position)
        return self._layers.gradient_places[variable]

    # -------------------------------------------------------------------------------------------------------- values
    def _arrived(self, variable: Variable, layout: LayerLayout, index: int) -> Any:
        return arrive(self._environment[variable], self._before.get(variable), layout, index)

    def _column(self, variables: Sequence[Variable]) -> Any:
        return jnp.stack([self._environment[v] for v in variables])

    def _put(self, variable: Variable, value: Any, layout: LayerLayout) -> None:
        self._environment[variable] = value
        self._before[variable] = layout


def placed(value: Any, place: NamedSharding) -> Any:
    """Return ``value`` at ``place``; scalars stay as they are."""
    return jax.lax.with_sharding_constraint(value, place) if value.ndim else value

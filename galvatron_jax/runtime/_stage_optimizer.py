"""The optimizer's update on one stage, over the arrays in which the stage stores its parameters.

A parameter that several stages hold (a tied embedding) is updated by the first of them, which is sent the gradients of
the others and sends them the new weights: one update, equal to the last bit, and one optimizer state.

The rows of a stacked slot (a run of layers) follow equal equations in nearly every optimizer; then one row's equations
run for all of them under ``jax.vmap``, and nothing is unstacked, so a donated state is updated in place. Where rows
differ (a mask or a rate of their own for some layers), their states are stored row by row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ..analysis import Variable
from ._cut_optimizer import LOSS, CutOptimizer, Values, evaluate, name_equation, name_literal, read
from ._guard import StepMetrics
from ._slots import Leaves, Slot

Arrays = list[Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that are updated by the same equations: the rows of a slot, or one parameter."""

    slot: int
    leaves: tuple[int, ...]
    stacked: bool
    """Its arrays have a leading dimension for the rows."""
    row: int = 0
    """Which row of the slot, when the rows of a stacked slot are groups of their own."""


class OptimizerState(NamedTuple):
    """The optimizer state of one stage."""

    owned: list[Arrays]
    """Of each group: moments and the like."""
    shared: Arrays
    """Step counts and the like, which every stage keeps."""


class Inputs(NamedTuple):
    """What an update reads, as the stage stores it."""

    gradients: Arrays
    """Mean gradient of each slot."""
    parameters: Arrays
    """Weights of each slot."""
    state: OptimizerState
    loss: Any = None
    """Mean loss, on the stage that makes it."""


@dataclasses.dataclass(frozen=True)
class StageOptimizer:
    """A cut optimizer over the slots of one stage."""

    cut: CutOptimizer
    slots: tuple[Slot, ...]
    mirrored: frozenset[int]
    """Slots that another stage updates."""
    makes_loss: bool
    """The stage is the last one."""

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """What is updated together, in slot order."""
        found: list[Group] = []
        for position, slot in enumerate(self.slots):
            if position in self.mirrored:
                continue
            if not slot.is_stacked or len({self._signature(leaf) for leaf in slot.leaves}) == 1:
                found.append(Group(position, slot.leaves, slot.is_stacked))
            else:
                found += [Group(position, (leaf,), False, row) for row, leaf in enumerate(slot.leaves)]
        return tuple(found)

    # --------------------------------------------------------------------------------------------------------- state
    def to_stored(self, leaves: Leaves) -> OptimizerState:
        """Return (arrays of each group, shared arrays) from all leaves of an optax state; runs under ``jax.jit``."""
        owned = []
        for group in self.groups:
            rows = [[self._stored(group, i, leaves[i]) for i in self.cut.owned_state(leaf)] for leaf in group.leaves]
            columns = zip(*rows, strict=True)
            owned.append([jnp.stack(column) if group.stacked else column[0] for column in columns])
        return OptimizerState(owned, [leaves[i] for i in self.cut.shared_state])

    def to_user(self, state: OptimizerState) -> dict[int, Any]:
        """Return the leaves of the optax state that the stage has, by position; runs under ``jax.jit``."""
        found = dict(zip(self.cut.shared_state, state.shared, strict=True))
        for group, arrays in zip(self.groups, state.owned, strict=True):
            for row, leaf in enumerate(group.leaves):
                parts = [array[row] if group.stacked else array for array in arrays]
                for i, part in zip(self.cut.owned_state(leaf), parts, strict=True):
                    seen = self.cut.state_views[i] is not None
                    found[i] = self.slots[group.slot].to_user(part, "optimizer") if seen else part
        return found

    def _stored(self, group: Group, position: int, leaf: Any) -> Any:
        """Return a leaf of the optax state as it is stored."""
        seen = self.cut.state_views[position] is not None
        return self.slots[group.slot].to_stored(leaf, "optimizer") if seen else leaf

    # ------------------------------------------------------------------------------------------------------- updates
    def exports(self, number: int, inputs: Inputs, known: Values) -> jax.Array:
        """Return what the stage gives to exchange ``number``: float32, the values in the order of ``exported``.

        Args:
            number: Round of exchange, from 0.
            inputs: What the update reads.
            known: Values of earlier exchanges.
        """
        values = self._shared_values(inputs, known)
        parts = [jnp.zeros((0,), jnp.float32)]
        for group, arrays in zip(self.groups, self._arrays(inputs), strict=True):
            wanted = self._exports_of(group.leaves[0], number)
            if wanted:
                results = self._run(group, arrays, wanted, values)
                rows = [jnp.reshape(r.astype(jnp.float32), (len(group.leaves), -1)) for r in results]
                parts.append(jnp.ravel(jnp.concatenate(rows, axis=1)))
        if inputs.loss is not None:
            known = {**values, self.cut.loss: inputs.loss}
            evaluate(self.cut.cut.owned.get(LOSS, ()), known)
            parts += [jnp.ravel(known[v].astype(jnp.float32)) for v in self._exports_of(LOSS, number)]
        return jnp.concatenate(parts)

    def update(self, inputs: Inputs, known: Values) -> tuple[Arrays, OptimizerState, StepMetrics]:
        """Return (new weights, new state, metrics of the step); see ``exports`` for the arguments.

        The weights of mirrored slots are returned as they are.
        """
        values = self._shared_values(inputs, known)
        rows: dict[int, Arrays] = {}
        owned = []
        for group, arrays in zip(self.groups, self._arrays(inputs), strict=True):
            weights, *states = self._run(group, arrays, self.cut.results_of(group.leaves[0]), values)
            rows.setdefault(group.slot, []).append(weights)
            owned.append(states)
        split = {group.slot for group in self.groups if self._is_split(group)}
        for k in self.mirrored:
            rows[k] = [inputs.parameters[k]]
        new = [jnp.stack(rows[k]) if k in split else rows[k][0] for k in range(len(self.slots))]
        shared = [read(values, atom) for atom in self.cut.shared_results()]
        return new, OptimizerState(owned, shared), self.cut.metrics(values)

    def exported(self, number: int) -> list[Variable]:
        """Return the values of ``exports``, in order."""
        owned = [v for group in self.groups for leaf in group.leaves for v in self._exports_of(leaf, number)]
        return owned + (self._exports_of(LOSS, number) if self.makes_loss else [])

    # -------------------------------------------------------------------------------------------------------- pieces
    def _run(self, group: Group, arrays: Arrays, wanted: Sequence[Any], values: Values) -> Arrays:
        leaf = group.leaves[0]

        def row(*arrays: Any) -> Arrays:
            known = {**values, **dict(zip(self.cut.inputs_of(leaf), arrays, strict=True))}
            evaluate(self.cut.cut.owned.get(leaf, ()), known)
            return [jnp.asarray(read(known, atom)) for atom in wanted]

        return list((jax.vmap(row) if group.stacked else row)(*arrays))

    def _arrays(self, inputs: Inputs) -> list[Arrays]:
        """Arrays of each group in the order of ``CutOptimizer.inputs_of``."""

        def part(group: Group, array: Any) -> Any:
            return array[group.row] if self._is_split(group) else array

        return [
            [part(group, inputs.gradients[group.slot]), part(group, inputs.parameters[group.slot]), *arrays]
            for group, arrays in zip(self.groups, inputs.state.owned, strict=True)
        ]

    def _is_split(self, group: Group) -> bool:
        """Tell whether the group is one row of a stacked slot."""
        return self.slots[group.slot].is_stacked and not group.stacked

    def _shared_values(self, inputs: Inputs, known: Values) -> Values:
        values = {**self.cut.program.constants, **known}
        values.update(zip(self.cut.shared_inputs(), inputs.state.shared, strict=True))
        evaluate(self.cut.cut.shared, values)
        return values

    def _exports_of(self, leaf: int, number: int) -> list[Variable]:
        cut = self.cut.cut
        return [v for v in cut.exports[number] if cut.owner[v] == leaf] if number < len(cut.exports) else []

    def _signature(self, leaf: int) -> str:
        """Text of the leaf's equations with its own values numbered: equal for rows that may run as one."""
        cut, numbers = self.cut.cut, {v: i for i, v in enumerate(self.cut.inputs_of(leaf))}

        def name(atom: Any) -> str:
            if isinstance(atom, Literal):
                return name_literal(atom)
            if cut.owner.get(atom) == leaf:
                return f"{numbers.setdefault(atom, len(numbers))}:{atom.aval.str_short()}"
            return cut.names.get(atom, f"v{id(atom)}")

        lines = [
            f"{name_equation(e, [name(v) for v in e.inputs])} -> {[name(v) for v in e.outputs]}"
            for e in cut.owned.get(leaf, ())
        ]
        exports = [[name(v) for v in self._exports_of(leaf, number)] for number in range(len(cut.exports))]
        return "\n".join([*lines, str(exports), str([name(atom) for atom in self.cut.results_of(leaf)])])


def receive(optimizers: Sequence[StageOptimizer], number: int, vectors: Sequence[Any]) -> Values:
    """Return the exchanged values of a round by variable.

    Args:
        optimizers: Of all stages.
        number: The round.
        vectors: What each stage gave (``exports``), possibly longer. A tied parameter counts where it is held first.
    """
    found: Values = {}
    for optimizer, vector in zip(optimizers, vectors, strict=True):
        offset = 0
        for variable in optimizer.exported(number):
            size, shape = variable.aval.size, variable.aval.shape
            value = jnp.reshape(vector[offset : offset + size], shape).astype(variable.aval.dtype)
            found.setdefault(variable, value)
            offset += size
    return found

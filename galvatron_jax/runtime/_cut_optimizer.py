"""Any optax transformation, cut by parameter, so that stages on different devices can run it together.

The optimizer is traced once over the user's whole tree (masks, labels and schedules see the paths that they expect) and
its update is sorted, equation by equation, like the model is cut into layers. A value is

* *owned* by one parameter: made of its gradient, its weights, its optimizer state (and of shared values);
* *shared*: made of no parameter's arrays (step counts, learning rates), so every stage computes it for itself.

Where an equation takes values of several owners, they must be small, as the norms are of which a global norm is made:
they are *exported*, exchanged between all stages, and the equation is shared from there on. A first round of exports
feeds shared values, which owned ones read again (a clipped gradient), which may be exported in a second round (a norm
of the updates), and so on. What a step reports (loss, norm of all gradients, whether both are finite) and the guard
that leaves out a non-finite update are traced with the optimizer and cut with it: they are the first round, and
clipping by the global norm joins it. Sums are taken by the same equations in the same order as on one device.

An equation that mixes whole arrays of several parameters (one vector of everything) has no such cut and is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from ..analysis import Equation, Program, Variable, flatten, is_call, run_equation
from ..errors import UnsupportedError
from ._guard import StepMetrics, guarded, step_metrics
from ._restate import restate
from ._view import View

LOSS = -1
"""Owner of the loss: no parameter, the last stage."""

MAX_EXPORT = 1024
"""Most elements of an exported value: a norm, a count, a histogram; not a parameter."""

Values = dict[Variable, Any]


@dataclasses.dataclass(frozen=True)
class CutOptimizer:
    """An optimizer's update, sorted by parameter (see the module docstring)."""

    optimizer: optax.GradientTransformation
    parameters: Any
    """The user's parameters, abstract."""
    views: Mapping[int, View] = dataclasses.field(default_factory=dict)
    """Of the parameters that are stored in another shape than the user's, by position."""

    @functools.cached_property
    def state(self) -> Any:
        """The optax state over the user's tree, abstract."""
        return jax.eval_shape(self.optimizer.init, self.parameters)

    @functools.cached_property
    def state_owners(self) -> tuple[int | None, ...]:
        """The parameter that each leaf of the state belongs to (None: shared): its whole path ends the leaf's path."""
        named = jax.tree_util.tree_flatten_with_path(self.parameters)[0]
        paths = {tuple(path): index for index, (path, _) in enumerate(named)}
        leaves = jax.tree_util.tree_flatten_with_path(self.state)[0]
        return tuple(
            next((paths[end] for k in range(len(path)) if (end := tuple(path[k:])) in paths), None)
            for path, _ in leaves
        )

    def owned_state(self, parameter: int) -> list[int]:
        """Positions of the state leaves that belong to a parameter."""
        return [i for i, owner in enumerate(self.state_owners) if owner == parameter]

    @property
    def shared_state(self) -> list[int]:
        """Positions of the state leaves that every stage keeps."""
        return [i for i, owner in enumerate(self.state_owners) if owner is None]

    @functools.cached_property
    def state_views(self) -> tuple[View | None, ...]:
        """How each leaf of the state is stored: as its parameter is, where it has its shape (None: as it is)."""
        found = [None if owner is None else self.views.get(owner) for owner in self.state_owners]
        leaves = jax.tree.leaves(self.state)
        return tuple(v if v and leaf.shape == v.user else None for v, leaf in zip(found, leaves, strict=True))

    # ------------------------------------------------------------------------------------------------------- the cut
    @functools.cached_property
    def program(self) -> Program:
        """The update: (gradients, state leaves, parameters, loss) to (parameters, state leaves, metrics)."""
        leaves, structure = jax.tree.flatten(self.parameters)
        state, state_structure = jax.tree.flatten(self.state)

        def update(gradients: list[Any], state: list[Any], parameters: list[Any], loss: Any) -> Any:
            metrics = step_metrics(loss, gradients)
            tree = jax.tree.unflatten(structure, parameters)
            updates, new = self.optimizer.update(
                jax.tree.unflatten(structure, gradients), jax.tree.unflatten(state_structure, state), tree
            )
            after = jax.tree.leaves(optax.apply_updates(tree, updates)), jax.tree.leaves(new)
            return *guarded(metrics.finite, after, (parameters, state)), metrics

        loss = jax.ShapeDtypeStruct((), jnp.float32)
        program = flatten(jax.make_jaxpr(update)(leaves, state, leaves, loss), is_call)
        weights = [self.views.get(i) for i in range(len(leaves))]
        results = [*weights, *self.state_views]
        return restate(program, [*results, *weights, None], [*results, *[None] * len(StepMetrics._fields)])

    @functools.cached_property
    def cut(self) -> Cut:
        """The update, sorted.

        Raises:
            UnsupportedError: it mixes arrays of several parameters.
        """
        return _cut(self.program, self._input_owners, self._result_owners)

    def inputs_of(self, parameter: int) -> list[Variable]:
        """Inputs of the update that a parameter owns: gradient, weights, then its state leaves."""
        count, inputs = len(jax.tree.leaves(self.parameters)), self.program.inputs
        states = [inputs[count + i] for i in self.owned_state(parameter)]
        return [inputs[parameter], inputs[count + len(self.state_owners) + parameter], *states]

    def results_of(self, parameter: int) -> list[Any]:
        """Results of the update that a parameter owns: new weights, then its new state leaves."""
        count, outputs = len(jax.tree.leaves(self.parameters)), self.program.outputs
        return [outputs[parameter], *(outputs[count + i] for i in self.owned_state(parameter))]

    def shared_inputs(self) -> list[Variable]:
        """Inputs of the update that every stage has: the shared state leaves."""
        count = len(jax.tree.leaves(self.parameters))
        return [self.program.inputs[count + i] for i in self.shared_state]

    def shared_results(self) -> list[Any]:
        """Results of the update that every stage keeps: the new shared state leaves."""
        count = len(jax.tree.leaves(self.parameters))
        return [self.program.outputs[count + i] for i in self.shared_state]

    @property
    def loss(self) -> Variable:
        """The input that is the loss."""
        return self.program.inputs[-1]

    def metrics(self, values: Values) -> StepMetrics:
        """Return what the step reports, once all exchanges are known."""
        loss, norm, finite = self.program.outputs[-3:]
        return StepMetrics(read(values, loss), read(values, norm), read(values, finite))

    @property
    def _input_owners(self) -> list[int | None]:
        parameters = list(range(len(jax.tree.leaves(self.parameters))))
        return [*parameters, *self.state_owners, *parameters, LOSS]

    @property
    def _result_owners(self) -> list[int | None]:
        return [*range(len(jax.tree.leaves(self.parameters))), *self.state_owners, None, None, None]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Equations of an update by owner."""

    shared: tuple[Equation, ...]
    owned: Mapping[int, tuple[Equation, ...]]
    exports: tuple[tuple[Variable, ...], ...]
    """Values to exchange, round by round."""
    owner: Mapping[Variable, int]
    """Of every owned value."""
    names: Mapping[Variable, str]
    """Of shared values: equal names, equal values (optax makes the same step count for every parameter anew)."""


def name_equation(equation: Equation, inputs: Sequence[str]) -> str:
    """Return a text that is equal for equations that compute the same from inputs of the same names."""
    return f"{equation.name}{re.sub(r' at 0x[0-9a-f]+', '', str(equation.eqn.params))}({', '.join(inputs)})"


def name_literal(atom: Literal) -> str:
    """Return the text of a literal."""
    return f"{atom.val}:{atom.aval.str_short()}"


def evaluate(equations: Sequence[Equation], values: Values) -> None:
    """Run the equations whose inputs are known and add their results to ``values``."""
    for equation in equations:
        if all(isinstance(v, Literal) or v in values for v in equation.inputs):
            arguments = [read(values, v) for v in equation.inputs]
            values.update(zip(equation.outputs, run_equation(equation.eqn, arguments), strict=True))


def read(values: Values, atom: Any) -> Any:
    """Return the value of a variable or literal."""
    return atom.val if isinstance(atom, Literal) else values[atom]


def _cut(program: Program, input_owners: Sequence[int | None], result_owners: Sequence[int | None]) -> Cut:
    owner = {v: o for v, o in zip(program.inputs, input_owners, strict=True) if o is not None}
    rounds: dict[Variable, int] = {}
    exports: list[dict[Variable, None]] = []
    shared: list[Equation] = []
    owned: dict[int, list[Equation]] = {}

    def export(variable: Variable, by: str) -> int:
        """Exchange an owned value; return the round after which it is shared."""
        if variable.aval.size > MAX_EXPORT:
            raise _mixes(by)
        position = rounds.get(variable, 0)
        exports.extend({} for _ in range(position + 1 - len(exports)))
        exports[position].setdefault(variable)
        return position + 1

    for equation in program.equations:
        inputs = [v for v in equation.inputs if isinstance(v, Variable)]
        owners = {owner[v] for v in inputs if v in owner}
        if len(owners) > 1 or (owners and _joins_exchanged(equation, inputs, owner, rounds)):
            position = max(export(v, equation.name) if v in owner else rounds.get(v, 0) for v in inputs)
            owners = set()
        else:
            position = max((rounds.get(v, 0) for v in inputs), default=0)
        rounds.update(dict.fromkeys(equation.outputs, position))
        owner.update(dict.fromkeys(equation.outputs, next(iter(owners))) if owners else {})
        (owned.setdefault(next(iter(owners)), []) if owners else shared).append(equation)
    for result, wanted in zip(program.outputs, result_owners, strict=True):
        if isinstance(result, Variable) and result in owner and owner[result] != wanted:
            export(result, "a result")
    owned_equations = {k: tuple(e) for k, e in owned.items()}
    return Cut(tuple(shared), owned_equations, tuple(map(tuple, exports)), owner, _names(shared))


def _names(shared: Sequence[Equation]) -> dict[Variable, str]:
    """Number the values of shared equations so that equal equations of equal inputs make equal numbers."""
    names: dict[Variable, str] = {}
    known: dict[str, str] = {}
    for equation in shared:
        inputs = [
            name_literal(v) if isinstance(v, Literal) else names.setdefault(v, f"v{id(v)}") for v in equation.inputs
        ]
        text = name_equation(equation, inputs)
        number = known.setdefault(text, f"e{len(known)}")
        names.update((v, f"{number}.{i}") for i, v in enumerate(equation.outputs))
    return names


def _joins_exchanged(
    equation: Equation, inputs: Sequence[Variable], owner: Mapping[Variable, int], rounds: Mapping[Variable, int]
) -> bool:
    """Tell whether scalars meet of which one was exchanged: a chain of sums is exchanged once, not link by link."""
    scalar = all(v.aval.size <= 1 for v in [*inputs, *equation.outputs])
    return scalar and any(v not in owner and rounds.get(v, 0) > 0 for v in inputs)


def _mixes(primitive: str) -> UnsupportedError:
    return UnsupportedError(
        f"the optimizer mixes whole arrays of several parameters ({primitive})",
        expected="parameters treated one by one, but for small values such as norms over all of them",
        where="optimizer",
        action="use a plan of one stage (search with --no-pp), or another optimizer",
    )

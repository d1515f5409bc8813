"""An optimizer's program, restated over parameters in the shapes in which they are stored (``_view``).

The optimizer is traced on the user's own shapes, so what depends on them (a decay mask by ``ndim``, factored moments,
orthogonalised matrices) is what the user expects. Then its equations run again on the stored arrays: what works element
by element, or sums up whole arrays (norms), does not notice. Anything else is given the array in the user's shape: the
same numbers, at the price of a gather of that array where the user's shape cannot be sharded alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ..analysis import ELEMENTWISE, REDUCTIONS, Equation, Program, Variable, abstract, flatten, is_call, run_equation
from ._view import View

_SUMS = REDUCTIONS - {"argmax", "argmin"}


def restate(program: Program, inputs: Sequence[View | None], results: Sequence[View | None]) -> Program:
    """Return ``program`` with some inputs and results in their stored shapes.

    Args:
        program: A flat program over arrays in the user's shapes.
        inputs: How each input is stored; None: in its own shape.
        results: The same of each result.
    """
    if not any(inputs) and not any(results):
        return program
    shapes = [
        jax.ShapeDtypeStruct(view.stored, v.aval.dtype) if view else abstract(v.aval)
        for v, view in zip(program.inputs, inputs, strict=True)
    ]
    return flatten(jax.make_jaxpr(lambda *arrays: _run(program, inputs, results, arrays))(*shapes), is_call)


def _run(
    program: Program, inputs: Sequence[View | None], results: Sequence[View | None], arrays: Sequence[Any]
) -> list[Any]:
    values: dict[Variable, Any] = {**program.constants, **dict(zip(program.inputs, arrays, strict=True))}
    views = {v: view for v, view in zip(program.inputs, inputs, strict=True) if view}
    filled: dict[Variable, Any] = {}
    """The scalar that fills an array."""

    def read(atom: Variable | Literal, view: View | None) -> Any:
        """Return a value as ``view`` has it, None: in the user's shape; scalars have one shape only."""
        if isinstance(atom, Literal):
            return atom.val
        if atom in filled:
            return jnp.broadcast_to(filled[atom], view.stored if view else atom.aval.shape)
        if not atom.aval.shape or views.get(atom) == view:
            return values[atom]
        return jnp.reshape(values[atom], view.stored if view else atom.aval.shape)

    def scalar(atom: Variable | Literal) -> Any:
        return filled[atom] if isinstance(atom, Variable) and atom in filled else read(atom, None)

    for equation in program.equations:
        if _fills(equation, filled):
            scalars = [jnp.reshape(scalar(v), ()) for v in equation.inputs]
            is_copy = equation.name == "broadcast_in_dim"
            filled[equation.outputs[0]] = scalars[0] if is_copy else run_equation(equation.eqn, scalars)[0]
            continue
        view = _common_view(equation, views)
        changes = {"axes": tuple(range(len(view.stored)))} if view and equation.name in _SUMS else {}
        made = run_equation(equation.eqn, [read(v, view) for v in equation.inputs], **changes)
        values.update(zip(equation.outputs, made, strict=True))
        if view and equation.name not in _SUMS:
            views.update(dict.fromkeys(equation.outputs, view))
    return [
        jnp.reshape(read(v, view), view.stored) if view else read(v, None)
        for v, view in zip(program.outputs, results, strict=True)
    ]


def _fills(equation: Equation, filled: Mapping[Variable, Any]) -> bool:
    """Tell whether the result is one scalar everywhere: a single element broadcast, or made of such arrays."""
    avals: list[Any] = [v.aval for v in equation.inputs]
    if equation.name == "broadcast_in_dim":
        return len(avals) == 1 and math.prod(avals[0].shape) == 1
    known = [isinstance(v, Variable) and v in filled for v in equation.inputs]
    if equation.name not in ELEMENTWISE or not any(known):
        return False
    return all(is_known or aval.shape == () for is_known, aval in zip(known, avals, strict=True))


def _common_view(equation: Equation, views: Mapping[Variable, View]) -> View | None:
    """Return the view through which the equation does the same, None when there is none such."""
    found = {views[v] for v in equation.inputs if isinstance(v, Variable) and v in views}
    if len(found) != 1:
        return None
    (view,) = found
    if equation.name in _SUMS:
        return view if len(equation.eqn.params["axes"]) == len(view.user) else None
    avals: list[Any] = [v.aval for v in [*equation.inputs, *equation.outputs]]
    shapes = {tuple(aval.shape) for aval in avals}
    return view if equation.name in ELEMENTWISE and shapes <= {(), view.user} else None

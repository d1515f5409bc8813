"""Matrix products make their result in the order in which its readers index it.

``dot_general`` orders the dimensions of its result as its operands have them. Under grouped queries (q [b, t, k, g, h])
the scores come as [b, k, t, g, s], and softmax reads [g, b, k, t, s]: a transposition of the layer's largest array.
Alone it fuses, but a loop over layers stores the product in one layout and its backward loop reads another, so XLA lays
out the whole stack of scores anew between the loops: twice the memory of the residuals. Here the free dimensions of an
operand, which is smaller, are put into the readers' order before the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from ..analysis import ELEMENTWISE, Equation, Program, Variable, run_equation

Order = tuple[int, ...]
"""For each dimension of the product as it is made, the dimension of the result that it is."""


def product_orders(program: Program) -> dict[Variable, Order]:
    """Return the order in which to make the result of each product whose readers want another one."""
    readers: dict[Variable, list[Equation]] = {}
    for equation in program.equations:
        for variable in {v for v in equation.inputs if not isinstance(v, Literal)}:
            readers.setdefault(variable, []).append(equation)
    kept = {v for v in program.outputs if not isinstance(v, Literal)}
    orders = {}
    for equation in program.equations:
        if equation.name == "dot_general" and (wanted := _wanted(equation.outputs[0], readers, kept)):
            order = _order(equation, wanted)
            if order != tuple(range(len(order))):
                orders[equation.outputs[0]] = order
    return orders


def run_product(equation: Equation, arguments: Sequence[Any], order: Order) -> list[Any]:
    """Return the results of a ``dot_general``, made in ``order`` and seen in its own."""
    left, right = arguments
    lefts, rights = _free_dims(equation)
    batch = len(order) - len(lefts) - len(rights)
    left = _reordered(left, lefts, [d - batch for d in order[batch : batch + len(lefts)]])
    right = _reordered(right, rights, [d - batch - len(lefts) for d in order[batch + len(lefts) :]])
    (made,) = run_equation(equation.eqn, [left, right])
    return [jnp.transpose(made, [order.index(d) for d in range(len(order))])]


def _wanted(
    variable: Variable, readers: Mapping[Variable, Sequence[Equation]], kept: set[Variable]
) -> Sequence[int] | None:
    """Return the permutation that the only reader applies, behind operations that work element by element."""
    while variable not in kept and len(readers.get(variable, ())) == 1:
        (reader,) = readers[variable]
        if reader.name == "transpose":
            permutation: Sequence[int] = reader.eqn.params["permutation"]
            return permutation
        others = [v for v in reader.inputs if v is not variable]
        if reader.name not in ELEMENTWISE or any(_rank(v) for v in others) or len(reader.outputs) != 1:
            return None
        (variable,) = reader.outputs
    return None


def _order(equation: Equation, wanted: Sequence[int]) -> Order:
    """Return the dimensions of the result, the free ones of either operand in the wanted order."""
    lefts, rights = _free_dims(equation)
    batch = len(wanted) - len(lefts) - len(rights)
    middle = batch + len(lefts)
    groups = (range(batch), range(batch, middle), range(middle, len(wanted)))
    return (*groups[0], *(d for group in groups[1:] for d in sorted(group, key=list(wanted).index)))


def _free_dims(equation: Equation) -> tuple[list[int], list[int]]:
    """Dimensions of either operand that are neither summed over nor shared."""
    sums, batches = equation.eqn.params["dimension_numbers"]
    ranks = [_rank(v) for v in equation.inputs]
    left, right = (
        [d for d in range(rank) if d not in summed and d not in shared]
        for rank, summed, shared in zip(ranks, sums, batches, strict=True)
    )
    return left, right


def _rank(atom: Any) -> int:
    return len(atom.aval.shape)


def _reordered(array: Any, free: Sequence[int], order: Sequence[int]) -> Any:
    """Put the ``free`` dimensions of an operand into ``order``, all others where they are."""
    places = list(range(array.ndim))
    for place, index in zip(free, order, strict=True):
        places[place] = free[index]
    return array if places == sorted(places) else jnp.transpose(array, places)

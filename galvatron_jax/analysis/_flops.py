"""FLOP of matrix products and convolutions in a program, loops multiplied by their trip counts."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from ._jaxpr import inner_programs, open_program


def program_flops(program: ClosedJaxpr | Jaxpr) -> int:
    """Return the FLOP of one run of ``program`` (2 per multiply-add); bodies of ``while`` count once."""
    return sum(equation_flops(eqn) for eqn in open_program(program)[0].eqns)


def equation_flops(eqn: JaxprEqn) -> int:
    """Return the FLOP of an equation, of the programs that it calls included."""
    if eqn.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
        return _product_flops(eqn)
    inner = [program_flops(program) for program in inner_programs(eqn)]
    if not inner:
        return 0
    if eqn.primitive.name == "cond":
        return max(inner)
    return sum(inner) * int(eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1)


def _product_flops(eqn: JaxprEqn) -> int:
    avals: list[Any] = [v.aval for v in [*eqn.invars[:2], eqn.outvars[0]]]
    left, right, made = (aval.shape for aval in avals)
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        summed = [size for dim, size in enumerate(right) if dim != numbers.rhs_spec[0]]
    else:
        numbers = eqn.params.get("dimension_numbers") or eqn.params["ragged_dot_dimension_numbers"]
        numbers = getattr(numbers, "dot_dimension_numbers", numbers)
        summed = [left[dim] for dim in numbers[0][0]]
    flops: int = 2 * math.prod(made) * math.prod(summed)
    return flops

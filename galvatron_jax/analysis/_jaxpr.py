"""The one place that knows the form of JAX's equations: inner programs, scopes, and how to run an equation again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})
"""Calls that mean nothing but "run this program": safe to inline anywhere."""


def inner_programs(eqn: JaxprEqn) -> Iterator[ClosedJaxpr | Jaxpr]:
    """Yield the programs among the parameters of ``eqn`` (loop bodies, branches, called functions)."""
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (ClosedJaxpr, Jaxpr)):
                yield part


def open_program(program: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Return (jaxpr, constants) of a closed or open program."""
    return (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())


def called_program(eqn: JaxprEqn) -> ClosedJaxpr | Jaxpr | None:
    """Return the only inner program with the arity of ``eqn`` itself (a call of any kind), or None."""
    if eqn.primitive.name in ("scan", "while", "cond", "shard_map"):  # the last one: shapes of one device
        return None
    fitting = [
        program
        for program in inner_programs(eqn)
        if len(open_program(program)[0].invars) == len(eqn.invars)
        and len(open_program(program)[0].outvars) == len(eqn.outvars)
    ]
    return fitting[0] if len(fitting) == 1 else None


def scan_operands(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many operands of a scan are constants and how many are carried; the others are scanned over."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # newer than 0.10: the tree of the operands
    return len(constants), len(carried)


def scope_of(eqn: JaxprEqn) -> str:
    """Return the named scopes around ``eqn`` as text."""
    return str(eqn.source_info.name_stack)


def scope_name(scope: str) -> str:
    """Return scope text of an equation as the name of one scope (kept for attention marks and error messages)."""
    return scope.strip("/") or "top"


def run_equation(eqn: JaxprEqn, inputs: Sequence[Any], **changes: Any) -> list[Any]:
    """Run one equation on ``inputs`` (arrays or tracers), some of its parameters changed, and return its outputs."""
    bind_params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    functions, params = ((), bind_params) if isinstance(bind_params, dict) else bind_params
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def abstract(value: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an array, tracer or abstract value."""
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def is_literal(atom: object) -> bool:
    """Tell whether ``atom`` is a literal (a constant written into the program)."""
    return isinstance(atom, Literal)


def is_differentiable(dtype: Any) -> bool:
    """Tell whether values of ``dtype`` have gradients."""
    return bool(jax.numpy.issubdtype(dtype, jax.numpy.inexact))

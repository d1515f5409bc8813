"""Which equation of a program has no gradient: the module and the primitive that an error should name.

JAX says what is wrong with a primitive, but not where the model calls it: derivatives are taken of the cut program,
long after the user's own calls returned. Their scopes carry the module paths (``_marks``), so each equation is
differentiated alone, shapes only, until one fails as the whole did; of a call, loop or branch the equations inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from ..errors import AnalysisError
from ._jaxpr import abstract, inner_programs, is_differentiable, open_program, run_equation, scope_of
from ._marks import MARK


def no_gradient(program: ClosedJaxpr, error: Exception) -> AnalysisError:
    """Return what to raise when ``program`` cannot be differentiated because of ``error``."""
    reason = _reason(error)
    scope, primitive = next(_failing(program, reason, ""), ("", ""))
    modules = [module for module, _ in MARK.findall(scope)]
    return AnalysisError(
        f"the loss has no gradient: {f'primitive {primitive!r}: ' if primitive else ''}{reason}",
        expected="operations that reverse-mode differentiation knows",
        where=f"loss, in module {modules[-1]}" if modules else "loss",
        action="give it a derivative (jax.custom_vjp), or keep it out of the gradient with jax.lax.stop_gradient",
    )


def _failing(program: ClosedJaxpr | Jaxpr, reason: str, scope: str) -> Iterator[tuple[str, str]]:
    """Yield (scope, primitive) of the innermost equations that fail for ``reason``."""
    for eqn in open_program(program)[0].eqns:
        if _reason_of(eqn) == reason:
            place = f"{scope}/{scope_of(eqn)}"
            for inner in inner_programs(eqn):
                yield from _failing(inner, reason, place)
            yield place, str(eqn.primitive.name)


def _reason_of(eqn: JaxprEqn) -> str | None:
    """Return why ``eqn`` alone has no gradient; None if it has one, or has nothing to differentiate."""
    shapes = [abstract(v.aval) for v in eqn.invars]
    chosen = [i for i, shape in enumerate(shapes) if is_differentiable(shape.dtype)]

    def both_passes(*inputs: Any) -> Any:
        def forward(*parts: Any) -> list[Any]:
            values = list(inputs)
            for index, part in zip(chosen, parts, strict=True):
                values[index] = part
            return [o for o in run_equation(eqn, values) if is_differentiable(o.dtype)]

        outputs, pullback = jax.vjp(forward, *[inputs[i] for i in chosen])
        return pullback(outputs)

    try:
        jax.eval_shape(both_passes, *shapes)
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

"""Trace the user's loss once, abstractly, at the shapes of one microbatch: no device, no parameter memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from ..errors import AnalysisError
from ._batch import which_have_samples
from ._jaxpr import is_differentiable
from ._marks import marked_calls
from ._pure_model import PureModel
from ._rows import Rows


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """A traced loss: ``program(parameters, state, batch) -> (loss, new state)`` over flat leaves."""

    model: PureModel
    program: ClosedJaxpr
    """Over the leaves of the user's own trees."""
    batch: Any
    """Abstract batch, a pytree."""
    has_samples: tuple[bool, ...]
    """Whether dimension 0 of each batch leaf is the batch; the others (tables, temperatures, random keys) are given
    whole to every microbatch and device."""
    rows: Rows
    """How the cut program's leaves are made of the user's: stacks of layers are taken apart."""

    @property
    def parameters(self) -> Any:
        """Abstract trained leaves of the cut program, a pytree."""
        return self.rows.parameters

    @property
    def state(self) -> Any:
        """Abstract other leaves of the cut program, a pytree."""
        return self.rows.state

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted path of each leaf of ``parameters``."""
        return self.rows.paths


def trace_loss(model: PureModel, batch: Any, *, where: str = "loss") -> Trace:
    """Trace the loss of ``model`` at the shapes of ``batch`` (one microbatch).

    Args:
        model: The user's model.
        batch: A pytree of ``jax.ShapeDtypeStruct`` (see ``abstract_batch``).
        where: Name of the loss, for messages.

    Raises:
        AnalysisError: the loss cannot be traced, or does not return a scalar.
    """

    def run(parameters: Any, state: Any, batch: Any) -> Any:
        value, state = model.run(parameters, state, batch)
        return value[0] if isinstance(value, tuple) else value, state

    with marked_calls(model.classes) as calls:
        try:
            program, (value, _) = jax.make_jaxpr(run, return_shape=True)(model.parameters, model.state, batch)
        except Exception as error:
            raise AnalysisError(
                f"the loss cannot be traced: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}",
                expected="loss(model, batch) that runs under jax.jit",
                where=calls.place(where),
                action="run jax.eval_shape on it to see where it stops",
            ) from error
    if getattr(value, "shape", None) != ():
        raise AnalysisError(
            f"the loss returns {_described(value)}", expected="a scalar", where=where, action="take its mean"
        )
    if not is_differentiable(value.dtype):
        raise AnalysisError(
            f"the loss returns {value.dtype}", expected="a floating-point scalar", where=where, action="return its mean"
        )
    return Trace(model, program, batch, which_have_samples(batch), Rows.whole(model))


def _described(value: Any) -> str:
    return f"shape {value.shape}" if hasattr(value, "shape") else f"a {type(value).__name__}"

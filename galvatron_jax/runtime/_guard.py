"""What every step reports, and the guard that keeps a non-finite update out of the state.

All is decided on the device, inside the compiled step: no host waits for it, and every process takes the same branch,
because loss and norm are the same number on all devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class StepMetrics(NamedTuple):
    """Scalars of one training step, replicated."""

    loss: Any
    """float32: mean loss of the batch before the update."""
    gradient_norm: Any
    """float32: Euclidean norm over the gradients of all parameters, before the optimizer sees them."""
    finite: Any
    """bool: loss and norm are finite; otherwise the update was left out (see ``guarded``)."""


def step_metrics(loss: jax.Array, gradients: Any) -> StepMetrics:
    """Return the metrics of a step from its mean loss and its mean gradients."""
    squares = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    norm = optax.global_norm(squares)
    return StepMetrics(loss, norm, jnp.isfinite(loss) & jnp.isfinite(norm))


def guarded(finite: jax.Array, after: Any, before: Any) -> Any:
    """Return ``after`` where the step was ``finite``, else ``before``: trees of equal structure."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)

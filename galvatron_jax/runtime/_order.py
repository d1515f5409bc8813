"""Order of the backward pass: gradients of parameters are finished layer by layer.

No later operation of a backward pass needs the gradients of parameters, so XLA's scheduler leaves their products to the
end: their operands (recomputed activations, cotangents) and unreduced gradients of *all* layers are alive together, and
full rematerialisation saves little. Here the cotangents of a layer's inputs wait for the reduced gradients of the layer
after it, so that one layer's reduction runs beside the next one's backward pass, and not more is alive. In a loop over
layers each turn makes one layer's gradients, so there they only need their place.

Measured in programs for 16 H100 (benchmarks/memory_h100_aot_2026-11-22.md): fully sharded with full remat, four layers
of 7B width, 6.20 GiB without and 5.17 with it; without, 0.3 to 0.4 GiB of each layer already passed were alive. What it
does to the time of a step is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


def after_gradients(
    values: Sequence[Any], parameters: Sequence[Any], places: Sequence[NamedSharding]
) -> tuple[list[Any], list[Any]]:
    """Return both unchanged; in the backward pass the cotangents of ``values`` wait for those of ``parameters``.

    Args:
        values: Floating-point arrays whose cotangents wait: what a layer takes from the layers before.
        parameters: Parameters, before any layer reads them, whose gradients must be finished first.
        places: Where the gradient of each parameter is kept (reduced).
    """

    @jax.custom_vjp
    def both(values: list[Any], parameters: list[Any]) -> tuple[list[Any], list[Any]]:
        return values, parameters

    def forward(values: list[Any], parameters: list[Any]) -> tuple[tuple[list[Any], list[Any]], None]:
        return (values, parameters), None

    def backward(_: None, cotangents: tuple[list[Any], list[Any]]) -> Any:
        waiting, gradients = cotangents
        gradients = jax.lax.with_sharding_constraint(gradients, list(places))
        return jax.lax.optimization_barrier((waiting, gradients))

    both.defvjp(forward, backward)
    waiting, held = both(list(values), list(parameters))
    return waiting, held


def place_gradients(parameters: Sequence[Any], places: Sequence[NamedSharding]) -> list[Any]:
    """Return ``parameters`` unchanged; in the backward pass their gradients are put (reduced) into ``places``."""

    @jax.custom_vjp
    def same(parameters: list[Any]) -> list[Any]:
        return parameters

    def backward(_: None, gradients: list[Any]) -> tuple[list[Any]]:
        return (jax.lax.with_sharding_constraint(gradients, list(places)),)

    same.defvjp(lambda parameters: (parameters, None), backward)
    placed: list[Any] = same(list(parameters))
    return placed


def has_gradient(value: Any) -> bool:
    """Tell whether ``value`` has a cotangent."""
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))

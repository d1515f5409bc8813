"""Run one segment of the user's program under a layout: constrain, gather, rematerialise.

The segment's own equations are run again, with sharding constraints on the results of kernels (matrix products and
lookups) and, under sequence parallelism, on the sums and products of the stream: XLA's propagation fills in the rest.
Parameters are cast to their compute dtype, then gathered, *inside* the rematerialised function and under a name that no
policy keeps, so neither casts nor gathered weights live from the forward to the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from ..analysis import Value, is_kept, is_kernel_name, run_equation
from ._layout import LayerLayout

WEIGHTS = "galvatron_weights"
"""Name of parameters as a layer uses them: cast and gathered."""

_STREAM_PRIMITIVES = frozenset(("add", "mul"))
"""Under sequence parallelism residual adds and norm products are constrained too."""

SegmentFunction = Callable[[Sequence[Any]], list[Any]]
"""From the segment's inputs to its outputs."""


def build_segment(layout: LayerLayout, *, in_loop: bool = False) -> SegmentFunction:
    """Return the segment of ``layout.kind`` as a function under the layout's strategy.

    It takes its inputs where they are: the caller puts all but the parameters into the layer's layout.

    Args:
        layout: The segment's kind and strategy.
        in_loop: It is the body of a loop, so forward and backward pass are loops of their own, and nothing needs to
            keep the compiler from merging what is computed in both.
    """

    def run(inputs: Sequence[Any]) -> list[Any]:
        return _run_equations(layout, _place_weights(layout, inputs))

    if layout.strategy.remat == "full":
        return jax.checkpoint(run, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=not in_loop)
    return jax.checkpoint(run, policy=_keep_kernel_results, prevent_cse=not in_loop)


def _keep_kernel_results(primitive: Any, *_: Any, **params: Any) -> bool:
    """Policy of remat ``none``: no kernel runs twice, fused elementwise work does (see ``analysis.is_kept``)."""
    return is_kept(str(primitive.name))


def _place_weights(layout: LayerLayout, inputs: Sequence[Any]) -> list[Any]:
    layer, placed = layout.kind.layer, list(inputs)
    for position, index in enumerate(layer.parameters):
        weight, dtype = placed[index], layout.kind.profile.parameters[position].compute_dtype
        if str(weight.dtype) != dtype:
            # The cast stays where the parameter is stored: else XLA gathers first and casts then, twice the bytes.
            weight = jax.lax.with_sharding_constraint(weight.astype(dtype), layout.stored(position, "parameter"))
        weight = jax.lax.with_sharding_constraint(weight, layout.value(layer.inputs[index]))
        placed[index] = checkpoint_name(weight, WEIGHTS)
    return placed


def _run_equations(layout: LayerLayout, inputs: Sequence[Any]) -> list[Any]:
    layer = layout.kind.layer
    program, values = layer.forward, layer.forward_values
    environment: dict[Any, Any] = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else environment[atom]

    for equation in program.equations:
        arguments = [read(v) for v in equation.inputs]
        results = run_equation(equation.eqn, arguments)
        for variable, result in zip(equation.outputs, results, strict=True):
            value = values[variable]
            environment[variable] = _constrain(layout, equation.name, result, value)
    return [read(v) for v in program.outputs]


def _constrain(layout: LayerLayout, primitive: str, result: Any, value: Value) -> Any:
    stream = layout.strategy.sp and layout.is_stream(value)
    if not result.ndim or not (is_kernel_name(primitive) or (stream and primitive in _STREAM_PRIMITIVES)):
        return result
    if stream and primitive == "gather":
        # Summed over the vocabulary first, sharded along the sequence after: else XLA shards the indices along it.
        result = jax.lax.with_sharding_constraint(result, layout.value(value, sequence=False))
    return jax.lax.with_sharding_constraint(result, layout.value(value))


def is_array(value: Any) -> bool:
    """Tell whether ``value`` has dimensions to shard: neither a scalar nor a random key."""
    return value.ndim > 0 and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
